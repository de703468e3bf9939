"""The native sampler's struct is kept from step to step: it must say what a fresh one would."""

from __future__ import annotations

import ctypes as c
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.engine.step import SamplingBatch
from llmctl.targets.cpu.abi import SamplingDesc
from llmctl.targets.cpu.sampling import NativeSampling

VOCAB = 40
WIDTHS: dict[str, Any] = {
    "temperature": c.c_float,
    "seeds": c.c_uint64,
    "positions": c.c_int64,
    "top_k": c.c_int32,
    "top_p": c.c_float,
    "min_p": c.c_float,
    "repetition_penalty": c.c_float,
    "presence_penalty": c.c_float,
    "frequency_penalty": c.c_float,
    "num_logprobs": c.c_int32,
}


def contents(desc: SamplingDesc) -> dict[str, Any]:
    """Everything that the native sampler would read."""

    def read(name: str, kind: Any, count: int) -> list[Any] | None:
        at = getattr(desc, name)
        return None if at is None else list((kind * count).from_address(at))

    found: dict[str, Any] = {name: read(name, kind, desc.rows) for name, kind in WIDTHS.items()}
    found["allowed_mask"] = read("allowed_mask", c.c_uint32, 2 * desc.rows)
    for name, kind in (("prompt", c.c_int32), ("output", c.c_int32), ("bias", c.c_int32)):
        offsets = read(f"{name}_offsets", c.c_int64, desc.rows + 1)
        found[name] = None if offsets is None else (offsets, read(f"{name}_ids", kind, offsets[-1]))
    found["bias_values"] = read("bias_values", c.c_float, found["bias"][0][-1]) if found["bias"] else None
    return found | {"rows": desc.rows, "outputs": [desc.token_ids is not None, desc.out.width]}


@st.composite
def batches(draw: st.DrawFn) -> SamplingBatch:
    rows = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 99)))

    def maybe(dtype: Any, high: int = 5) -> Any:
        return rng.integers(1, high, rows).astype(dtype) if draw(st.booleans()) else None

    fields: dict[str, Any] = {
        **{name: maybe(np.float32) for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty")},
        **{name: maybe(np.int32) for name in ("top_k", "num_logprobs")},
    }
    if fields["repetition_penalty"] is not None or fields["presence_penalty"] is not None:
        for name in ("prompt_ids", "output_ids"):
            fields[name] = tuple(rng.integers(0, VOCAB, rng.integers(0, 4)).astype(np.int32) for _ in range(rows))
    if draw(st.booleans()):
        count = draw(st.integers(1, 5))
        fields["bias_rows"] = rng.integers(0, rows, count).astype(np.int32)
        fields["bias_ids"] = rng.integers(0, VOCAB, count).astype(np.int32)
        fields["bias_values"] = rng.random(count).astype(np.float32)
    if draw(st.booleans()):
        fields["allowed_mask"] = rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    return SamplingBatch(
        rng.random(rows).astype(np.float32),
        rng.integers(0, 2**63, rows).astype(np.uint64),
        rng.integers(0, 99, rows).astype(np.int64),
        **fields,
    )


def dense(found: dict[str, Any]) -> dict[str, Any]:
    """``out`` counts only where log-probabilities are asked for."""
    if found["num_logprobs"] is None:
        found["outputs"][1] = 0
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(batches(), st.integers(0, 3)), min_size=2, max_size=6))
def test_a_kept_struct_equals_a_fresh_one(steps: list[SamplingBatch | int]) -> None:
    """A number stands for the earlier batch of that index, whose arrays come again."""
    kept, seen = NativeSampling(VOCAB), []
    for step in steps:
        if isinstance(step, int):
            if step >= len(seen):
                continue
            step = seen[step]
        seen.append(step)
        fresh = NativeSampling(VOCAB)  # named: it owns what its struct points to
        assert dense(contents(kept.prepare(step))) == dense(contents(fresh.prepare(step)))
