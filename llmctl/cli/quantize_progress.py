"""How ``llmctl quantize`` looks: a progress bar (or lines) on stderr while it runs, a table on stdout at the end."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from llmctl.cli.step_progress import PlainProgress
from llmctl.quantize.report import LayerReport, QuantizeReport

_MIB = 2**20


class ProgressLines:
    """A ``quantize.driver.Progress``: a bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._plain = PlainProgress()
        self._task: TaskID | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
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
        """Self-generated tokens; without a terminal nothing is said until the note that follows."""
        self._update("calibration text", done, total, "")

    def measuring(self, done: int, total: int) -> None:
        """How far the choice of bits is: in tenths without a terminal."""
        what = "measuring what each linear's bits change"
        if self._bar is None:
            self._plain(what, "of layers passed", done, total)
        self._update(what, done, total, "")

    def evaluating(self, what: str, name: str, done: int, total: int) -> None:
        """How far an evaluation is, as ``step_progress`` takes it."""
        if self._bar is None:
            self._plain(what, name, done, total)
        self._update(what, done, total, name)

    def layer(self, done: int, total: int, report: LayerReport) -> None:
        """A finished layer."""
        detail = f"error {report.error:.2e}"
        if self._bar is None:
            print(f"layer {done}/{total}  {detail}  {report.seconds:.1f} s", file=sys.stderr, flush=True)
        self._update("quantizing layers", done, total, detail)

    def _update(self, what: str, done: int, total: int, detail: str) -> None:
        if self._bar is None:
            return
        if self._task is None or self._bar.tasks[self._task].description != what:
            self._task = self._bar.add_task(what, total=total, detail="")
        self._bar.update(self._task, completed=done, detail=detail)


def print_report(report: QuantizeReport) -> None:
    """The tables on stdout."""
    console = Console(width=None if sys.stdout.isatty() else 80)
    if report.layers:
        console.print(_layers(report))
    if len({linear.bits for linear in report.linears.values()}) > 1:
        console.print(_bits(report))
    console.print(_summary(report))


def _layers(report: QuantizeReport) -> Table:
    table = Table(title=f"relative squared error of each linear's {report.error_of}", box=SIMPLE_HEAD, pad_edge=False)
    names = [name.rpartition(".")[2] for name in report.layers[0].modules]
    uniform = all([n.rpartition(".")[2] for n in layer.modules] == names for layer in report.layers)
    table.add_column("layer", justify="right")
    for name in names if uniform else ["mean"]:
        table.add_column(name.removesuffix("_proj"), justify="right", no_wrap=True)
    table.add_column("s", justify="right")
    for layer in report.layers:
        errors = list(layer.modules.values()) if uniform else [layer.error]
        table.add_row(str(layer.layer), *(_short(error) for error in errors), f"{layer.seconds:.1f}")
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


def _summary(report: QuantizeReport) -> Table:
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
        ("method", f"{report.method}, {report.bits} bits, group {group}, {kind}"),
        *([("schemes", _schemes(report))] if len(report.schemes) > 1 else []),
        *([("KL predicted", f"{report.predicted_kl:.3g} nats a token")] if report.predicted_kl is not None else []),
        ("calibration", report.calibration),
        ("linears", f"{report.quantized_modules} quantized, at 16 bits: {', '.join(report.dense_modules) or 'none'}"),
        ("size before", f"{report.size_before / _MIB:.1f} MiB stored, {report.size_16bit / _MIB:.1f} MiB at 16 bits"),
        ("size after", f"{report.size_after / _MIB:.1f} MiB"),
        (
            "bits per weight",
            f"{report.bits_per_weight:.2f} in quantized linears, {report.bits_per_weight_model:.2f} over the model",
        ),
        (f"{report.error_of} error", error),
        ("time", f"{report.seconds:.1f} s"),
    ):
        table.add_row(key, value)
    return table
