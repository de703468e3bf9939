"""``llmctl convert``: quantized checkpoint -> the same numbers in another format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.cli.common import AsOption, ConfigOption, JsonOption, guarded, print_json
from llmctl.cli.model_word import with_model_word
from llmctl.config import ConvertConfig

if TYPE_CHECKING:
    from llmctl.checkpoint.convert import ConvertReport

_D = ConvertConfig()

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A quantized checkpoint folder, a .gguf file, or a hub id.",
        rich_help_panel="Model",
    ),
]
To = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="FORMAT",
        help="awq, gptq (version 2 where zero points are stored), gptq_v2, compressed-tensors, "
        "compressed-tensors-w8a8, bitsandbytes or gguf.",
        rich_help_panel="Output",
    ),
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; NAME.gguf for --to gguf.")]


@guarded
@with_model_word
def convert(
    config: ConfigOption = None,  # noqa: ARG001
    model: Model = _D.model,
    as_family: AsOption = _D.as_family,
    to: To = _D.to,
    output: Output = _D.output,
    json_output: JsonOption = False,
) -> None:
    """Convert a quantized checkpoint between formats that hold the same numbers, bit for bit; else refuse.

    [bold]llmctl convert --model ./smollm2-awq --to gptq --output ./smollm2-gptq[/bold]
    """
    from llmctl.targets.address_space import check_torch

    check_torch("llmctl convert")
    from llmctl.artifact.step_progress import step_progress
    from llmctl.checkpoint.convert import convert_checkpoint

    settings = ConvertConfig(model=model, as_family=as_family, to=to, output=output)
    with step_progress() as show:
        report: ConvertReport = convert_checkpoint(settings, show)
    if json_output:
        print_json(report.to_json())
    else:
        _print_report(report)


def _print_report(report: ConvertReport) -> None:
    from rich.console import Console
    from rich.table import Table

    from llmctl.artifact.memory import human_bytes

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("output", report.output)
    table.add_row("format", f"{report.source} -> {report.format}")
    for scheme, count in report.schemes.items():
        table.add_row("linears", f"{count} of {scheme}")
    for name, dtype in report.widened.items():
        table.add_row("dense now", f"{name}, {dtype}")
    for reason, count in report.left_out.items():
        table.add_row("left out", f"{count} tensors: {reason}")
    table.add_row("compared", f"{report.compared} weights, read back: the same numbers")
    table.add_row("size", f"{human_bytes(report.size_before)} -> {human_bytes(report.size_after)}")
    table.add_row("time", f"{report.seconds:.1f} s")
    Console().print(table, highlight=False)
