"""Records of requests, for tests of who is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from llmctl.serving.request_record import Moments, RequestRecord

UNIX_OFFSET = 1_800_000_000.0


def record(number: int = 0, **changes: Any) -> RequestRecord:
    """A finished request: it came at 10.0, was translated at 10.1, ran from 10.4; 3 tokens from 11.0 to 12.0."""
    moments = Moments(10.0, 12.5, UNIX_OFFSET, arrival=10.1, scheduled=10.4, first_token=11.0, last_token=12.0)
    fields: dict[str, Any] = {
        "request_id": f"r{number}",
        "endpoint": "/v1/completions",
        "model": "m",
        "tenant": "key alice",
        "moments": moments,
        "status": 200,
        "error": None,
        "trace_context": {},
        "stream": True,
        "n": 1,
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "priority": -1,
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "output_tokens": 3,
        "finish_reasons": ("length",),
        "itl_seconds": 0.5,
    }
    return RequestRecord(**{**fields, **changes})


def refused(**changes: Any) -> RequestRecord:
    """A request that was refused before anything was known of it."""
    moments = Moments(10.0, 10.25, UNIX_OFFSET)
    return RequestRecord("r", "/v1/completions", "m", "address 10.0.0.7", moments, 400, "bad", {}, **changes)


def wait_until(look: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What there is to see, once there is something."""
    end = time.perf_counter() + seconds  # tests set the other clock
    while not (found := look()):
        assert time.perf_counter() < end, "it never was"
        time.sleep(0.01)
    return found
