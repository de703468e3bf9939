"""``llmctl merge``: checkpoint and adapters -> plain checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.cli.common import AsOption, ConfigOption, JsonOption, guarded, print_json
from llmctl.config import MergeConfig

if TYPE_CHECKING:
    from llmctl.checkpoint.merge import MergeReport

_D = MergeConfig()

Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE", help="A checkpoint folder, a .gguf file, demo:smollm2-135m, or a hub id.", show_default=False
    ),
]
Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER",
        help="Folders that PEFT saved; DIR=WEIGHT adds a share of one. What they add is summed up.",
        show_default=False,
    ),
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the output: auto (the base's), float32, bfloat16 or float16.")]


@guarded
def merge(
    base: Base = _D.base,
    adapters: Adapters = list(_D.adapters),  # noqa: B006
    config: ConfigOption = None,  # noqa: ARG001
    output: Output = _D.output,
    dtype: Dtype = _D.dtype,
    as_family: AsOption = _D.as_family,
    json_output: JsonOption = False,
) -> None:
    """Merge LoRA adapters into a model and write a plain checkpoint; a quantized model is dequantized.

    [bold]llmctl merge demo:smollm2-135m ./adapter --output ./merged[/bold]

    [bold]llmctl quantize --merge-adapter ./adapter[/bold] merges and quantizes at once.
    """
    from llmctl.targets.address_space import check_torch

    check_torch("llmctl merge")
    from llmctl.artifact.step_progress import step_progress
    from llmctl.checkpoint.merge import merge_checkpoint

    with step_progress() as show:
        report = merge_checkpoint(MergeConfig(base, tuple(adapters), output, dtype, as_family), show)
    if json_output:
        print_json(report.to_json())
    else:
        _print_report(report)


def _print_report(report: MergeReport) -> None:
    import shlex

    from rich.console import Console
    from rich.table import Table

    from llmctl.artifact.memory import human_bytes

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("output", f"{report.output} ({report.dtype})")
    for adapter in report.adapters:
        table.add_row("merged", adapter)
    if report.untied:
        table.add_row("head", "a tensor of its own now: the adapter changes only one of head and embeddings")
    for note in report.notes:
        table.add_row("note", note)
    for reason, count in report.left_out.items():
        table.add_row("left out", f"{count} tensors: {reason}")
    table.add_row("size", human_bytes(report.size))
    table.add_row("time", f"{report.seconds:.1f} s")
    table.add_row("next", f"llmctl serve {shlex.quote(report.output)}")
    Console().print(table, highlight=False)
