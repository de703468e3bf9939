"""``llmctl quantize compare`` and ``--method auto``: quantizations of one model, measured alike; one is kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import isnan, prod
from pathlib import Path
from typing import Any

from llmctl.artifact.builder import build_engine
from llmctl.bench import progress as bench_progress
from llmctl.bench.config import BenchThroughputConfig, CompareConfig
from llmctl.bench.offline import run_throughput
from llmctl.bench.pareto import Point, chart, front
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.resolve import resolve_model
from llmctl.checkpoint.writer import check_new
from llmctl.config import BuildConfig, EvalConfig, QuantizeConfig, parse_bytes
from llmctl.errors import LlmctlError, UsageError
from llmctl.evaluate.divergence import Divergence
from llmctl.evaluate.evaluation import Show, evaluate
from llmctl.quantize.backends import run_backend
from llmctl.quantize.driver import Progress
from llmctl.quantize.methods import CHOOSES_BITS, scheme_of
from llmctl.quantize.plan import check_not_quantized, check_options
from llmctl.quantize.quality import INT8_FORMAT
from llmctl.quantize.report import QuantizeReport

WORKLOAD = {"num_prompts": 8, "input_len": "64", "output_len": "64"}
"""Of the speed: greedy requests, all at once."""
_ORIGINAL = "original"


@dataclass(frozen=True)
class Candidate:
    """One quantization, or the model itself (``method`` "original", 16 bits).

    Attributes:
        bits: None where they differ among the linears.
        size: stored weights, bytes; of the original at 16 bits.
        kl: from the original, nats a token; kl_error: its standard error, None with one window.
        decode_tokens_per_second: of an engine of it under ``WORKLOAD``; None where not measured.
        seconds: to make it.
        front: whether it is on the Pareto front of size, KL and speed.
    """

    method: str
    bits: int | None
    format: str
    size: int
    bits_per_weight: float
    kl: float
    kl_error: float | None
    delta_nll: float
    top1_agreement: float
    decode_tokens_per_second: float | None
    seconds: float
    front: bool = False

    @property
    def label(self) -> str:
        """For people."""
        return (
            f"{self.method}, {self.bits_per_weight:.2f} bits a weight"
            if self.bits is None
            else _named(self.method, self.bits)
        )

    @property
    def point(self) -> Point:
        """Its place in the chart."""
        return Point(self.label, self.size, self.kl, self.decode_tokens_per_second)


@dataclass(frozen=True)
class Comparison:
    """All that was measured.

    Attributes:
        refused: candidates that there are not -> why. winner: index of the best within the limits, None without any.
        output: where it was kept; "" if nowhere.
        protocol: of the evaluations; target: what the speeds are of.
    """

    model: str
    target: str
    protocol: dict[str, Any]
    candidates: tuple[Candidate, ...]
    refused: dict[str, str]
    winner: int | None
    output: str

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON data."""
        return {**asdict(self), "workload": WORKLOAD}

    def svg(self) -> str:
        """The chart."""
        return chart([candidate.point for candidate in self.candidates], f"{self.model}, quantized")


@dataclass(frozen=True)
class Shown:
    """Who is told how far the parts are: quantizing, evaluating, building and running."""

    quantizing: Progress
    evaluating: Show
    running: Callable[[], bench_progress.Progress]


def compare(config: CompareConfig, shown: Shown) -> Comparison:
    """Make and measure every candidate; keep the best in ``config.base.output``, if there is one.

    Raises:
        UsageError: options that cannot be honoured, or every candidate refused.
        LlmctlError: a model that cannot be read, built or run.
    """
    settings = _settings(config, config.base.output or "-")
    with _folder(config.base.output) as folder:
        job = _Job(config, folder, shown)
        job.measure_original()
        for one in settings:
            job.measure(one, speed=True)
        return job.finished()


