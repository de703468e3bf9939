#!/usr/bin/env python3
"""What the CPU kernels' integer arithmetic costs: perplexity and KL divergence against the same weights in float32.

    python scripts/cpu_quality.py --model demo-awq-4bit --text eval.txt --max-tokens 10240

Builds a quantized checkpoint for ``--target cpu`` once in float32 and once for each ``--lm-head``, and scores the text
with each. The linears' weights are the same codes everywhere; a head stored in int8 or int4 is compared with a float32
engine whose head holds the very values of those codes. Exits with 1 when a perplexity differs by more than ``--bound``.
Stdout holds the table and then one JSON document (only that with ``--json``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmctl.errors import ExitCode, LlmctlError, UsageError

if TYPE_CHECKING:
    from llmctl.artifact.loader import LoadedEngine
    from llmctl.engine.step import Runtime

_BATCH = 16  # rows whose whole distribution is fetched at once
HEADS = ("dense", "int8", "int4")


@dataclass(frozen=True)
class Row:
    """One way to run the model. exact: the same weights in float32; kl: nats a token, None when not asked for."""

    lm_head: str
    perplexity: float
    exact: float
    kl: float | None
    seconds: float

    @property
    def change(self) -> float:
        """Relative difference of perplexity."""
        return self.perplexity / self.exact - 1


def main() -> int:
    """Run the measurement; the process's exit code."""
    args = _parser().parse_args()
    try:
        text = Path(args.text).read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory(prefix="llmctl-cpu-quality-") as scratch:
            result = measure(args, text, Path(args.work or scratch))
    except LlmctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: {args.text}: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)
    if not args.json:
        print(table(result))
    print(json.dumps(result, indent=2))
    for line in result["violations"]:
        print(f"out of bounds: {line}", file=sys.stderr)
    return 1 if result["violations"] else 0


def measure(args: argparse.Namespace, text: str, work: Path) -> dict[str, Any]:
    """Build, score, compare; the result as JSON data.

    Raises:
        LlmctlError: no quantized checkpoint, no compiler, too little text.
    """
    from llmctl.checkpoint.opening import open_checkpoint
    from llmctl.checkpoint.resolve import resolve_model
    from llmctl.evaluate.perplexity import Protocol
    from llmctl.text.tokenizer import Tokenizer

    checkpoint = open_checkpoint(resolve_model(args.model))
    tokenizer = Tokenizer.from_files(checkpoint.aux_files(), where=str(checkpoint.path))
    tokens = tokenizer.encode(text, add_special_tokens=False)[: args.max_tokens]
    windows = Protocol(args.context, args.context).windows(tokens)
    bench = Bench(checkpoint.path, work, args.context, args.threads)
    kl_tokens = tokens[: min(args.kl_tokens, args.context)]
    rows = [measure_head(bench, head, windows, kl_tokens) for head in args.heads]
    return {
        "model": args.model,
        "kernels": bench.kernels,
        "text": Path(args.text).name,
        "tokens": len(tokens),
        "context": args.context,
        "kl_tokens": len(kl_tokens),
        "results": [{**asdict(row), "change": row.change} for row in rows],
        "violations": violations(rows, args.bound),
    }


def violations(rows: Sequence[Row], bound: float) -> list[str]:
    """Rows whose perplexity is off by more than ``bound`` (a fraction), one line each."""
    return [
        f"lm_head {row.lm_head}: perplexity {row.perplexity:.3f}, the same weights in float32 {row.exact:.3f} "
        f"({100 * row.change:+.2f}%, allowed {100 * bound:g}%)"
        for row in rows
        if not abs(row.change) <= bound
    ]


