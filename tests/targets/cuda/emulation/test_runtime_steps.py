"""How steps follow one another: tokens that stay on the device, graphs and eager steps, contexts that outgrow them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from cuda_model import EmulatedRuntime, emulated_runtime
from emulator import missing
from runtime_script import SIZES, Row, plan_of, play, poison_activations, poison_cache
from runtime_stepping import greedy
from tiny_models import FAMILIES, MIXTURES, VOCAB, tiny_model
from torch import Tensor

from llmctl.engine.step import IN_FLIGHT, SamplingBatch, SequenceSlice, StepPlan
from llmctl.graph.graph import QuantScheme
from llmctl.targets.cuda import buckets
from llmctl.targets.cuda import buffers as cuda_buffers
from llmctl.targets.cuda import ops as cuda_ops
from llmctl.targets.cuda.pending import CudaStep
from llmctl.targets.cuda.profiling import experts_read
from llmctl.targets.cuda.target import CUDA_PASSES
from llmctl.targets.step_work import Storage

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def _runtime(**options: bool) -> EmulatedRuntime:
    graph, weights = tiny_model(FAMILIES["llama"], None, CUDA_PASSES)
    runtime = emulated_runtime(graph, weights, "float16", **SIZES, **options)
    poison_cache(runtime)
    return runtime


@functools.cache
def _shared() -> EmulatedRuntime:
    """A runtime that captured its decode steps. (No fixture: tests/gpu takes over the tests alone.)"""
    return _runtime()


def _fresh() -> EmulatedRuntime:
    """That, with nothing in its cache."""
    poison_cache(_shared())
    return _shared()


# -- tokens in flight ----------------------------------------------------------------------------------------------

SCHEDULE: tuple[tuple[tuple[str, int], ...], ...] = (
    (("A", 5), ("B", 3)),
    (("B", 0), ("A", 0)),  # in another order
    (("A", 0), ("C", 4)),  # B leaves, C joins with a prompt
    (("D", -2), ("C", 0), ("A", 0)),  # D's first chunk, which samples nothing
    (("D", 1), ("C", 0), ("A", 0)),  # a known token among those in flight
    (("D", 0), ("A", 0)),
    (("A", 0), ("B", 0), ("D", 0)),  # B comes back: its token is known since long
    (("B", 0), ("D", 0), ("A", 0), ("E", 1)),
    (("E", 0), ("A", 0)),
)
"""Steps of (sequence, prompt tokens): 0 the token sampled last, negative a chunk that is not sampled."""


@dataclass
class Player:
    """Takes a runtime through the schedule; with ``overlap`` a step is started before the last one's result is read,
    and what that one samples is fed on the device."""

    runtime: EmulatedRuntime
    overlap: bool
    temperature: float
    texts: dict[str, list[int]] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    fed: int = 0

    def play(self) -> tuple[list[list[int]], list[Tensor]]:
        """Tokens and logits by step."""
        rng = np.random.default_rng(3)
        tokens, logits, open_step = [], [], None
        for number, step in enumerate(SCHEDULE):
            before = open_step
            if before and not self.overlap:
                tokens.append(self._finish(*before))
            plan = self._plan(step, rng, before[1] if before and self.overlap else [])
            names = [piece.request_id for piece in plan.slices if piece.sample]
            poison_activations(self.runtime)
            pending = self.runtime.execute(plan, self._sampling(number, names))
            logits.append(self.runtime._logits(len(names)).float())
            if before and self.overlap:
                tokens.append(self._finish(*before))
            open_step = pending, names
        assert open_step is not None
        tokens.append(self._finish(*open_step))
        return tokens, logits

    def _finish(self, step: CudaStep, names: list[str]) -> list[int]:
        found = step.result().token_ids.tolist()
        for name, token in zip(names, found, strict=True):
            self.texts[name].append(token)
        return found

    def _plan(self, step: tuple[tuple[str, int], ...], rng: np.random.Generator, unread: list[str]) -> StepPlan:
        slices = []
        for name, new in step:
            text, start = self.texts.setdefault(name, []), self.done.get(name, 0)
            if new:
                text += rng.integers(0, VOCAB, abs(new)).tolist()
            ids = text[start:] or [IN_FLIGHT]
            assert (ids == [IN_FLIGHT]) == (name in unread)
            self.fed += ids == [IN_FLIGHT]
            self.done[name] = start + len(ids)
            slices.append(SequenceSlice(name, ids, start, (2 * "ABCDE".index(name), 11), new >= 0))
        return StepPlan(tuple(slices))

    def _sampling(self, step: int, names: list[str]) -> SamplingBatch:
        seeds = np.array([ord(name) for name in names], np.uint64)
        return SamplingBatch(
            np.full(len(names), self.temperature, np.float32), seeds, np.full(len(names), step, np.int64)
        )


@pytest.mark.parametrize("temperature", [0.0, 1.5], ids=["greedy", "drawn"])
def test_a_token_in_flight_is_as_good_as_a_known_one(temperature: float) -> None:
    one_by_one = Player(_fresh(), overlap=False, temperature=temperature)
    expected = one_by_one.play()
    assert one_by_one.fed == 0
    overlapped = Player(_fresh(), overlap=True, temperature=temperature)
    found = overlapped.play()
    assert overlapped.fed == 16
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert len({token for tokens in found[0] for token in tokens}) > 8


def test_only_what_the_step_before_samples_can_be_fed() -> None:
    """And a plan that is refused leaves nothing behind."""
    runtime, fed = _fresh(), {"token_ids": [IN_FLIGHT]}
    runtime.execute(plan_of("A0:3-"), greedy(0))
    with pytest.raises(ValueError, match="request B: the step before sampled no token for it"):
        runtime.execute(plan_of("B1:2", B=fed), greedy(1))  # nor did any other
    first = runtime.execute(plan_of("A0:4 B0:1"), greedy(2)).result().token_ids[1]
    expected = runtime.execute(plan_of("B1:2", B={"token_ids": [int(first)]}), greedy(1)).result().token_ids
    runtime.execute(plan_of("A0:4 B0:1"), greedy(2))
    for step in ("B1:2 C0:1", "A4:5 C0:1"):
        with pytest.raises(ValueError, match="request C: the step before sampled no token for it"):
            runtime.execute(plan_of(step, A=fed, B=fed, C=fed), greedy(2))
    with pytest.raises(ValueError, match="request A: token ids must be in"):
        runtime.execute(plan_of("A4:6", A={"token_ids": [IN_FLIGHT, IN_FLIGHT]}), greedy(1))
    found = runtime.execute(plan_of("B1:2", B=fed), greedy(1)).result().token_ids
    assert found.tolist() == expected.tolist()
    known = plan_of("B2:3 D0:1")
    with pytest.raises(ValueError, match="request D: the step before sampled no token for it"):
        runtime.execute(plan_of("B2:3 D0:1", D=fed), greedy(2))
    after_refusal = runtime.execute(known, greedy(2)).result(), runtime._logits(2).clone()
    runtime.execute(plan_of("C0:3-"), greedy(0))
    again = runtime.execute(known, greedy(2)).result(), runtime._logits(2).clone()
    assert after_refusal[0].token_ids.tolist() == again[0].token_ids.tolist()
    assert torch.equal(after_refusal[1], again[1])
    runtime.execute(plan_of("C0:3-"), greedy(0))
    with pytest.raises(ValueError, match="request B: the step before sampled no token for it"):
        runtime.execute(plan_of("B2:3", B=fed), greedy(1))  # the one before that did


def test_results_stay_as_they_were() -> None:
    """Though the memory that tokens arrive in is used again two steps later; a result may be asked for twice."""
    runtime, steps = _fresh(), []
    for plan in (plan_of("A0:3 B0:4"), plan_of("A3:4 B4:5"), plan_of("D0:1"), plan_of("D1:2")):
        steps.append(runtime.execute(plan, greedy(len(plan.slices))))
        if len(steps) == 1:
            early = steps[0].result()
            kept = early.token_ids.copy()
    assert early.token_ids.tolist() == kept.tolist()
    assert steps[0].result().token_ids.tolist() == kept.tolist()


@pytest.mark.parametrize(
    ("step", "rows", "message"),
    [
        ("A0:23 B0:1", 2, "24 tokens exceed the 23 this runtime was sized for"),
        ("A0:1 B0:1 C0:1 D0:1 E0:1 a0:1", 6, "6 sequences exceed the 5 this runtime was sized for"),
        ("A0:3 B0:2-", 2, "expected 1 sampling rows, found 2"),
    ],
)
def test_steps_beyond_what_the_runtime_was_sized_for(step: str, rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _shared().execute(plan_of(step), greedy(rows))


# -- graphs --------------------------------------------------------------------------------------------------------


def _executions(runtime: EmulatedRuntime, *steps: str) -> list[str]:
    return [runtime.execute(plan_of(s), greedy(len(s.split()) - s.count("-"))).result().execution for s in steps]


def _equal(found: list[Row], expected: list[Row]) -> bool:
    return all(torch.equal(a.logits, b.logits) and a.token == b.token for a, b in zip(found, expected, strict=True))


def test_eager_steps_give_the_same_bits() -> None:
    steps = ("A0:4", "A4:5", "A5:6 B0:1", "A6:7 B1:2-")
    assert _executions(_shared(), *steps) == ["eager", "graph", "graph", "eager"]
    captured = play(_fresh())
    eager = _runtime(enforce_eager=True)
    assert _executions(eager, *steps) == ["eager"] * 4
    assert not eager._graphs
    poison_cache(eager)
    assert _equal(play(eager), captured)


@pytest.mark.slow
def test_rows_that_pad_a_step_of_a_mixture_do_no_harm() -> None:
    """Three sequences run as four: whatever lies in the fourth row is routed, to experts that there are."""
    graph, weights = tiny_model(MIXTURES["glm4_moe"], QuantScheme(4, 32, symmetric=True), CUDA_PASSES)
    plans = ("A0:4 B0:3 D0:1", "A4:5 B3:4 D1:2", "A5:6 B4:5 D2:3")
    found = []
    for eager in (False, True):
        runtime = emulated_runtime(graph, weights, "float16", **SIZES, enforce_eager=eager)
        poison_cache(runtime)
        found.append(play(runtime, plans))
        kinds = _executions(runtime, "A6:7 B5:6 D3:4")
        assert kinds == ["eager" if eager else "graph"]
    assert _equal(*found)
    assert all(row.logits.isfinite().all() for row in found[0])


@pytest.mark.parametrize("eager", [False, True])
def test_experts_that_a_step_reads_are_counted(eager: bool) -> None:
    """Of three alike sequences, run as four, those of one; of a prompt more, and those of no layer twice."""
    graph, weights = tiny_model(MIXTURES["qwen3_moe"], None, CUDA_PASSES)
    runtime = emulated_runtime(graph, weights, "float16", num_blocks=12, enforce_eager=eager)
    alike = StepPlan(tuple(SequenceSlice(str(i), (7,), 0, (i,), True) for i in range(3)))
    routes = [op.outputs[0] for op in graph.ops if op.kind == "route"]
    assert runtime.chosen_experts(alike, greedy(3)) == dict.fromkeys(routes, 2)
    prompt = StepPlan((SequenceSlice("p", tuple(range(3, 16)), 0, (0,), True),))
    met = runtime.chosen_experts(prompt, greedy(1))
    assert list(met) == routes
    assert all(2 < count <= 6 for count in met.values())
    products = {op.weights[0]: 3 for op in graph.products()}
    share = experts_read(graph, Storage(products, frozenset(), lambda _: 0), runtime, alike, greedy(3))
    assert share == pytest.approx(2 / 6)


def test_longer_contexts_are_captured_when_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs for a block of context at first; splits of a block, so that wider tables mean more splits too."""
    expected = play(_fresh())
    monkeypatch.setattr(buckets, "GRAPH_CONTEXT", 16)
    monkeypatch.setattr(buckets, "_GROWTH", 2)
    for module in (cuda_ops, cuda_buffers):
        monkeypatch.setattr(module, "DECODE_SPLIT", 16)
    runtime = _runtime()
    assert set(runtime._graphs) == {(bucket, 1) for bucket in (1, 2, 4, 5)}
    found = play(runtime)
    assert set(runtime._graphs) == {(bucket, 1) for bucket in (1, 2, 4, 5)} | {(4, 4), (5, 4)}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=0.02, rtol=0)
        assert a.token == b.token
    assert _executions(runtime, "A38:39 B6:7") == ["graph"]
    assert (2, 4) in runtime._graphs


def test_more_sequences_than_tokens() -> None:
    """A step has no more sequences than tokens, whatever the runtime is told that there may be."""
    graph, weights = tiny_model(FAMILIES["llama"], None, CUDA_PASSES)
    runtime = emulated_runtime(graph, weights, "float16", **{**SIZES, "max_num_batched_tokens": 3})
    rows = play(runtime, ("B0:3", "A0:1 B3:4 D0:1"))
    assert len(rows) == 4 + 6
    with pytest.raises(ValueError, match="4 tokens exceed the 3"):
        runtime.execute(plan_of("A0:1 B0:1 C0:1 D0:1"), greedy(4))
