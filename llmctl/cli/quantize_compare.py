"""``llmctl quantize compare``: several quantizations of a model in one table and one picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.bench.config import CompareConfig
from llmctl.bench.progress import Progress
from llmctl.cli import quantize as options
from llmctl.cli.common import AsOption, ConfigOption, JsonOption, guarded, print_json
from llmctl.config import QuantizeConfig
from llmctl.errors import UsageError

if TYPE_CHECKING:
    from llmctl.bench.quantizations import Comparison
    from llmctl.cli.quantize_progress import ProgressLines

_D = QuantizeConfig()
_C = CompareConfig(_D)
_METHOD, _MEASURE = "Method", "Measurement"
FILES = "quantize_compare"
"""Name of the files written, without ``.json`` and ``.svg``."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A checkpoint folder, a .gguf file, demo:smollm2-135m, or a hub id.", show_default=False
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="NAMES",
        help="Those to compare, with commas between: some of rtn, awq, gptq, awq+gptq.",
        rich_help_panel=_METHOD,
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        metavar="NUMBERS",
        help="Each method at each of them: 3, 4, 8. Without it: 4.",
        rich_help_panel=_METHOD,
    ),
]
Text = Annotated[
    str, typer.Option("--text", metavar="FILE", help="UTF-8 text; builtin is a novel's.", rich_help_panel=_MEASURE)
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        help="Tokens in a window; by default 1024, or what fits.",
        rich_help_panel=_MEASURE,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        "--windows", metavar="N", help="N windows spread over the text; by default all of it.", rich_help_panel=_MEASURE
    ),
]
Target = Annotated[
    str, typer.Option("--target", help="What speeds are measured on, as for build.", rich_help_panel=_MEASURE)
]
ResultDir = Annotated[
    str,
    typer.Option(
        "--result-dir", metavar="DIR", help=f"Where {FILES}.json and .svg are written.", rich_help_panel="Output"
    ),
]


@guarded
def compare(
    model: Model = _D.model,
    as_family: AsOption = _D.as_family,
    config: ConfigOption = None,  # noqa: ARG001
    methods: Methods = ",".join(_C.methods),
    bits: Bits = None,
    group_size: options.GroupSize = _D.group_size,
    symmetric: options.Symmetric = _D.symmetric,
    format: options.Format = _D.format,
    rotate: options.Rotate = _D.rotate,
    ignore: options.Ignore = list(_D.ignore),  # noqa: B006
    override: options.Override = list(_D.override),  # noqa: B006
    target_bpw: options.TargetBpw = _D.target_bpw,
    target_size: options.TargetSize = _D.target_size,
    calib: options.Calib = _D.calib,
    calib_samples: options.CalibSamples = _D.calib_samples,
    calib_length: options.CalibLength = _D.calib_length,
    seed: options.Seed = _D.seed,
    text: Text = _C.text,
    context: Context = _C.context,
    windows: Windows = _C.windows,
    target: Target = _C.target,
    max_kl: options.MaxKl = _D.max_kl,
    max_size: options.MaxSize = _D.max_size,
    output: options.Output = _D.output,
    result_dir: ResultDir = _C.result_dir,
    threads: options.Threads = _D.threads,
    device: options.Device = _D.device,
    json_output: JsonOption = False,
) -> None:
    """Quantize a model in several ways, and compare them: size, KL from the original, tokens a second of an engine.

    Example: [bold]llmctl quantize compare demo:smollm2-135m --methods rtn,gptq --bits 3,4 --max-kl 0.2 -o ./best[/bold]
    """
    from llmctl.targets.address_space import check_torch

    check_torch("llmctl quantize compare")
    from llmctl.bench import quantizations
    from llmctl.cli.quantize_progress import ProgressLines

    if not model:
        raise UsageError("MODEL: expected a checkpoint, or demo:smollm2-135m", param="model")
    base = QuantizeConfig(
        model=model,
        as_family=as_family,
        output=output,
        group_size=group_size,
        symmetric=symmetric,
        format=format,
        calib=calib,
        calib_samples=calib_samples,
        calib_length=calib_length,
        seed=seed,
        rotate=rotate,
        ignore=tuple(name for name in ignore if name),
        override=tuple(override),
        target_bpw=target_bpw,
        target_size=target_size,
        max_kl=max_kl,
        max_size=max_size,
        threads=threads,
        device=device,
    )
    widths = None if bits is None else _numbers(bits)
    settings = CompareConfig(base, _words(methods), widths, text, context, windows, target, result_dir)
    with ProgressLines() as progress:
        shown = quantizations.Shown(progress, progress.evaluating, lambda: _Requests(progress))
        found = quantizations.compare(settings, shown)
    files = _write(found, Path(result_dir))
    if json_output:
        print_json(found.to_json())
    else:
        _print_table(found)
    for path in files:
        print(f"wrote {path}", file=sys.stderr)
    if base.has_limits and found.winner is None:
        raise quantizations.none_fits(found)


class _Requests(Progress):
    """A bench's progress among that of quantizations: there is one bar on a terminal at a time."""

    def __init__(self, lines: ProgressLines) -> None:
        super().__init__()
        self._lines = lines

    def log(self, line: str) -> None:
        """A line of its own."""
        self._lines.note(line)

    def start(self, label: str, total: int) -> None:
        """Begin a stage."""
        self._label, self._total, self._done = label, total, 0

    def advance(self, failed: bool = False) -> None:  # noqa: ARG002
        """One request is done."""
        self._done += 1
        self._lines.evaluating("requests through an engine", f"request {self._done}", self._done, self._total)

    def stop(self) -> None:
        """Nothing: the bar is not this one's."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _numbers(text: str) -> tuple[int, ...]:
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise UsageError(f"--bits {text}: expected numbers such as 3,4,8", param="bits")
    return tuple(map(int, words))


def _write(found: Comparison, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    contents = {".json": json.dumps(found.to_json(), indent=2) + "\n", ".svg": found.svg()}
    for suffix, text in contents.items():
        (folder / f"{FILES}{suffix}").write_text(text, encoding="utf-8")
    return [folder / f"{FILES}{suffix}" for suffix in contents]


def _print_table(found: Comparison) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 80)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("quantization", "MiB", "bits/w", "KL", "ΔNLL", "tok/s", "s"):
        table.add_column(name, justify="left" if name == "quantization" else "right", no_wrap=True)
    for c in found.candidates:
        speed = "" if c.decode_tokens_per_second is None else f"{c.decode_tokens_per_second:.0f}"
        error = "" if c.kl_error is None else f" ± {c.kl_error:.1g}"
        name = f"{c.method} {c.bits or 'mixed'}" + (" *" if c.front else "")
        table.add_row(
            name, f"{c.size / 2**20:.1f}", f"{c.bits_per_weight:.2f}", f"{c.kl:.4f}{error}", f"{c.delta_nll:+.4f}",
            speed, f"{c.seconds:.0f}",
        )  # fmt: skip
    console.print(table, highlight=False)
    console.print("* on the Pareto front: none is smaller, nearer and faster at once", highlight=False)
    for name, why in found.refused.items():
        console.print(f"{name}: {why}", highlight=False, markup=False)
    if found.winner is not None:
        best = found.candidates[found.winner].label
        said = f"kept {best}: {found.output}" if found.output else f"best within the limits: {best}; --output keeps it"
        console.print(said, highlight=False, markup=False)