def table(result: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [
        f"{result['model']}: {result['kernels']}; {result['text']}: {result['tokens']} tokens, context "
        f"{result['context']}",
        f"{'lm_head':8} {'perplexity':>11} {'in float32':>11} {'change':>8} {'KL/token':>9} {'seconds':>8}",
    ]
    for row in result["results"]:
        kl = "-" if row["kl"] is None else f"{row['kl']:.5f}"
        lines.append(
            f"{row['lm_head']:8} {row['perplexity']:11.4f} {row['exact']:11.4f} {100 * row['change']:+7.2f}% {kl:>9} "
            f"{row['seconds']:8.1f}"
        )
    return "\n".join(lines)


def measure_head(bench: Bench, head: str, windows: list[tuple[list[int], int]], kl_tokens: list[int]) -> Row:
    """One row of the table."""
    began = time.monotonic()
    found: dict[str, tuple[float, np.ndarray | None]] = {}
    for name, engine in (("exact", bench.exact(head)), ("integer", bench.integer(head))):
        with bench.runtime(engine) as runtime:
            rows = log_probabilities(runtime, kl_tokens) if kl_tokens else None
            found[name] = (perplexity(runtime, windows, bench.context), rows)
    exact, integer = found["exact"], found["integer"]
    kl = None if exact[1] is None or integer[1] is None else divergence(exact[1], integer[1])
    row = Row(head, integer[0], exact[0], kl, time.monotonic() - began)
    print(f"{head}: {row.perplexity:.4f}, in float32 {row.exact:.4f}", file=sys.stderr, flush=True)
    return row


def perplexity(runtime: Runtime, windows: list[tuple[list[int], int]], context: int) -> float:
    """Perplexity of what a runtime runs, over the windows of a ``Protocol``."""
    from llmctl.engine.llm_engine import LLMEngine
    from llmctl.engine.scheduler_config import SchedulerConfig
    from llmctl.evaluate.perplexity import perplexity_of

    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=context, enable_prefix_caching=False)
    return perplexity_of(LLMEngine(runtime, config), windows)


