"""What ``/v1/embeddings`` is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmctl.serving.protocol import PROMPTS_EXPECTED, Prompts, RequestFields
from llmctl.serving.refused_fields import Only, not_here
from llmctl.serving.response_schema import Count, ResponseModel


class EmbeddingRequest(RequestFields):
    """``POST /v1/embeddings``."""

    expected: ClassVar[Mapping[str, str]] = {"input": PROMPTS_EXPECTED}

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, description="At most what the model has.")] | None = None

    # Beyond OpenAI's.
    pooling: Annotated[Literal["last", "mean"] | None, Field(description="Null: the server's `--pooling`.")] = None
    normalize: Annotated[bool | None, Field(description="To the length 1.")] = True
    add_special_tokens: bool = True

    # Known, and refused when set.
    truncate_prompt_tokens: Annotated[int | None, Only("not supported; shorten the input")] = None

    # Of what generates.
    n: Annotated[Any, not_here(values=(None, 1))] = None
    best_of: Annotated[Any, not_here(values=(None, 1))] = None
    seed: Annotated[Any, not_here()] = None
    stop: Annotated[Any, not_here()] = None
    echo: Annotated[Any, not_here(values=(None, False))] = None
    stream: Annotated[Any, not_here(values=(None, False))] = None
    logprobs: Annotated[Any, not_here(values=(None, False))] = None
    max_tokens: Annotated[Any, not_here()] = None
    response_format: Annotated[Any, not_here()] = None
    tools: Annotated[Any, not_here(values=(None, []))] = None


class Embedding(ResponseModel):
    """The vector of one input."""

    object: Literal["embedding"]
    index: Count
    embedding: Annotated[
        list[float] | str, Field(description="With `base64`: of little-endian 32-bit floats, one behind the other.")
    ]


class EmbeddingUsage(ResponseModel):
    """Tokens of all inputs."""

    prompt_tokens: Count
    total_tokens: Count


class EmbeddingList(ResponseModel):
    """The answer of ``/v1/embeddings``, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
