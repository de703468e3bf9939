"""Request bodies of ``/generate``, ``/generate_stream`` and ``POST /``, named as TGI names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmctl.engine.sampling_params import MAX_INT, MAX_LOGPROBS, MAX_SAMPLES
from llmctl.serving.protocol import MOST, ApiModel, JsonSchema, StopStrings
from llmctl.serving.refused_fields import Only, not_here


class TgiModel(ApiModel):
    """Base of this API's bodies."""

    expected: ClassVar[Mapping[str, str]] = {}


class JsonGrammar(TgiModel):
    """JSON by a schema, as an object or spelt as a string."""

    type: Literal["json"]
    value: str | JsonSchema


class NamedSchema(TgiModel):
    """A schema, and a name that says nothing to this server."""

    name: str | None = None
    schema_: Annotated[JsonSchema, Field(alias="schema")]


class JsonSchemaGrammar(TgiModel):
    """JSON by a schema that has a name."""

    type: Literal["json_schema"]
    value: NamedSchema


class RegexGrammar(TgiModel):
    """A regular expression that the whole output matches."""

    type: Literal["regex"]
    value: str


Grammar = Annotated[JsonGrammar | JsonSchemaGrammar | RegexGrammar, Field(discriminator="type")]


class GenerateParameters(TgiModel):
    """How to generate. Greedy, unless ``do_sample``, ``temperature``, ``top_k`` or ``top_p`` asks for sampling."""

    do_sample: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=MOST)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=MOST)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    max_new_tokens: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="Null: no limit but the context.")
    ] = 100
    stop: StopStrings | None = None
    truncate: Annotated[
        Annotated[int, Field(ge=1, le=MAX_INT)] | None,
        Field(description="Only so many tokens of `inputs`, from the end."),
    ] = None
    return_full_text: Annotated[bool | None, Field(description="`generated_text` begins with `inputs`.")] = None
    best_of: Annotated[
        Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None,
        Field(description="The likeliest by token of so many samples; not in a stream."),
    ] = None
    details: bool | None = False
    decoder_input_details: Annotated[bool | None, Field(description="With `details`; not in a stream.")] = False
    top_n_tokens: Annotated[
        Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None, Field(description="With `details`, or in a stream.")
    ] = None
    grammar: Grammar | None = None
    adapter_id: Annotated[str | None, Field(description="Name of an adapter of the server's.")] = None

    # Known, and refused when set.
    typical_p: Annotated[Any, Only("not supported: use top_p")] = None
    watermark: Annotated[bool | None, Only("not supported: there is none here", (None, False))] = None


class GenerateBody(TgiModel):
    """What the endpoints share. ``streams``: whether they do; None: as the request says."""

    streams: ClassVar[bool | None] = None

    inputs: str
    parameters: Annotated[GenerateParameters | None, Field(description="Without: as with nothing but `do_sample`.")] = (
        None
    )
    stream: bool | None = None

    # Of ``parameters``, and of OpenAI's requests.
    n: Annotated[Any, not_here("parameters.best_of", (None, 1))] = None
    best_of: Annotated[Any, not_here("parameters.best_of", (None, 1))] = None
    seed: Annotated[Any, not_here("parameters.seed")] = None
    stop: Annotated[Any, not_here("parameters.stop")] = None
    echo: Annotated[Any, not_here("parameters.return_full_text", (None, False))] = None
    temperature: Annotated[Any, not_here("parameters.temperature")] = None
    top_k: Annotated[Any, not_here("parameters.top_k")] = None
    top_p: Annotated[Any, not_here("parameters.top_p")] = None
    max_tokens: Annotated[Any, not_here("parameters.max_new_tokens")] = None
    max_new_tokens: Annotated[Any, not_here("parameters.max_new_tokens")] = None
    logprobs: Annotated[Any, not_here("parameters.details", (None, False))] = None
    grammar: Annotated[Any, not_here("parameters.grammar")] = None
    response_format: Annotated[Any, not_here("parameters.grammar")] = None
    tools: Annotated[Any, not_here("/v1/chat/completions", (None, []))] = None


class GenerateRequest(GenerateBody):
    """``POST /generate``."""

    streams: ClassVar[bool | None] = False
    stream: Annotated[bool | None, Only("this endpoint never streams; use POST /", (None, False))] = None


class GenerateStreamRequest(GenerateBody):
    """``POST /generate_stream``."""

    streams: ClassVar[bool | None] = True
    stream: Annotated[bool | None, Only("this endpoint always streams; use POST /", (None, True))] = None


class CompatGenerateRequest(GenerateBody):
    """``POST /``."""