def log_probabilities(runtime: Runtime, tokens: Sequence[int]) -> np.ndarray:
    """log p(next token) after every prefix of a text, f32 [T, V]: slices of one token each that share a block table."""
    from llmctl.engine.step import SamplingBatch, SequenceSlice, StepPlan

    vocab = runtime.limits.vocab_size
    blocks = range(-(-len(tokens) // runtime.limits.block_size))
    rows = np.empty((len(tokens), vocab), np.float32)
    for begin in range(0, len(tokens), _BATCH):
        end = min(begin + _BATCH, len(tokens))
        plan = StepPlan(tuple(SequenceSlice(str(p), [tokens[p]], p, blocks, True) for p in range(begin, end)))
        asked = SamplingBatch(
            np.zeros(end - begin, np.float32),
            np.zeros(end - begin, np.uint64),
            np.zeros(end - begin, np.int64),
            num_logprobs=np.full(end - begin, vocab, np.int32),
        )
        for row, entry in enumerate(runtime.execute(plan, asked).result().logprobs or (), begin):
            assert entry is not None
            rows[row, list(entry.top_ids)] = entry.top_logprobs
    return rows


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """Mean KL(exact || other) of log-probabilities [T, V], nats a token."""
    total = 0.0
    for p, q in zip(exact.astype(np.float64), other, strict=True):
        total += float(np.exp(p) @ (p - q))
    return total / len(exact)


class Bench:
    """Engines of one checkpoint, built when first asked for.

    Attributes:
        context: longest sequence, tokens. kernels: what the integer engine's linears run on, for the record.
    """

    def __init__(self, checkpoint: Path, work: Path, context: int, threads: int | None) -> None:
        self.context = context
        self.kernels = ""
        self._checkpoint, self._work, self._threads = checkpoint, work, threads
        self._built: set[Path] = set()

    def integer(self, head: str) -> LoadedEngine:
        """The bfloat16 engine with that output head."""
        engine = self._engine("bfloat16", head)
        kernels = {choice.kernel for choice in engine.manifest.kernels} & {"w4a8", "w8a8"}
        self.kernels = self.kernels or f"{'/'.join(sorted(kernels))} on {engine.manifest.target}"
        return engine

    def exact(self, head: str) -> LoadedEngine:
        """The float32 engine, its output head holding the values that ``head`` stores."""
        from llmctl.checkpoint.assemble import assemble
        from llmctl.checkpoint.opening import open_checkpoint
        from llmctl.checkpoint.quantized import QuantizedWeight
        from llmctl.targets.cpu.layout import pack_dense, quantize_symmetric
        from llmctl.targets.cpu.linear_format import to_planes
        from llmctl.targets.cpu.packing import LM_HEAD_BITS, linear_formats
        from llmctl.targets.planes import WeightPlane

        engine = self._engine("float32", "auto")
        graph = engine.graph
        name = graph.head
        if head not in LM_HEAD_BITS or graph.weights[name].quant is not None:
            return engine
        options = replace(engine.manifest.options, dtype="bfloat16", lm_head=head)
        group = linear_formats(graph, options)[name].group
        head_weight = assemble(graph.weights[name], open_checkpoint(self._checkpoint))
        assert not isinstance(head_weight, QuantizedWeight), "a dense head was checked"
        dense = head_weight.float().numpy()
        codes, scales = quantize_symmetric(dense, LM_HEAD_BITS[head], group)
        rows, columns = dense.shape
        zero = 1 << (LM_HEAD_BITS[head] - 1)
        steps = (codes.reshape(rows, scales.shape[1], -1).astype(np.float32) - zero) * scales[:, :, None]
        planes = to_planes(pack_dense(steps.reshape(rows, columns).astype(np.float32), "f32", gated=False))
        replaced = {f"{name}.{suffix}": WeightPlane("U8", array.shape, array) for suffix, array in planes.items()}
        return replace(engine, weights={**engine.weights, **replaced})

    @contextmanager
    def runtime(self, engine: LoadedEngine) -> Iterator[Runtime]:
        """The native runtime of an engine, closed at the end.

        Raises:
            UsageError: no native kernels here (no compiler).
        """
        from llmctl.artifact.start import open_runtime
        from llmctl.targets.cpu.target import CpuTarget

        if not isinstance(engine.target, CpuTarget):
            raise UsageError("the native CPU kernels are not available", fix="install a C++ compiler", param="model")
        runtime = open_runtime(engine, threads=self._threads)
        try:
            yield runtime
        finally:
            runtime.close()

    def _engine(self, dtype: str, head: str) -> LoadedEngine:
        from llmctl.artifact.builder import build_engine
        from llmctl.artifact.loader import load_engine, read_manifest
        from llmctl.artifact.request import EngineRequest
        from llmctl.config import BuildConfig

        path = self._work / f"{dtype}-{head}"
        if path not in self._built:  # one that lies there may be of another model or of older kernels
            build_engine(BuildConfig(model=str(self._checkpoint), output=str(path), dtype=dtype, lm_head=head))
            self._built.add(path)
        if read_manifest(path).quantization.method == "none":
            raise UsageError(f"{self._checkpoint}: is not quantized", fix="llmctl quantize it first", param="model")
        request = EngineRequest(
            max_model_len=self.context,
            max_num_batched_tokens=self.context,
            max_num_seqs=_BATCH,
            budget=1 << 33,
            whole_context=True,
        )
        return load_engine(path, request)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="quantized checkpoint: folder, .gguf or hub id")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--heads", type=lambda s: s.split(","), default=list(HEADS), help="default: dense,int8,int4")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=10_240, help="leading tokens used (default: %(default)s)")
    parser.add_argument("--kl-tokens", type=int, default=256, help="leading tokens for KL; 0: none (default: 256)")
    parser.add_argument("--bound", type=float, default=0.01, help="allowed change of perplexity (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--work", metavar="DIR", help="leave the engines there (built anew by every run)")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
