"""What TGI's endpoints answer, as models: for ``/openapi.json``, and for tests."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, RootModel

from llmctl.serving.response_schema import Absent, Count, LogProb, ResponseModel

FinishReason = Literal["length", "eos_token", "stop_sequence"]


class TgiErrorResponse(ResponseModel):
    """What every refusal and failure answers; in a stream, an event."""

    error: str
    error_type: Literal["authentication", "generation", "overloaded", "validation"]


class PrefillToken(ResponseModel):
    """A token of the prompt."""

    id: Count
    text: str
    logprob: Annotated[LogProb | None, Field(description="Null for the first.")]


class GeneratedToken(ResponseModel):
    """A token, and what it adds to the text; of a special one, its name, which the text leaves out."""

    id: Count
    text: str
    logprob: LogProb | None
    special: bool


TopTokens = Annotated[
    list[GeneratedToken], Field(description="With `top_n_tokens`: the likeliest in this place, best first.")
]


class GeneratedSequence(ResponseModel):
    """How a text came to be."""

    finish_reason: FinishReason
    generated_tokens: Count
    seed: Annotated[int | None, Field(description="The request's.")]
    prefill: Annotated[list[PrefillToken], Field(description="With `decoder_input_details`.")]
    tokens: list[GeneratedToken]
    top_tokens: list[TopTokens] | Absent = None


class BestOfSequence(GeneratedSequence):
    """One of the samples that were not the best."""

    generated_text: str


class GenerateDetails(GeneratedSequence):
    """With ``details``."""

    best_of_sequences: list[BestOfSequence] | Absent = None


class GenerateResponse(ResponseModel):
    """The answer of ``/generate``. The text has the stop sequence that ended it."""

    generated_text: str
    details: GenerateDetails | Absent = None


class CompatGenerateResponse(RootModel[Annotated[list[GenerateResponse], Field(min_length=1, max_length=1)]]):
    """The answer of ``POST /``."""


class StreamDetails(ResponseModel):
    """How a text came to be."""

    finish_reason: FinishReason
    generated_tokens: Count
    input_length: Count
    seed: int | None


class StreamResponse(ResponseModel):
    """An event, for each token; the last has the whole text, and with ``details`` how it came to be."""

    index: Annotated[int, Field(ge=1)]
    token: GeneratedToken
    top_tokens: TopTokens | Absent = None
    generated_text: str | None
    details: StreamDetails | None


class ServedInfo(ResponseModel):
    """The served model and its limits."""

    model_id: str
    model_sha: None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: Literal["text-generation"]
    max_concurrent_requests: Annotated[int, Field(ge=1)]
    max_best_of: Annotated[int, Field(ge=1)]
    max_stop_sequences: Annotated[int, Field(ge=1)]
    max_input_tokens: Count
    max_total_tokens: Annotated[int, Field(ge=1)]
    max_client_batch_size: Literal[1]
    router: Literal["llmctl"]
    version: str
    sha: None
    docker_label: None
