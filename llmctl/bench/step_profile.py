"""``bench profile``: where a step's time goes on any target, against what the machine could do.

* decode at some batch sizes after ``context`` tokens, and one prefill: median step, microseconds by part, the bytes and
  multiply-adds that it cannot do without, and the share of each bound that was reached;
* decode of one sequence at growing contexts: the slope of its time, against the slope that the KV bytes predict.

The bounds are measured between the steps of the same run, and are medians as the steps are; how is the target's to say.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llmctl.artifact.builder import ensure_engine
from llmctl.artifact.loader import LoadedEngine, load_engine, read_manifest
from llmctl.artifact.request import EngineRequest
from llmctl.bench.config import BenchProfileConfig
from llmctl.bench.environment import describe_environment
from llmctl.bench.outcome import SCHEMA_VERSION, timestamp
from llmctl.checkpoint.resolve import cache_dir
from llmctl.engine.step import SamplingBatch, SequenceSlice, StepPlan
from llmctl.errors import EngineLoadError, UsageError
from llmctl.targets.base import ProfilePlaces
from llmctl.targets.step_work import Bounds, Span, StepProfiler, Work

PARTS = ("decode", "prefill", "growth")
_PREFILL, _CONTEXTS = 512, (512, 1024, 2048, 4096, 8192)
_WARM_SECONDS = 0.05  # measured on a CPU at batch 1: 3.8 ms right after the probes, 2.4 from the tenth step on
_FILL = 512
"""Tokens of a step that fills the cache, where no prefill is measured."""


@dataclass(frozen=True)
class Profile:
    """One kind of step; times in microseconds, medians over the steps.

    Attributes:
        tokens: computed by the step. context: longest sequence after it, tokens.
        step: one ``execute`` call until its result, with its quartiles. parts: time by part (kind of op, or kernel).
        other: what is in no part. bounds: measured meanwhile; bound: the least time by each, microseconds.
    """

    name: str
    tokens: int
    context: int
    step: float
    quartiles: tuple[float, float]
    parts: dict[str, float]
    other: float
    work: Work
    bounds: Bounds
    bound: dict[str, float]


@dataclass
class Samples:
    """Raw measurements of one kind of step."""

    work: Work
    times: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    bounds: list[Bounds] = field(default_factory=list)

    def profile(self, name: str, spans: Sequence[Span]) -> Profile:
        """Their medians."""
        kinds = dict.fromkeys(kind for parts in self.parts for kind in parts)
        parts = {kind: median(p.get(kind, 0.0) for p in self.parts) for kind in kinds}
        bounds = Bounds(
            median(b.read for b in self.bounds),
            _median([b.int_macs for b in self.bounds]),
            _median([b.float_macs for b in self.bounds]),
        )
        return Profile(
            name,
            tokens=sum(added for _, added in spans),
            context=max(before + added for before, added in spans),
            step=median(self.times),
            quartiles=(float(np.percentile(self.times, 25)), float(np.percentile(self.times, 75))),
            parts=dict(sorted(parts.items(), key=lambda item: -item[1])),
            other=median(t - sum(p.values()) for t, p in zip(self.times, self.parts, strict=True)),
            work=self.work,
            bounds=bounds,
            bound=bounds.microseconds(self.work),
        )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


class StepBench:
    """A profiler with steps to run; keeps nothing between them but the KV cache."""

    def __init__(
        self, profiler: StepProfiler, *, step_tokens: int, steps: int, done: Callable[[str], None] = lambda _: None
    ) -> None:
        self.profiler, self._step_tokens, self._steps, self._done = profiler, step_tokens, steps, done
        self._random = np.random.default_rng(0)

    def decode(self, batch: int, context: int) -> Profile:
        """One token for each of so many sequences, ``context`` tokens long after it."""
        self._fill(batch, context)
        return self._measure({f"decode, batch {batch}": [(context - 1, 1)] * batch})[0]

    def contexts(self, contexts: Sequence[int]) -> list[Profile]:
        """Decode of one sequence at each context, in turns: a slow spell of the machine meets all of them."""
        self._fill(1, max(contexts))
        return self._measure({f"context {context}": [(context - 1, 1)] for context in contexts})

    def prefill(self, tokens: int) -> Profile:
        """One prompt in one step."""
        return self._measure({f"prefill of {tokens}": [(0, tokens)]})[0]

    def _fill(self, batch: int, context: int) -> None:
        """Prefill: a cache of never-written pages would be read from one page of zeros."""
        most = max(1, self._step_tokens // batch)
        for start in range(0, context - 1, most):
            self.profiler.step(*self.plan([(start, min(most, context - 1 - start))] * batch))

    def _measure(self, cases: Mapping[str, Sequence[Span]]) -> list[Profile]:
        """Time each of the steps in turns, over and over, with the bounds in between."""
        plans = [self.plan(spans) for spans in cases.values()]
        profiles = [
            Samples(self.profiler.work(spans, *plan)) for spans, plan in zip(cases.values(), plans, strict=True)
        ]
        for i in range(self._steps):
            for (plan, sampling), samples in zip(plans, profiles, strict=True):
                if i % max(1, self._steps // 5) == 0:
                    samples.bounds.append(self.profiler.bounds(samples.work))
                    self._warm_up(plan, sampling)
                microseconds, parts = self.profiler.step(plan, sampling)
                samples.times.append(microseconds)
                samples.parts.append(parts)
        found = [s.profile(name, spans) for s, (name, spans) in zip(profiles, cases.items(), strict=True)]
        for one in found:
            self._done(f"{one.name}: {one.step:,.0f} us, {100 * max(one.bound.values()) / one.step:.0f}% of the bound")
        return found

    def _warm_up(self, plan: StepPlan, sampling: SamplingBatch) -> None:
        """Steps until the caches hold what a server's steps find there: the probes' own buffers displaced it."""
        end = time.perf_counter() + _WARM_SECONDS
        self.profiler.step(plan, sampling)
        while time.perf_counter() < end:
            self.profiler.step(plan, sampling)

    def plan(self, spans: Sequence[Span]) -> tuple[StepPlan, SamplingBatch]:
        """Random tokens; every sequence has an equal share of the blocks."""
        limits, rows = self.profiler.runtime.limits, len(spans)
        share = limits.num_blocks // rows
        slices = []
        for i, (before, added) in enumerate(spans):
            ids = [int(t) for t in self._random.integers(0, limits.vocab_size, added)]
            blocks = range(i * share, i * share + -(-(before + added) // limits.block_size))
            assert len(blocks) <= share, "no two sequences write the same block"
            slices.append(SequenceSlice(str(i), ids, before, blocks, sample=True))
        ends = np.array([before + added for before, added in spans], np.int64)
        return StepPlan(tuple(slices)), SamplingBatch(np.zeros(rows, np.float32), np.zeros(rows, np.uint64), ends)


@dataclass(frozen=True)
class Growth:
    """A straight line through the decode times of one sequence over its context; microseconds a token of context.

    Attributes:
        step, attention: slopes measured, of the whole step and of parts whose name has "attention" in it.
        predicted: KV bytes a token at the read bandwidth of the longest context. bound: slope of the read bound,
            weights included, every context at the bandwidth of its own bytes (what no longer fits a cache is read more
            slowly). worst: largest distance of a point from the line, as a share of it.
    """

    step: float
    attention: float
    predicted: float
    bound: float
    worst: float


def growth(points: Sequence[Profile]) -> Growth:
    """The least-squares line through two or more contexts."""
    contexts = np.array([p.context for p in points], np.float64)
    times = np.array([p.step for p in points])
    slope, base = np.polyfit(contexts, times, 1)
    attention = np.polyfit(contexts, [attention_time(p) for p in points], 1)[0]
    kv_per_token = (points[-1].work.kv_bytes - points[0].work.kv_bytes) / (contexts[-1] - contexts[0])
    predicted = kv_per_token / points[-1].bounds.read * 1e6
    bound = np.polyfit(contexts, [p.bound["read"] for p in points], 1)[0]
    worst = float(np.max(np.abs(times - (base + slope * contexts)) / times))
    return Growth(float(slope), float(attention), float(predicted), float(bound), worst)


def attention_time(profile: Profile) -> float:
    """Microseconds in parts that are attention by their name."""
    return sum(time for name, time in profile.parts.items() if "attention" in name)


@dataclass(frozen=True)
class Need:
    """What the engine must hold for the parts that are asked for.

    Attributes:
        length: longest sequence, tokens. step_tokens: largest step. sequences: at once. each: tokens of every one of
            those; 0: no batch is run.
    """

    length: int
    step_tokens: int
    sequences: int
    each: int

    def blocks(self, block_size: int) -> int:
        """Blocks of KV cache: every sequence of a batch has whole ones of its own."""
        return max(-(-self.length // block_size), self.sequences * -(-self.each // block_size))


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, checked: some of ``PARTS``, batches and context of decode, the prompt, contexts."""

    only: tuple[str, ...]
    batches: tuple[int, ...]
    context: int
    prefill: int
    contexts: tuple[int, ...]

    @classmethod
    def of(cls, config: BenchProfileConfig, longest: int) -> Wanted:
        """Out of the options, for an engine that takes sequences of ``longest`` tokens.

        Raises:
            UsageError: an unknown part, a number that is not whole or below 1, or more than the engine takes.
        """
        only = tuple(part.strip() for part in config.only.split(","))
        for part in only:
            if part not in PARTS:
                raise UsageError(f"--only: unknown '{part}': expected some of {', '.join(PARTS)}", param="only")
        for name in ("context", "prefill", "steps"):
            value = getattr(config, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name}: expected at least 1, found {value}", param=name)
        contexts = _numbers(config.contexts, "contexts") if config.contexts is not None else _CONTEXTS
        if config.contexts is None:
            contexts = tuple(n for n in contexts if n <= longest) or (longest,)
        prefill = min(_PREFILL, longest) if config.prefill is None else config.prefill
        found = cls(only, _numbers(config.batches, "batches"), config.context, prefill, contexts)
        sizes = {"decode": (config.context,), "prefill": (prefill,), "growth": contexts}
        names = {"decode": "context", "prefill": "prefill", "growth": "contexts"}
        for part in only:
            if max(sizes[part]) > longest:
                raise UsageError(
                    f"--{names[part]} {max(sizes[part])}: the engine takes {longest} tokens", param=names[part]
                )
        return found

    @property
    def need(self) -> Need:
        """By the parts and the sizes."""
        lengths: list[int] = []
        step_tokens, sequences = _FILL, 1
        if "decode" in self.only:
            lengths.append(self.context)
            sequences = max(self.batches)
        if "prefill" in self.only:
            lengths.append(self.prefill)
            step_tokens = self.prefill
        if "growth" in self.only:
            lengths += self.contexts
        each = self.context if "decode" in self.only else 0
        return Need(max(lengths), max(step_tokens, sequences), sequences, each)