def choose_method(config: CompareConfig, shown: Shown) -> tuple[QuantizeReport, Comparison]:
    """``--method auto``: the best at the first number of bits where a method keeps to the limits; no speeds.

    Under ``max_kl`` the fewest bits are tried first, for more are larger; else the most, for fewer are farther.

    Raises:
        As ``compare``; UsageError: there are no limits; LlmctlError: ``none_fits``.
    """
    base = config.base
    if not base.has_limits:
        raise UsageError(
            "--method auto: chosen by what?",
            fix="add --max-kl 0.1, --max-size 4GiB, --target-bpw 4 or --target-size 4GiB",
            param="method",
        )
    settings = _settings(config, base.output)
    with _folder(base.output) as folder:
        job = _Job(config, folder, shown)
        widths = [list(alike) for _, alike in groupby(settings, key=lambda one: one.bits)]
        for alike in widths if base.max_kl is not None else reversed(widths):
            for one in alike:
                job.measure(one, speed=False)
            if best(job.candidates, base) is not None:
                break
        found = job.finished()
    if found.winner is None:
        raise none_fits(found)
    return replace(job.reports[found.winner], output=base.output), found


def best(candidates: Sequence[Candidate], limits: QuantizeConfig) -> int | None:
    """The one to keep: of those within the limits the smallest, or without ``max_kl`` that of the least KL."""
    max_size = _max_size(limits)
    fitting = [
        (i, c)
        for i, c in enumerate(candidates)
        if c.method != _ORIGINAL
        and (limits.max_kl is None or c.kl <= limits.max_kl)
        and (max_size is None or c.size <= max_size)
    ]
    by_kl = limits.max_kl is None
    return min(fitting, key=lambda at: (at[1].kl, at[1].size) if by_kl else (at[1].size, at[1].kl), default=(None,))[0]


def none_fits(found: Comparison) -> LlmctlError:
    """What to say where no candidate keeps to the limits."""
    made = [candidate for candidate in found.candidates if candidate.method != _ORIGINAL]
    nearest, smallest = min(made, key=lambda c: c.kl), min(made, key=lambda c: c.size)
    return LlmctlError(
        f"none of {len(made)} quantizations keeps to the limits: the least KL is {nearest.kl:.4g} "
        f"({nearest.label}, {_mib(nearest.size)}), the least size {_mib(smallest.size)} ({smallest.label}, "
        f"KL {smallest.kl:.4g})",
        fix="a larger --max-kl or --max-size",
    )


class _Job:
    """Candidates made in a folder, one after another."""

    def __init__(self, config: CompareConfig, folder: Path, shown: Shown) -> None:
        self.config, self.folder, self.shown = config, folder, shown
        self.candidates: list[Candidate] = []
        self.paths: list[Path | None] = []
        self.reports: list[QuantizeReport] = []
        self.refused: dict[str, UsageError] = {}
        self.protocol: dict[str, Any] = {}

    def measure_original(self) -> None:
        """The model itself: its size at 16 bits, and its speed."""
        checkpoint = open_checkpoint(
            resolve_model(self.config.base.model), widen=True, as_family=self.config.base.as_family
        )
        check_not_quantized(checkpoint)
        size = sum(2 * prod(checkpoint.describe(name).shape) for name in checkpoint.names())
        speed = self._speed(self.config.base.model)
        self._add(Candidate(_ORIGINAL, 16, checkpoint.dtype, size, 16.0, 0.0, None, 0.0, 1.0, speed, 0.0), None)

    def measure(self, settings: QuantizeConfig, *, speed: bool) -> None:
        """Make and measure one quantization; one that its options do not allow is noted as refused."""
        name = settings.method if settings.has_budget else _named(settings.method, scheme_of(settings).bits)
        path = self.folder / (f"{len(self.paths)}.gguf" if settings.format == "gguf" else str(len(self.paths)))
        self.shown.quantizing.note(name)
        try:
            report = run_backend(replace(settings, output=str(path)), self.shown.quantizing)
        except UsageError as error:
            self.refused[name] = error
            return
        found = self._distance(path, report.format)
        self.reports.append(report)
        self._add(
            Candidate(
                method=settings.method,
                bits=scheme_of(settings).bits if len(report.schemes) == 1 else None,
                format=report.format,
                size=report.size_after,
                bits_per_weight=report.bits_per_weight,
                kl=found.kl,
                kl_error=None if isnan(found.kl_error) else found.kl_error,
                delta_nll=found.delta_nll,
                top1_agreement=found.top1,
                decode_tokens_per_second=self._speed(str(path)) if speed else None,
                seconds=report.seconds,
            ),
            path,
        )

    def finished(self) -> Comparison:
        """The comparison; the winner, if there is one, is in its place."""
        if not self.reports:
            raise next(iter(self.refused.values()))
        base = self.config.base
        chosen = best(self.candidates, base) if base.has_limits else None
        path = None if chosen is None else self.paths[chosen]
        if path is not None and base.output:
            os.rename(path, base.output)
        is_on_front = front([candidate.point for candidate in self.candidates])
        return Comparison(
            model=base.model,
            target=self.config.target,
            protocol=self.protocol,
            candidates=tuple(replace(c, front=on) for c, on in zip(self.candidates, is_on_front, strict=True)),
            refused={name: error.message for name, error in self.refused.items()},
            winner=chosen,
            output=base.output if chosen is not None else "",
        )

    def _add(self, candidate: Candidate, path: Path | None) -> None:
        self.candidates.append(candidate)
        self.paths.append(path)
        if path is not None and not self.config.base.output:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _distance(self, path: Path, format: str) -> Divergence:
        c = self.config
        settings = EvalConfig(
            model=str(path),
            as_family=c.base.as_family,
            against=c.base.model,
            text=c.text,
            context=c.context,
            windows=c.windows,
        )
        activations = "int8" if format == INT8_FORMAT else "auto"
        found = evaluate(replace(settings, activations=activations), self.shown.evaluating)
        self.protocol = asdict(found.protocol)
        assert found.divergence is not None
        return found.divergence

    def _speed(self, model: str) -> float | None:
        build = BuildConfig(model=model, as_family=self.config.base.as_family, target=self.config.target)
        return decode_speed(build, self.folder / "engine", self.config.base.threads, self.shown.running())


