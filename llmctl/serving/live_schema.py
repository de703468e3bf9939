"""What ``/requests`` and ``/engine`` answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llmctl.serving.response_schema import ResponseModel

Count = Annotated[int, Field(ge=0)]


class RunningRequest(ResponseModel):
    """One sequence that is not finished."""

    id: Annotated[str, Field(description="The request's `X-Request-Id`.")]
    index: Annotated[int, Field(ge=0, description="Which of the request's sequences it is.")]
    state: Annotated[
        Literal["queued", "prefilling", "decoding"],
        Field(description="Waits for a step; was in one; has a token."),
    ]
    prompt_tokens: Count
    output_tokens: Annotated[int, Field(ge=0, description="So far.")]
    max_tokens: Annotated[int | None, Field(description="Null: up to the context's end.")]
    seconds: Annotated[float, Field(description="Since it came to the engine.")]
    ttft_seconds: Annotated[float | None, Field(description="From there to its first token.")]
    adapter: str | None


class RunningRequests(ResponseModel):
    """What the engine is working on: counts of all sequences, and a list of some hundred at most, those that run first.
    Where keys tell clients apart, the list has those of the key that asks."""

    running: Count
    queued: Count
    requests: list[RunningRequest]


class GraphFacts(ResponseModel):
    """The graph, counted."""

    family: str
    num_layers: Count
    hidden_size: Count
    vocab_size: Count
    max_position: Count
    parameters: Count
    ops: Annotated[dict[str, int], Field(description="By kind.")]


class KernelRow(ResponseModel):
    """Ops of one kind that one kernel executes, and why others do not."""

    kernel: str
    kind: str
    count: Count
    rows: str
    refused: list[str]


class OpRow(ResponseModel):
    """One op, in execution order."""

    layer: int
    name: str
    kind: str
    kernel: str


class EngineLimits(ResponseModel):
    """Of this run, in tokens, requests and KV blocks."""

    max_model_len: Count
    max_num_seqs: Count
    max_num_batched_tokens: Count
    block_size: Count
    num_blocks: Count
    kv_tokens: Count


class EngineDocument(ResponseModel):
    """What the engine is and how it runs; sizes in bytes."""

    version: str
    models: list[str]
    source: str
    fingerprint: str
    llmctl_version: Annotated[str, Field(description="That it was built by.")]
    target: str
    size: str
    checksum: str
    options: dict[str, Any]
    quantization: dict[str, Any]
    graph: GraphFacts
    kernels: list[KernelRow]
    ops: list[OpRow]
    limits: EngineLimits
    weight_bytes: Count
    kv_cache_bytes: Count
    kv_cache_dtype: str
    kernel_build: Annotated[str, Field(description="Which build of the kernels runs, where there are several.")]
    memory: Annotated[list[list[str]], Field(description="The memory plan's rows, a heading first.")]
    memory_note: str
    chat: Annotated[bool, Field(description="Whether there is a chat template.")]
    sampling_defaults: dict[str, Any]
    metrics_prefix: str