def _numbers(text: str, param: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise UsageError(f"--{param} '{text}': expected whole numbers of at least 1 such as 1,8,32", param=param)
    return tuple(int(part) for part in parts)


def run_profile(config: BenchProfileConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    """All that is asked for, as JSON data; ``tell`` is given a line for each step measured.

    Raises:
        UsageError: options that cannot be honoured.
        LlmctlError: whatever resolving, building or loading refuses; no memory for the KV cache that is needed.
        KeyboardInterrupt: before any step was measured; later it ends the run, and ``interrupted`` says so.
    """
    Wanted.of(config, sys.maxsize)  # what any engine would refuse, before one is built
    if not config.model:
        raise UsageError("--model: expected an engine, a checkpoint or demo:smollm2-135m", param="model")
    environment = describe_environment()
    with tempfile.TemporaryDirectory(prefix="llmctl-profile-") as scratch:
        path = ensure_engine(config.model, config)
        longest = read_manifest(path).options.max_model_len
        wanted = Wanted.of(config, min(longest, config.max_model_len or longest))
        engine = _loaded(path, config, wanted.need)
        places = ProfilePlaces(Path(scratch), cache_dir() / "kernels")
        profiler = engine.target.open_profiler(engine, places, config.threads, from_source=config.from_source)
        try:
            found = _measured(profiler, wanted, config.steps, engine, tell)
        finally:
            profiler.close()
    return {
        "date": timestamp(),
        "schema_version": SCHEMA_VERSION,
        "kind": "profile",
        "model_id": config.model,
        "target": str(engine.manifest.target),
        "dtype": engine.manifest.options.dtype,
        "quantization": engine.manifest.quantization.method,
        "kv_cache_dtype": engine.options.kv_cache_dtype,
        **found,
        "environment": environment,
    }


def _loaded(path: Path, config: BenchProfileConfig, need: Need) -> LoadedEngine:
    request = replace(
        EngineRequest.of(config),
        max_model_len=need.length,
        max_num_batched_tokens=need.step_tokens,
        max_num_seqs=need.sequences,
        whole_context=True,
    )
    engine = load_engine(path, request, kernels=not config.from_source)
    size = engine.plan.block_size
    if engine.plan.num_blocks < (blocks := need.blocks(size)):
        room = f"room for {engine.plan.num_blocks * size}"
        raise EngineLoadError(f"no memory for a KV cache of {blocks * size} tokens (blocks of {size}), {room}")
    return engine


def _measured(
    profiler: StepProfiler, wanted: Wanted, steps: int, engine: LoadedEngine, tell: Callable[[str], None]
) -> dict[str, Any]:
    bench = StepBench(profiler, step_tokens=engine.sizes.max_num_batched_tokens, steps=steps, done=tell)
    big = profiler.big_read()
    found: list[Profile] = []
    points: list[Profile] = []
    interrupted = False
    try:
        if "decode" in wanted.only:
            for batch in wanted.batches:
                found.append(bench.decode(batch, wanted.context))
        if "prefill" in wanted.only:
            found.append(bench.prefill(wanted.prefill))
        if "growth" in wanted.only:
            points = bench.contexts(wanted.contexts)
    except KeyboardInterrupt:
        if not found:
            raise
        interrupted = True
    line = growth(points) if len(points) > 1 else None
    return {
        **profiler.facts,
        "parts": profiler.parts,
        "read_beyond_caches": big,
        "steps": [asdict(p) for p in found],
        "contexts": [asdict(p) for p in points],
        "growth": asdict(line) if line else None,
        "interrupted": interrupted,
    }
