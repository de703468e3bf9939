"""Hidden states pooled on the device, through the runtime, against the reference's."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_model import emulated_runtime
from emulator import missing
from runtime_script import SIZES, plan_of, poison_activations, poison_cache
from runtime_stepping import greedy
from tiny_models import FAMILIES, tiny_model

from llmctl.targets.cuda.target import CUDA_PASSES
from llmctl.targets.reference.runtime import ReferenceRuntime

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
STEPS = (
    ("A0:13-", {"A": 13}),  # a chunk of a mean
    ("A13:21- B0:1", {"A": 8}),  # beside a prompt of one token that is sampled
    ("A21:33- D0:3- B1:2", {"D": 1}),  # the last token's alone
    ("B2:3 E0:1-", {"E": 1}),  # one token each, one of which is sampled
    ("B3:4 C16:18- E1:2-", {"C": 2, "E": 1}),
)
"""What is computed, and how many rows of each sequence are pooled."""


def test_sums_are_the_references_and_samples_what_they_are_without() -> None:
    model = tiny_model({**FAMILIES["llama"], "num_hidden_layers": 1}, None, CUDA_PASSES)
    runtime = emulated_runtime(*model, "float16", **SIZES)
    sizes = {"num_blocks": SIZES["num_blocks"], "block_size": SIZES["block_size"]}
    single, half = (ReferenceRuntime(*model, dtype=dtype, **sizes) for dtype in ("float32", "float16"))
    poison_cache(runtime)
    sampled = []
    for step, pooled in STEPS:
        plan = plan_of(step, **{name: {"pool_rows": rows} for name, rows in pooled.items()})
        batch = greedy(sum(piece.sample for piece in plan.slices))
        poison_activations(runtime)
        result = runtime.execute(plan, batch).result()
        exact, same = single.execute(plan, batch).value.pooled, half.execute(plan, batch).value.pooled
        assert result.pooled.keys() == exact.keys() == pooled.keys()
        for name, values in result.pooled.items():
            assert values.dtype == np.float32
            assert values.shape == exact[name].shape
            limit = 2 * np.abs(same[name] - exact[name]).max() + 2e-3 * pooled[name]
            assert np.abs(values - exact[name]).max() <= limit
            assert np.abs(exact[name]).max() > 50 * limit
        sampled.append(result.token_ids.tolist())
    for (step, _), tokens in zip(STEPS, sampled, strict=True):
        plan = plan_of(step)
        poison_activations(runtime)
        result = runtime.execute(plan, greedy(len(tokens))).result()
        assert (result.token_ids.tolist(), result.pooled) == (tokens, {})
