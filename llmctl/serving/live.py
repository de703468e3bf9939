"""What the page asks of the engine beside ``/metrics``: what each request is doing, and what the engine is."""

from __future__ import annotations

import time
from typing import Any

from msgspec import structs
from starlette.requests import Request
from starlette.responses import Response

from llmctl import __version__
from llmctl.serving.context import ServerContext, context_of
from llmctl.serving.generation import RunningSequence
from llmctl.serving.openai_errors import json_response
from llmctl.serving.tenants import tenant_of

MOST_SHOWN = 128
"""Sequences of an answer. A queue has thousands, and each takes some microseconds of the event loop to write."""


def state_of(sequence: RunningSequence) -> str:
    """What an unfinished sequence is doing, as the API process knows it: ``queued``, ``prefilling``, ``decoding``."""
    if sequence.last_token is not None:
        return "decoding"
    return "prefilling" if sequence.scheduled else "queued"


async def requests(request: Request) -> Response:
    """What each unfinished sequence is doing; where keys tell clients apart, each key's own, and the count of all."""
    context = context_of(request)
    found = [(state_of(sequence), sequence, tokens) for sequence, tokens in context.client.running()]
    running = [row for row in found if row[0] != "queued"]
    queued = [row for row in found if row[0] == "queued"]
    own = tenant_of(request, None, context.keys) if context.keys.several else None
    visible = [row for row in (*running, *queued) if own is None or row[1].generation.tenant == own]
    now = time.monotonic()
    shown = [_document(context, now, *row) for row in visible[:MOST_SHOWN]]
    return json_response({"running": len(running), "queued": len(queued), "requests": shown})


def _document(context: ServerContext, now: float, state: str, sequence: RunningSequence, tokens: int) -> dict[str, Any]:
    generation = sequence.generation
    return {
        "id": context.redactor.line(generation.request_id),
        "index": sequence.index,
        "state": state,
        "prompt_tokens": sequence.prompt_tokens,
        "output_tokens": tokens,
        "max_tokens": sequence.max_tokens,
        "seconds": round(now - generation.arrival, 3),
        "ttft_seconds": None if sequence.first_token is None else round(sequence.ttft, 4),
        "adapter": None if sequence.adapter is None else sequence.adapter.name,
    }


async def engine(request: Request) -> Response:
    """What the engine is and how it runs: graph, kernels, limits, memory."""
    context = context_of(request)
    model = context.model()
    path = context.client.worker.engine_path
    assert path is not None, "a model is there once its engine is"
    info = structs.asdict(model.info)
    limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks", "kv_tokens")
    return json_response(
        {
            "version": __version__,
            "models": list(context.names),
            **await context.engine_card.read(path),
            "limits": {name: info[name] for name in limits},
            "weight_bytes": info["weight_bytes"],
            "kv_cache_bytes": info["kv_cache_bytes"],
            "kv_cache_dtype": info["kv_cache_dtype"],
            "kernel_build": info["kernels"],
            "memory": info["memory"],
            "memory_note": info["memory_note"],
            "chat": model.intake.has_chat_template,
            "sampling_defaults": dict(model.defaults.values),
            "metrics_prefix": context.config.metrics_prefix,
        }
    )
