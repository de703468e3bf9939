#!/usr/bin/env python3
"""Where a step of a cpu engine spends its time, against what the machine could do: Markdown tables, and JSON.

    python scripts/profile_cpu.py --engine ./engine --threads 2
    python scripts/profile_cpu.py --engine ./engine --only decode --from-source     # while changing the kernels

* decode at batch 1, 8, 32 after ``--context`` tokens, and one prefill: median step, microseconds per kind of op,
  bytes of weights and KV cache read, integer multiply-adds, and the share of each bound that was reached;
* decode of one sequence at growing contexts: the slope of its time, against the slope that the KV bytes predict.

The bounds are measured between the steps of the same run, and are medians as the steps are: bytes a second of loops
that only read (a buffer as large as what the step reads, and one of 1 GiB), int8 multiply-adds a second of a loop on
registers. The loops are in native/probe.cpp, compiled as the engine's kernels are.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from md_table import print_table
from numpy.typing import NDArray

from llmctl.artifact.loader import LoadedEngine, load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.checkpoint.resolve import cache_dir
from llmctl.engine.step import SamplingBatch, SequenceSlice, StepPlan
from llmctl.errors import EngineLoadError, LlmctlError
from llmctl.graph.dtypes import DTYPES
from llmctl.graph.experts import multiplications
from llmctl.graph.graph import PRODUCTS, Graph
from llmctl.targets.cpu.layout import PackedLinear, kv_layer_bytes
from llmctl.targets.cpu.packing import engine_weights
from llmctl.targets.cpu.runtime import CpuRuntime
from llmctl.targets.cpu.target import CpuTarget
from llmctl.targets.cpu.toolchain import VARIANTS, Variant, compile_library, library_name

PARTS = ("decode", "prefill", "growth")
Span = tuple[int, int]
"""Tokens of a sequence before a step, and tokens that the step adds."""
_PROBES = Path(__file__).resolve().parent / "native" / "probe.cpp"
_BIG = 2**30
_WARM_SECONDS = 0.05  # measured at batch 1: 3.8 ms right after the probes, 2.4 from the tenth step on
_INT8_ROUNDS = 1 << 17
_FILL = 512
"""Tokens of a step that fills the cache, where no prefill is measured."""


@dataclass(frozen=True)
class Work:
    """What one step must do at least.

    Attributes:
        weight_bytes: weights read once. kv_bytes: keys and values read.
        int_macs: multiply-adds of linears with integer weights and of attention over an int8 cache.
        float_macs: the others.
    """

    weight_bytes: int
    kv_bytes: int
    int_macs: int
    float_macs: int

    @property
    def bytes(self) -> int:
        """Everything read."""
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True)
class Profile:
    """One kind of step; times in microseconds, medians over the steps.

    Attributes:
        tokens: computed by the step. context: longest sequence after it, tokens.
        step: one ``execute`` call, with its quartiles. ops: time by op kind, as the first thread saw it.
        other: sampling and Python.
        read, int8: the bounds measured meanwhile: bytes and multiply-adds a second.
    """

    name: str
    tokens: int
    context: int
    step: float
    quartiles: tuple[float, float]
    ops: dict[str, float]
    other: float
    work: Work
    read: float
    int8: float

    @property
    def read_bound(self) -> float:
        """Microseconds that reading takes."""
        return self.work.bytes / self.read * 1e6

    @property
    def int8_bound(self) -> float:
        """Microseconds that the integer multiply-adds take."""
        return self.work.int_macs / self.int8 * 1e6


def step_work(
    graph: Graph, linears: dict[str, PackedLinear], kv_dtype: str, spans: Sequence[Span], experts: float = 1.0
) -> Work:
    """The least work of a step of sequences that add ``spans[i][1]`` tokens to ``spans[i][0]``; each samples once.

    Args:
        experts: share of the experts' weights that are of experts that some token chose.
    """
    tokens = sum(added for _, added in spans)
    weight_bytes = int_macs = float_macs = kv_bytes = 0
    on_rows = False
    for op in graph.ops:
        on_rows = on_rows or op.kind == "gather_rows"
        if op.kind in PRODUCTS:
            packed = linears[op.weights[0]]
            stored = sum(a.nbytes for a in (packed.data, packed.scales, packed.zeros) if a is not None)
            weight_bytes += stored if op.kind == "linear" else round(experts * stored)
            macs = multiplications(graph, op) * (len(spans) if on_rows else tokens)
            if packed.integer:
                int_macs += macs
            else:
                float_macs += macs
        elif op.kind == "attention":
            layer, window = graph.kv[int(op.attrs["layer"])], int(op.attrs.get("window", 0))
            for before, added in spans:
                first = max(0, before + 1 - window) if window else 0
                kv_bytes += (before + added - first) * kv_layer_bytes(layer, DTYPES[kv_dtype].tag)
                seen = [min(before + i + 1, window or before + i + 1) for i in range(added)]
                macs = 2 * sum(seen) * int(op.attrs["heads"]) * layer.head_dim
                if kv_dtype == "int8":
                    int_macs += macs
                else:
                    float_macs += macs
    return Work(weight_bytes, kv_bytes, int_macs, float_macs)


@dataclass
class Samples:
    """Raw measurements of one kind of step: microseconds, bytes a second, multiply-adds a second."""

    work: Work
    times: list[float] = field(default_factory=list)
    kinds: list[dict[str, float]] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def profile(self, name: str, spans: Sequence[Span]) -> Profile:
        """Their medians."""
        ops = {kind: median(k.get(kind, 0.0) for k in self.kinds) for kind in self.kinds[0]}
        return Profile(
            name,
            tokens=sum(added for _, added in spans),
            context=max(before + added for before, added in spans),
            step=median(self.times),
            quartiles=(float(np.percentile(self.times, 25)), float(np.percentile(self.times, 75))),
            ops=dict(sorted(ops.items(), key=lambda item: -item[1])),
            other=median(t - sum(k.values()) for t, k in zip(self.times, self.kinds, strict=True)),
            work=self.work,
            read=median(self.reads),
            int8=median(self.peaks),
        )


class Probes:
    """The machine's limits, measured by loops compiled for the engine's variant."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._read, self._int8 = library.probe_read, library.probe_int8
        self._read.restype = self._int8.restype = ctypes.c_double
        self._read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
        self._int8.argtypes = (ctypes.c_int64, ctypes.c_int)
        self._threads = threads
        self._buffer: NDArray[np.uint8] = np.zeros(0, np.uint8)

    def read(self, size: int) -> float:
        """Bytes a second of one pass over ``size`` bytes: the best of 1, 2, 4 and 8 streams a thread."""
        if self._buffer.nbytes < size:
            self._buffer = np.ones(size, np.uint8)
        address = self._buffer.ctypes.data
        return max(float(self._read(address, size, self._threads, streams)) for streams in (1, 2, 4, 8))

    def int8(self) -> float:
        """int8 multiply-adds a second."""
        return float(self._int8(_INT8_ROUNDS, self._threads))