def decode_speed(
    build: BuildConfig, engine: Path, threads: int | None, progress: bench_progress.Progress
) -> float | None:
    """Tokens a second of an engine under ``WORKLOAD``, which is built at ``engine`` and removed again.

    Raises:
        UsageError, LlmctlError: a model that cannot be built or run.
    """
    build_engine(replace(build, output=str(engine), eval_text="none"))
    try:
        settings = BenchThroughputConfig(model=str(engine), threads=threads, **WORKLOAD)  # type: ignore[arg-type]
        speed = run_throughput(settings, progress).result["decode_tokens_per_second"]
    finally:
        shutil.rmtree(engine)
    return None if speed is None else float(speed)


def _settings(config: CompareConfig, output: str) -> list[QuantizeConfig]:
    """What is to be made, fewest bits first; refused before anything is."""
    base = config.base
    unknown = [method for method in config.methods if method not in CHOOSES_BITS]
    if unknown or not config.methods:
        found = unknown[0] if unknown else "nothing"
        raise UsageError(
            f"--methods: expected some of {', '.join(CHOOSES_BITS)}, whose bits can be chosen; found {found}",
            fix="leave it out, and compare others by 'llmctl eval MODEL --against BASE'",
            param="methods",
        )
    if base.max_kl is not None and not base.max_kl > 0:
        raise UsageError(f"--max-kl {base.max_kl:g}: expected a positive number", param="max_kl")
    _max_size(base)
    if base.output and not base.has_limits:
        raise UsageError(
            "--output: which quantization to keep there?",
            fix="add --max-kl 0.1 (the smallest within it) or --max-size 4GiB (the nearest to the original)",
            param="output",
        )
    shared = replace(base, max_kl=None, max_size=None, output=output)
    widths: list[int | None] = [None] if config.bits is None else [*sorted(set(config.bits))]
    made = [replace(shared, method=method, bits=bits) for bits in widths for method in config.methods]
    for one in made:
        check_options(one)
    if base.output:
        check_new(Path(base.output), "gptq" if base.format == "auto" else base.format)
    return made


def _max_size(limits: QuantizeConfig) -> int | None:
    return None if limits.max_size is None else parse_bytes(limits.max_size, param="max_size")


def _named(method: str, bits: int) -> str:
    return f"{method}, {bits} bits"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


@contextmanager
def _folder(output: str) -> Iterator[Path]:
    """Where candidates lie: beside the output, so that the one to keep is only renamed."""
    place = Path(output).absolute().parent if output else None
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".llmctl-compare-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
