"""Sampling on the device, through the runtime, against the reference sampler; and log-probabilities of prompts."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_model import EmulatedRuntime, emulated_runtime
from emulator import missing
from numpy.typing import NDArray
from runtime_script import SIZES, plan_of, poison_activations, poison_cache, tables, texts
from runtime_stepping import greedy
from scored_tokens import check_scores
from tiny_models import FAMILIES, VOCAB, tiny_model
from torch import Tensor

from llmctl.engine.step import SamplingBatch, StepPlan, StepResult, TokenLogprobs
from llmctl.targets.cuda.target import CUDA_PASSES
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.sampler import sample

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
MODEL = tiny_model({**FAMILIES["llama"], "num_hidden_layers": 1}, None, CUDA_PASSES)
STEPS = (
    "A0:1 B0:1 C0:1",  # padded by a row
    "D0:3 A1:2 B1:2- C1:2",  # rows that are gathered
    "E0:1",
    "A2:3 B2:3 C2:3 D3:4 E1:2",
    "B3:4 E2:3- A3:4",  # one row a sequence, but not all sampled
)


@functools.cache
def _runtime() -> EmulatedRuntime:
    """One for all tests; each poisons its cache. (No fixture: tests/gpu takes over the tests alone.)"""
    return emulated_runtime(*MODEL, "float16", **SIZES)


def _plan(step: str, **changes: dict[str, Any]) -> StepPlan:
    """``plan_of`` where C has no block of A's, and E's text a third token."""
    fields: dict[str, dict[str, Any]] = {"C": {"block_ids": tables()["C"][1:]}}
    if "E2:3" in step:
        fields["E"] = {"token_ids": [texts()["B"][0]]}
    for name, more in changes.items():
        fields[name] = fields.get(name, {}) | more
    return plan_of(step, **fields)


def random_batch(rows: int, rng: np.random.Generator) -> SamplingBatch:
    """Any subset of the parameters, rows that ask for nothing among those that do."""

    def maybe(make: Any) -> Any:
        return make() if rng.random() < 0.5 else None

    def floats(*choices: float) -> Any:
        return lambda: rng.choice(np.array(choices, np.float32), rows)

    def ids() -> tuple[np.ndarray, ...]:
        return tuple(rng.integers(0, VOCAB, rng.integers(0, 40)).astype(np.int32) for _ in range(rows))

    batch = SamplingBatch(
        temperature=rng.choice(np.array([0, 0.5, 1, 2], np.float32), rows),
        seeds=rng.integers(0, 2**64, rows, np.uint64),
        positions=rng.integers(0, 10_000, rows),
        top_k=maybe(lambda: rng.choice(np.array([0, 1, 3, 20, VOCAB, VOCAB + 5], np.int32), rows)),
        top_p=maybe(floats(0.1, 0.6, 0.9, 1)),
        min_p=maybe(floats(0, 0.02, 0.2)),
        num_logprobs=maybe(lambda: rng.choice(np.array([-1, 0, 1, 5, 20], np.int32), rows)),
        allowed_mask=maybe(lambda: rng.integers(0, 2**32, (rows, VOCAB // 32), np.uint64).astype(np.uint32)),
    )
    if rng.random() < 0.5:
        batch = replace(
            batch, prompt_ids=ids(), output_ids=ids(), repetition_penalty=maybe(floats(1, 1.5, 0.7)),
            presence_penalty=maybe(floats(0, 0.5, -1)), frequency_penalty=maybe(floats(0, 0.3, -0.2)),
        )  # fmt: skip
    if rng.random() < 0.5:
        pairs = np.unique(rng.integers(0, [rows, VOCAB], (12, 2)), axis=0).astype(np.int32)
        batch = replace(
            batch,
            bias_rows=np.ascontiguousarray(pairs[:, 0]),
            bias_ids=np.ascontiguousarray(pairs[:, 1]),
            bias_values=rng.choice(np.array([-np.inf, -4, 3, 30], np.float32), len(pairs)),
        )
    return batch


def _logits(runtime: EmulatedRuntime, rows: int) -> Tensor:
    return runtime._logits(rows).float().clone()


def check_sampled(result: StepResult, logits: Tensor, batch: SamplingBatch) -> None:
    """Tokens and ranks are those of the reference sampler over the same logits, log-probabilities nearly."""
    tokens, logprobs = sample(logits, batch)
    assert result.token_ids.dtype == np.int32
    assert result.token_ids.tolist() == tokens.tolist()
    assert (result.logprobs is None) == (logprobs is None)
    for found, expected in zip(result.logprobs or (), logprobs or (), strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            _check_logprobs(found, expected)


def _check_logprobs(found: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert found.rank == expected.rank
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert found.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-5)
    assert found.top_ids == expected.top_ids


def _run_batches(seed: int, kept: bool = False) -> None:
    rng = np.random.default_rng(seed)
    runtime = _runtime()
    poison_cache(runtime)
    batches: dict[int, SamplingBatch] = {}
    for step in STEPS:
        plan = _plan(step)
        rows = sum(piece.sample for piece in plan.slices)
        if rows not in batches or not kept:
            batches[rows] = random_batch(rows, rng)
        batch = batches[rows] = replace(batches[rows], positions=rng.integers(0, 10_000, rows))
        poison_activations(runtime)
        result = runtime.execute(plan, batch).result()
        check_sampled(result, _logits(runtime, rows), batch)


@pytest.mark.parametrize("seed", range(3))
def test_any_parameters(seed: int) -> None:
    _run_batches(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 60))
def test_many_parameters(seed: int) -> None:
    _run_batches(seed, kept=bool(seed % 2))


def test_arrays_that_come_again() -> None:
    """What was staged of an array is kept while that very array comes, for as many rows, and no longer."""
    rng = np.random.default_rng(5)
    runtime = _runtime()
    poison_cache(runtime)
    three = SamplingBatch(
        np.array([1, 2, 0.5], np.float32), rng.integers(0, 2**64, 3, np.uint64), np.zeros(3, np.int64),
        top_k=np.array([0, 5, 40], np.int32), top_p=np.array([0.9, 1, 0.4], np.float32),
    )  # fmt: skip
    two = SamplingBatch(np.array([1.5, 0], np.float32), rng.integers(0, 2**64, 2, np.uint64), np.zeros(2, np.int64))
    hot = replace(three, temperature=np.array([2, 2, 2], np.float32), top_p=None)
    for position, batch in enumerate((three, three, three, two, three, hot, hot, two, two, three, hot, three)):
        batch = replace(batch, positions=np.full(len(batch.temperature), position))
        names = "ABC"[: len(batch.temperature)]
        plan = _plan(" ".join(f"{name}0:1" for name in names))
        result = runtime.execute(plan, batch).result()
        check_sampled(result, _logits(runtime, len(names)), batch)


def test_a_grammars_mask_is_made_while_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, compute = _runtime(), EmulatedRuntime._compute
    calls = []

    def started(self: EmulatedRuntime, *args: Any) -> Any:
        calls.append("model")
        return compute(self, *args)

    def mask() -> NDArray[np.uint32]:
        calls.append("mask")
        words = np.zeros((2, VOCAB // 32), np.uint32)
        words[:, 0] = 1 << 9
        return words

    monkeypatch.setattr(EmulatedRuntime, "_compute", started)
    batch = replace(greedy(2), grammar_mask=mask)
    assert runtime.execute(_plan("A0:1 B0:1"), batch).result().token_ids.tolist() == [9, 9]
    assert calls == ["model", "mask"]


def test_a_forbidden_token_is_never_sampled() -> None:
    runtime = _runtime()
    poison_cache(runtime)
    best = runtime.execute(plan_of("A0:3 B0:2"), greedy(2)).result().token_ids
    rows, values = np.array([0], np.int32), np.array([-np.inf], np.float32)
    batch = replace(greedy(2), bias_rows=rows, bias_ids=best[:1], bias_values=values)
    found = runtime.execute(plan_of("A0:3 B0:2"), batch).result().token_ids
    assert found[0] != best[0]
    assert found[1] == best[1]


SCORED = (
    # more targets than sequences; some rows of a slice; none; beside rows that are sampled
    ("A0:14- B0:1 C0:6", {"A": 14, "C": 3}, 2),
    ("D0:1 B1:2 E0:1-", {"B": 1, "D": 0, "E": 1}, 2),  # one row a sequence
    ("A14:20", {"A": 6}, 1),
    ("A20:21 B2:3", {}, 2),
)


def test_scores_of_prompts() -> None:
    """Within the tolerance of the reference's; what is sampled in the same step is sampled from its own rows."""
    runtime = _runtime()
    poison_cache(runtime)
    sizes = {"num_blocks": SIZES["num_blocks"], "block_size": SIZES["block_size"]}
    single, half = (ReferenceRuntime(*MODEL, dtype=dtype, **sizes) for dtype in ("float32", "float16"))
    rng = np.random.default_rng(2)
    tops = {"A": 3, "B": VOCAB + 1, "C": 0, "D": 2, "E": 20}
    found, exact, same, asked = {}, {}, {}, {}
    for number, (step, wanted, rows) in enumerate(SCORED):
        targets = {
            name: {"score_targets": rng.integers(0, VOCAB, count).tolist(), "score_top": tops[name]}
            for name, count in wanted.items()
        }
        plan = _plan(step, **targets)
        batch = random_batch(rows, rng)
        poison_activations(runtime)
        result = runtime.execute(plan, batch).result()
        check_sampled(result, _logits(runtime, rows), batch)
        expected = single.logits(plan)
        torch.testing.assert_close(_logits(runtime, rows), expected, atol=0.02, rtol=0)
        distribution = torch.log_softmax(single.logits(plan, all_rows=True).double(), -1).numpy()
        first = 0
        for piece in plan.slices:
            if piece.score_targets is not None:
                rows_of = distribution[first : first + len(piece.score_targets)]
                asked[number, piece.request_id] = (result.scores[piece.request_id], rows_of, piece)
            first += len(piece.token_ids)
        for into, scores in ((found, result.scores), (exact, single.execute(plan, batch).value.scores),
                             (same, half.execute(plan, batch).value.scores)):  # fmt: skip
            into |= {(number, name): values.logprobs for name, values in scores.items()}
    assert found.keys() == exact.keys()
    assert {key: len(values) for key, values in found.items()} == {key: len(values) for key, values in exact.items()}
    noise = max(np.abs(same[key] - exact[key]).max(initial=0) for key in exact)
    assert max(np.abs(found[key] - exact[key]).max(initial=0) for key in exact) <= 2 * noise + 1e-3
    for scores, rows_of, piece in asked.values():
        check_scores(scores, rows_of, piece.score_targets, piece.score_top, atol=4 * noise + 1e-3)
