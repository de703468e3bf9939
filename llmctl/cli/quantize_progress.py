"""How ``llmctl quantize`` looks: a progress bar (or lines) on stderr while it runs, a table on stdout at the end."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from llmctl.artifact.memory import human_bytes
from llmctl.artifact.step_progress import PlainProgress, time_left
from llmctl.quantize.report import LayerReport, QuantizeReport

_BAR = 30  # characters of the largest part's bar


class ProgressLines:
    """A ``quantize.driver.Progress``: a bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._plain = PlainProgress()
        self._task: TaskID | None = None
        self._layers, self._seconds = 0, 0.0  # of this run
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
            )

    def __enter__(self) -> ProgressLines:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def calibrating(self, done: int, total: int) -> None:
        """Self-generated tokens."""
        self._tell("calibration text", "tokens", done, total)

    def measuring(self, done: int, total: int) -> None:
        """How far the choice of bits is."""
        self._tell("measuring what each linear's bits change", "of layers passed", done, total)

    def judging(self, done: int, total: int) -> None:
        """Layers of both models, on the text at the end."""
        self._tell("perplexity and KL", "layers", done, total)

    def evaluating(self, what: str, name: str, done: int, total: int) -> None:
        """How far an evaluation is, as ``step_progress`` takes it."""
        if self._bar is None:
            self._plain(what, name, done, total)
        self._update(what, done, total, name)

    def layer(self, done: int, total: int, report: LayerReport) -> None:
        """A finished layer."""
        detail = f"error {report.error:.2e}"
        self._seconds += report.seconds
        self._layers += 1
        if self._bar is None:
            left = time_left(self._seconds / self._layers * (total - done))
            print(f"layer {done}/{total}  {detail}  {report.seconds:.1f} s{left}", file=sys.stderr, flush=True)
        self._update("quantizing layers", done, total, detail)

    def _tell(self, what: str, unit: str, done: int, total: int) -> None:
        """Something counted: a bar, or a line at each tenth."""
        if self._bar is None:
            self._plain(what, unit, done, total)
        self._update(what, done, total, "")

    def _update(self, what: str, done: int, total: int, detail: str) -> None:
        if self._bar is None:
            return
        if self._task is None or self._bar.tasks[self._task].description != what:
            self._task = self._bar.add_task(what, total=total, detail="")
        self._bar.update(self._task, completed=done, detail=detail)


def print_report(report: QuantizeReport, chart: Path | None) -> None:
    """The tables on stdout; every layer's errors are in the files that ``chart`` is one of, if there are any."""
    console = Console(width=None if sys.stdout.isatty() else 80)
    console.print(_parts(report))
    if report.layers:
        console.print(f"the worst layers, by the relative squared error of their {report.error_of}s")
        console.print(_worst(report))
    if "/" in report.widths:
        console.print(_bits(report))
    console.print(_summary(report, chart))


def _parts(report: QuantizeReport) -> Table:
    """A bar for each part of the model: full for what it is now, light for what it was at 16 bits."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("part", no_wrap=True)
    table.add_column("16 bits", justify="right", no_wrap=True)
    table.add_column("now", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    largest = max((max(part.size_16bit, part.size_after) for part in report.parts.values()), default=1)
    for name, part in report.parts.items():
        now, before = (round(_BAR * size / largest) for size in (part.size_after, part.size_16bit))
        bar = "█" * now + "░" * (before - now)
        table.add_row(name, human_bytes(part.size_16bit), human_bytes(part.size_after), bar)
    return table


def _worst(report: QuantizeReport) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("most, at", no_wrap=True)
    for layer in report.worst_layers:
        name, error = max(layer.modules.items(), key=lambda item: item[1])
        table.add_row(str(layer.layer), _short(layer.error), f"{_short(error)} {name.rpartition('.')[2]}")
    return table


def _bits(report: QuantizeReport) -> Table:
    """A digit for every layer that has such a linear, in their order."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("linear", no_wrap=True)
    table.add_column("bits in each layer", overflow="fold")
    kinds: dict[str, str] = {}
    for name, linear in report.linears.items():
        kind = name.rpartition(".")[2].removesuffix("_proj")
        kinds[kind] = kinds.get(kind, "") + str(linear.bits)
    for kind, digits in kinds.items():
        table.add_row(kind, " ".join(digits[i : i + 10] for i in range(0, len(digits), 10)))
    return table


def _short(error: float) -> str:
    """Two digits, in six characters, so that seven linears fit 80 columns: ``6.8e-4``."""
    return f"{error:.1e}".replace("e-0", "e-")


def _schemes(report: QuantizeReport) -> str:
    """How many linears have which scheme."""
    return "; ".join(f"{count} linears of {scheme}" for scheme, count in sorted(report.schemes.items()))


def _quality(report: QuantizeReport) -> list[tuple[str, str]]:
    quality = report.quality
    if quality is None:
        return []
    error = quality.divergence.kl_error
    spread = "" if math.isnan(error) else f" ± {error:.4f}"
    return [
        ("perplexity", f"{quality.perplexity_before:.3f} -> {quality.perplexity_after:.3f} on {quality.sentence}"),
        ("KL", f"{quality.divergence.kl:.4f}{spread} nats a token, top-1 agreement {quality.divergence.top1:.1%}"),
    ]


def _sizes(report: QuantizeReport) -> str:
    """At 16 bits, as the source came if that is less, and now."""
    came = f" ({human_bytes(report.size_before)} as it came)" if report.size_before < 0.9 * report.size_16bit else ""
    return f"{human_bytes(report.size_16bit)} at 16 bits{came} -> {human_bytes(report.size_after)}"


def _summary(report: QuantizeReport, chart: Path | None) -> Table:
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    group = "row" if report.group_size == -1 else str(report.group_size)
    kind = "symmetric" if report.symmetric else "asymmetric"
    error = "not measured"
    if report.layers:
        error = f"{sum(layer.error for layer in report.layers) / len(report.layers):.2e} (mean over layers)"
    for key, value in (
        ("output", f"{report.output} ({report.format} format)"),
        *(("merged", adapter) for adapter in report.merged),
        ("method", f"{report.method}, {report.widths} bits, group {group}, {kind}"),
        *([("schemes", _schemes(report))] if len(report.schemes) > 1 else []),
        *([("KL predicted", f"{report.predicted_kl:.3g} nats a token")] if report.predicted_kl is not None else []),
        ("calibration", report.calibration),
        ("linears", f"{report.quantized_modules} quantized, at 16 bits: {', '.join(report.dense_modules) or 'none'}"),
        ("size", _sizes(report)),
        (
            "bits per weight",
            f"{report.bits_per_weight:.2f} in quantized linears, {report.bits_per_weight_model:.2f} over the model",
        ),
        (f"{report.error_of} error", error),
        *_quality(report),
        ("time", f"{report.seconds:.1f} s" + (f", and {q.seconds:.1f} s to measure" if (q := report.quality) else "")),
        *([("every layer", f"{chart.with_suffix('')}.json, .md, .svg")] if chart is not None else []),
        ("next", f"llmctl serve {shlex.quote(report.output)}"),
    ):
        table.add_row(key, value)
    return table