class Bench:
    """A runtime with its probes; measures steps and keeps nothing between them but the KV cache."""

    def __init__(self, engine: LoadedEngine, runtime: CpuRuntime, probes: Probes, *, steps: int) -> None:
        self.engine, self.runtime, self.probes, self.steps = engine, runtime, probes, steps
        self.linears = dict(engine_weights(engine.graph, engine.options, engine.weights).linears)
        self.kv_dtype = engine.manifest.options.kv_cache_dtype
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
        most = max(1, self.engine.sizes.max_num_batched_tokens // batch)
        for start in range(0, context - 1, most):
            self.runtime.execute(*self._plan([(start, min(most, context - 1 - start))] * batch))

    def _measure(self, cases: Mapping[str, Sequence[Span]]) -> list[Profile]:
        """Time each of the steps in turns, over and over, with the probes in between."""
        plans = [self._plan(spans) for spans in cases.values()]
        profiles = [
            Samples(step_work(self.engine.graph, self.linears, self.kv_dtype, spans, self._experts_read(*plan)))
            for spans, plan in zip(cases.values(), plans, strict=True)
        ]
        for i in range(self.steps):
            for (plan, sampling), samples in zip(plans, profiles, strict=True):
                if i % max(1, self.steps // 5) == 0:
                    samples.reads.append(self.probes.read(samples.work.bytes))
                    samples.peaks.append(self.probes.int8())
                    self._warm_up(plan, sampling)
                self.runtime.profile()
                start = time.perf_counter()
                self.runtime.execute(plan, sampling)
                samples.times.append((time.perf_counter() - start) * 1e6)
                samples.kinds.append(self.runtime.profile())
        return [s.profile(name, spans) for s, (name, spans) in zip(profiles, cases.items(), strict=True)]

    def _experts_read(self, plan: StepPlan, sampling: SamplingBatch) -> float:
        """The share of the experts' weights that a step reads, as the kernels count."""
        sizes = dict.fromkeys(PRODUCTS, 0)
        for op in self.engine.graph.products():
            sizes[op.kind] += self.linears[op.weights[0]].data.nbytes
        if not sizes["grouped_linear"]:
            return 1.0
        self.runtime.weight_bytes()
        self.runtime.execute(plan, sampling)
        return (self.runtime.weight_bytes() - sizes["linear"]) / sizes["grouped_linear"]

    def _warm_up(self, plan: StepPlan, sampling: SamplingBatch) -> None:
        """Steps until the caches hold what a server's steps find there: the probes' own buffers displaced it."""
        end = time.perf_counter() + _WARM_SECONDS
        self.runtime.execute(plan, sampling)
        while time.perf_counter() < end:
            self.runtime.execute(plan, sampling)

    def _plan(self, spans: Sequence[Span]) -> tuple[StepPlan, SamplingBatch]:
        """Random tokens; every sequence has an equal share of the blocks."""
        limits, rows = self.runtime.limits, len(spans)
        share = limits.num_blocks // rows
        slices = []
        for i, (before, added) in enumerate(spans):
            ids = [int(t) for t in self._random.integers(0, limits.vocab_size, added)]
            blocks = range(i * share, i * share + -(-(before + added) // limits.block_size))
            slices.append(SequenceSlice(str(i), ids, before, blocks, sample=True))
        ends = np.array([before + added for before, added in spans], np.int64)
        return StepPlan(tuple(slices)), SamplingBatch(np.zeros(rows, np.float32), np.zeros(rows, np.uint64), ends)


@dataclass(frozen=True)
class Growth:
    """A straight line through the decode times of one sequence over its context; microseconds a token of context.

    Attributes:
        step, attention: slopes measured, of the whole step and of its attention. predicted: KV bytes a token at the
            read bandwidth of the longest context. bound: slope of the read bound, weights included, every context at
            the bandwidth of its own bytes (what no longer fits a cache is read more slowly). worst: largest distance of
            a point from the line, as a share of it.
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
    attention = np.polyfit(contexts, [p.ops.get("attention", 0.0) for p in points], 1)[0]
    kv_per_token = (points[-1].work.kv_bytes - points[0].work.kv_bytes) / (contexts[-1] - contexts[0])
    predicted = kv_per_token / points[-1].read * 1e6
    bound = np.polyfit(contexts, [p.read_bound for p in points], 1)[0]
    worst = float(np.max(np.abs(times - (base + slope * contexts)) / times))
    return Growth(float(slope), float(attention), float(predicted), float(bound), worst)


@dataclass(frozen=True)
class Need:
    """What the engine must hold for the parts that are asked for.

    Attributes:
        length: longest sequence, tokens. step_tokens: largest step. sequences: at once. cache: tokens of KV cache.
    """

    length: int
    step_tokens: int
    sequences: int
    cache: int


def needed(args: argparse.Namespace) -> Need:
    """By ``--only`` and the sizes; every sequence of a batch has whole blocks of its own."""
    lengths: list[int] = []
    step_tokens, sequences = _FILL, 1
    if "decode" in args.only:
        lengths.append(args.context)
        sequences = max(args.batches)
    if "prefill" in args.only:
        lengths.append(args.prefill)
        step_tokens = args.prefill
    if "growth" in args.only:
        lengths += args.contexts
    length = max(lengths)
    longest, context = (-(-tokens // 16) * 16 for tokens in (length, args.context))
    decode = context * sequences if "decode" in args.only else 0
    return Need(length, max(step_tokens, sequences), sequences, max(longest, decode))


def open_engine(args: argparse.Namespace, scratch: Path) -> Bench:
    """The engine on its own kernels, or (``--from-source``) on this checkout's, compiled into ``scratch``."""
    need = needed(args)
    request = EngineRequest(
        max_model_len=need.length, max_num_batched_tokens=need.step_tokens, max_num_seqs=need.sequences
    )
    engine = load_engine(args.engine, request, kernels=not args.from_source)
    if not isinstance(engine.target, CpuTarget):
        raise EngineLoadError(f"{args.engine}: expected a cpu engine, found {engine.manifest.target}")
    if engine.plan.kv_tokens < need.cache:
        raise EngineLoadError(f"no memory for a KV cache of {need.cache} tokens, room for {engine.plan.kv_tokens}")
    variant = next(v for v in VARIANTS if library_name(v) == engine.target.library(engine.path).stem)
    if args.from_source:
        compiled = compile_library(variant, cache=cache_dir() / "kernels")
        (scratch / "kernels").mkdir()
        (scratch / "kernels" / compiled.filename).write_bytes(compiled.code)
        engine = replace(engine, path=scratch)
    runtime = open_runtime(engine, threads=args.threads)
    assert isinstance(runtime, CpuRuntime)
    return Bench(engine, runtime, Probes(compile_probes(variant, scratch), runtime.threads), steps=args.steps)


def compile_probes(variant: Variant, scratch: Path) -> ctypes.CDLL:
    """The probes' library, compiled with a variant's flags into ``scratch``."""
    path = scratch / "probe.so"
    path.write_bytes(compile_library(variant, cache=cache_dir() / "kernels", source=_PROBES).code)
    return ctypes.CDLL(str(path))


def run(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All that was asked for, printed as it comes; the result as JSON data."""
    bench = open_engine(args, scratch)
    big = bench.probes.read(_BIG)
    print(
        f"{bench.runtime.variant}, {bench.runtime.threads} threads; read {big / 1e9:.1f} GB/s over 1 GiB, "
        f"int8 dot products {bench.probes.int8() / 1e9:.0f} GMAC/s\n"
    )
    steps: list[Profile] = []
    if "decode" in args.only:
        steps += [bench.decode(batch, args.context) for batch in args.batches]
    if "prefill" in args.only:
        steps.append(bench.prefill(args.prefill))
    if steps:
        print_steps(steps)
    points = bench.contexts(args.contexts) if "growth" in args.only else []
    line = growth(points) if len(points) > 1 else None
    if line is not None:
        print_growth(points, line)
    bench.runtime.close()
    return {
        "variant": bench.runtime.variant,
        "threads": bench.runtime.threads,
        "read_1gib": big,
        "steps": [asdict(p) for p in steps],
        "contexts": [asdict(p) for p in points],
        "growth": asdict(line) if line else None,
    }


def print_steps(steps: Sequence[Profile]) -> None:
    """Two tables: steps against their bounds, and microseconds by kind of op."""
    columns: dict[str, Callable[[Profile], str]] = {
        "step, µs (quartiles)": lambda p: f"{p.step:,.0f} ({p.quartiles[0]:,.0f}–{p.quartiles[1]:,.0f})",
        "tokens/s": lambda p: f"{p.tokens / p.step * 1e6:,.0f}",
        "weights + KV, MB": lambda p: f"{p.work.weight_bytes / 1e6:.1f} + {p.work.kv_bytes / 1e6:.1f}",
        "MB a token": lambda p: f"{p.work.bytes / p.tokens / 1e6:.1f}",
        "read, GB/s": lambda p: f"{p.read / 1e9:.1f}",
        "% of read bound": lambda p: f"{100 * p.read_bound / p.step:.0f}",
        "int8 + float GMAC": lambda p: f"{p.work.int_macs / 1e9:.2f} + {p.work.float_macs / 1e9:.2f}",
        "int8, GMAC/s": lambda p: f"{p.int8 / 1e9:.0f}",
        "% of int8 bound": lambda p: f"{100 * p.int8_bound / p.step:.0f}",
    }
    print_table(["", *columns], [[p.name, *(show(p) for show in columns.values())] for p in steps])
    kinds = sorted({k for p in steps for k in p.ops}, key=lambda k: -max(p.ops.get(k, 0) / p.step for p in steps))
    rows = [[kind, *(share(p, p.ops.get(kind, 0.0)) for p in steps)] for kind in kinds]
    rows.append(["sampling, Python", *(share(p, p.other) for p in steps)])
    print_table(["µs (share)", *(p.name for p in steps)], rows)


def share(profile: Profile, microseconds: float) -> str:
    """``1,234 (56%)``."""
    return f"{microseconds:,.0f} ({100 * microseconds / profile.step:.0f}%)"


def print_growth(points: Sequence[Profile], line: Growth) -> None:
    """The points and the line."""
    rows = [
        [f"{p.context}", f"{p.step:,.0f}", share(p, p.ops.get("attention", 0.0)), f"{p.work.kv_bytes / 1e6:.1f}",
         f"{p.read / 1e9:.1f}", f"{100 * p.read_bound / p.step:.0f}"]
        for p in points
    ]  # fmt: skip
    print_table(["context", "step, µs", "attention, µs", "KV, MB", "read, GB/s", "% of read bound"], rows)
    print(
        f"slope, µs per 1,000 tokens of context: step {1e3 * line.step:.0f}, its attention {1e3 * line.attention:.0f}, "
        f"predicted from KV bytes {1e3 * line.predicted:.0f} (ratio {line.step / line.predicted:.2f}), "
        f"of the read bound {1e3 * line.bound:.0f} (ratio {line.step / line.bound:.2f}); "
        f"no point is further than {100 * line.worst:.1f}% from the line"
    )


def main() -> int:
    """Run the profile; the process's exit code."""
    parser = _parser()
    args = parser.parse_args()
    if args.json and (args.json.is_dir() or not args.json.resolve().parent.is_dir()):
        parser.error(f"--json {args.json}: expected a file in a folder that exists")
    try:
        with tempfile.TemporaryDirectory(prefix="llmctl-profile-") as scratch:
            result = run(args, Path(scratch))
    except LlmctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number of at least 1")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _parts(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    for part in found:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown '{part}': expected some of {', '.join(PARTS)}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True, help="engine folder for a cpu target")
    parser.add_argument("--threads", type=_positive, default=None, help="native threads (default: physical cores)")
    parser.add_argument("--only", type=_parts, default=list(PARTS), help="of " + ",".join(PARTS))
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32], metavar="N,N", help="batch sizes of decode")
    parser.add_argument("--context", type=_positive, default=200, help="tokens of each sequence in decode")
    parser.add_argument("--prefill", type=_positive, default=512, help="tokens of the prompt")
    parser.add_argument("--contexts", type=_numbers, default=[512, 1024, 2048, 4096, 8192], help="of the growth table")
    parser.add_argument("--steps", type=_positive, default=50, help="timed steps of each kind")
    parser.add_argument("--from-source", action="store_true", help="compile this checkout's kernels and use those")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
