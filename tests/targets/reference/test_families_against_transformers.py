"""Every family, passes on and off: logits of the reference runtime over the paged cache equal transformers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_models import CASES, MORE_CASES, VOCAB, family_model, slow
from runtime_stepping import Pieces, paged_logits

from llmctl.graph.passes import DEFAULT_PASSES
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import checkpoint_runtime

TOLERANCE = 1e-4


def make_runtime(case: str, passes: tuple[str, ...], block_size: int = 4) -> ReferenceRuntime:
    checkpoint = family_model(case).checkpoint
    return checkpoint_runtime(checkpoint, passes=passes, num_blocks=64, block_size=block_size)


def tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def one_shot(_step: int, _sequence: int, left: int) -> int:
    return left


def one_by_one(_step: int, _sequence: int, _left: int) -> int:
    return 1


def random_chunks(seed: int, largest: int = 9) -> Pieces:
    rng = np.random.default_rng(seed)
    return lambda _step, _sequence, _left: int(rng.integers(0, largest + 1))


def staggered(step: int, sequence: int, _left: int) -> int:
    """Sequence i joins at step 2i with a prefill of 5 + i tokens and then decodes: prefill and decode in one batch."""
    if step < 2 * sequence:
        return 0
    return 5 + sequence if step == 2 * sequence else 1


_SECOND = ("exaone4_full", "gpt_neox_serial", "llama_dynamic", "glm4_moe_air")  # of a family that has another case


@pytest.mark.parametrize("case", [*CASES, *(case for case in MORE_CASES if case not in _SECOND), *slow(_SECOND)])
def test_logits_equal_transformers(case: str) -> None:
    check_logits(case, DEFAULT_PASSES)


@pytest.mark.parametrize("case", [*CASES, *slow(MORE_CASES)])
def test_logits_of_plain_graphs_equal_transformers(case: str) -> None:
    check_logits(case, ())


def check_logits(case: str, passes: tuple[str, ...]) -> None:
    runtime = make_runtime(case, passes)
    sequences = [tokens(n, seed) for seed, n in enumerate((33, 1, 18, 24))]
    expected = [family_model(case).logits(s) for s in sequences]
    assert max(float(e.abs().max()) for e in expected) > 1  # or the tolerance would say nothing
    ways: dict[str, Pieces] = {
        "one shot": one_shot,
        "chunks": random_chunks(1),
        "token by token": one_by_one,
        "prefill mixed with decode": staggered,
    }
    for way, pieces in ways.items():
        found = paged_logits(runtime, sequences, pieces)
        for e, f in zip(expected, found, strict=True):
            assert float((e - f).abs().max()) < TOLERANCE, way


@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_block_size_does_not_matter(block_size: int) -> None:
    runtime = make_runtime("mistral", DEFAULT_PASSES, block_size)
    sequences = [tokens(n, seed) for seed, n in enumerate((21, 16))]
    for e, f in zip(map(family_model("mistral").logits, sequences), paged_logits(runtime, sequences, random_chunks(3)),
                    strict=True):  # fmt: skip
        assert float((e - f).abs().max()) < TOLERANCE


def test_the_window_is_seen() -> None:
    """The sliding-window case would fail against the same weights without a window."""
    sequence = [tokens(30, 5)]
    windowed = paged_logits(make_runtime("mistral", ()), sequence, one_shot)[0]
    model = family_model("mistral").model
    with torch.no_grad():
        model.config.sliding_window = None
        full = model(torch.tensor(sequence)).logits[0]
        model.config.sliding_window = 7
    assert float((windowed[:7] - full[:7]).abs().max()) < TOLERANCE
    assert float((windowed[8:] - full[8:]).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama", "phi", "gpt2"])
def test_sixteen_bit_is_close(case: str, dtype: str) -> None:
    """A 16-bit run is within a few units of that format's precision of the float32 logits."""
    model = family_model(case)
    runtime = checkpoint_runtime(model.checkpoint, dtype=dtype, num_blocks=64, block_size=4)
    sequence = tokens(20, 2)
    expected = model.logits(sequence)
    found = paged_logits(runtime, [sequence], random_chunks(4))[0]
    scale = float(expected.abs().max())
    assert float((expected - found).abs().max()) < scale * (0.08 if dtype == "bfloat16" else 0.01)
