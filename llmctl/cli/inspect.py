"""``llmctl inspect``: what an engine folder holds, or what a checkpoint would be built into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmctl.cli.common import AsOption, ConfigOption, JsonOption, guarded, print_json

if TYPE_CHECKING:
    from rich.console import Console


_UNITS = {"max_model_len": "tokens", "block_size": "tokens"}

Engine = Annotated[str, typer.Argument(metavar="ENGINE", help="An engine folder, or any model that can be built.")]
Ops = Annotated[bool, typer.Option("--ops", help="List every op with its kernel.", rich_help_panel="Listing")]
Weights = Annotated[bool, typer.Option("--weights", help="List every stored tensor.", rich_help_panel="Listing")]
Verify = Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file.", rich_help_panel="General")]


@guarded
def inspect(
    engine: Engine,
    ops: Ops = False,
    weights: Weights = False,
    verify: Verify = False,
    as_family: AsOption = "",
    config: ConfigOption = None,  # noqa: ARG001
    json_output: JsonOption = False,
) -> None:
    """Show an engine: target, sizes, graph, kernels, quantization. Files are checked; nothing is loaded.

    Of a model that cannot be built: its tensors, its tokenizer, and the reason. A cached engine may be called as
    llmctl list does. Also llmctl show.

    Example: [bold]llmctl inspect ./engine --ops[/bold]
    """
    from llmctl.artifact.cache import cached_engine
    from llmctl.artifact.describe import describe_model

    cached = None if Path(engine).exists() else cached_engine(engine)
    document = describe_model(str(cached or engine), verify=verify, as_family=as_family)
    if json_output:
        document.get("memory", {}).pop("rows", None)
        print_json(document)
        return
    from rich.console import Console

    console = Console()
    if "not_built" in document:
        _print_checkpoint(console, document)
        if weights:
            _print_weights(console, document["weights"])
        return
    _print_summary(console, document)
    _print_graph(console, document)
    _print_kernels(console, document)
    _print_memory(console, document["memory"])
    if document.get("unused"):
        _print_unused(console, document["unused"])
    if weights:
        _print_weights(console, document["weights"])
    if ops:
        _print_ops(console, document["ops"])


def _print_summary(console: Console, document: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=document["path"], title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("kind", "source", "fingerprint", "llmctl_version", "target", "runs_here", "size", "checksum"):
        if document.get(name) is not None:
            table.add_row(name.replace("_", " "), str(document[name]))
    for name, value in document["options"].items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(name.replace("_", " "), f"{shown} {_UNITS[name]}" if name in _UNITS else shown)
    quantization = document["quantization"]
    table.add_row("quantization", _quantization_line(quantization))
    if len(quantization["schemes"]) > 1:
        table.add_row("schemes", "; ".join(f"{n} weights of {scheme}" for scheme, n in quantization["schemes"].items()))
    console.print(table, highlight=False)


def _print_checkpoint(console: Console, document: Mapping[str, Any]) -> None:
    from rich.table import Table

    from llmctl.artifact.memory import human_bytes

    table = Table(title=document["path"], title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("kind", "not_built", "model_type", "dtype", "size", "tokenizer"):
        table.add_row(name.replace("_", " "), str(document[name]))
    console.print(table, highlight=False)
    stored = Table(title="tensors as they are stored", title_justify="left")
    stored.add_column("quantization", overflow="fold")
    stored.add_column("dtype", overflow="fold")
    for column in ("count", "size"):
        stored.add_column(column, justify="right")
    for row in document["stored"]:
        line = _quantization_line(row["quantization"])
        stored.add_row(line, row["dtype"], str(row["count"]), human_bytes(row["bytes"]))
    console.print(stored, highlight=False)


def _quantization_line(record: Mapping[str, Any]) -> str:
    if record["method"] == "none":
        return "none"
    group = "one group a row" if record["group_size"] == -1 else f"groups of {record['group_size']}"
    if record["block_rows"] > 1:
        group = f"blocks of {record['block_rows']} x {record['group_size']}"
    kind = record["book"] or ("symmetric" if record["symmetric"] else "asymmetric")
    kind = "with minimums" if record["minimum"] else kind
    order = ", act-order" if record["act_order"] else ""
    ignored = f"; dense: {', '.join(record['ignored_layers'])}" if record["ignored_layers"] else ""
    note = f"; {record['note']}" if record["note"] else ""
    return f"{record['method']}, {record['bits']} bits, {group}, {kind}{order}{ignored}{note}"


def _print_graph(console: Console, document: Mapping[str, Any]) -> None:
    from rich.table import Table

    graph = document["graph"]
    console.print(
        f"graph: {graph['family']}, {graph['num_layers']} layers, hidden {graph['hidden_size']}, "
        f"vocabulary {graph['vocab_size']}, {graph['parameters'] / 1e6:.1f} M parameters",
        highlight=False,
    )
    table = Table()
    table.add_column("op", overflow="fold")
    table.add_column("count", justify="right")
    for kind, count in graph["ops"].items():
        table.add_row(kind, str(count))
    console.print(table, highlight=False)


def _print_kernels(console: Console, document: Mapping[str, Any]) -> None:
    from rich.table import Table

    chosen = Table(title="kernels", title_justify="left")
    for column in ("kernel", "ops", "serves", "others refused because"):
        chosen.add_column(column, overflow="fold")
    for row in document["kernels"]:
        chosen.add_row(row["kernel"], f"{row['count']} {row['kind']}", row["rows"], "; ".join(row["refused"]) or "-")
    console.print(chosen, highlight=False)
    for name, module in document["modules"].items():
        table = Table(title=f"{name}  {module['compiler']}  sha256 {module['sha256'][:16]}…", title_justify="left")
        table.add_column("entry point", overflow="fold")
        for column in ("registers", "shared, B", "stack, B", "spills, B"):
            table.add_column(column, justify="right")
        for r in module["resources"]:
            spills = r["spill_store_bytes"] + r["spill_load_bytes"]
            table.add_row(r["name"], *(str(v) for v in (r["registers"], r["shared_bytes"], r["stack_bytes"], spills)))
        if module["resources"]:
            console.print(table, highlight=False)


def _print_memory(console: Console, memory: Mapping[str, Any]) -> None:
    from llmctl.artifact.memory_table import render

    console.print(render(memory["rows"], note=f"budget: {memory['budget_source']}"), highlight=False)


def _print_unused(console: Console, kinds: list[Mapping[str, Any]]) -> None:
    from rich.table import Table

    from llmctl.checkpoint.accounting import name_some

    table = Table(title="tensors of the checkpoint that nothing reads", title_justify="left")
    table.add_column("tensors", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("because", overflow="fold")
    for kind in kinds:
        table.add_row(name_some(kind["names"]), str(len(kind["names"])), kind["reason"])
    console.print(table, highlight=False)


def _print_weights(console: Console, weights: list[Mapping[str, Any]]) -> None:
    from rich.table import Table

    from llmctl.artifact.memory import human_bytes

    table = Table(title="weights", title_justify="left")
    for column in ("tensor", "dtype", "shape"):
        table.add_column(column, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for plane in weights:
        shape = "x".join(map(str, plane["shape"]))
        table.add_row(plane["name"], plane["dtype"], shape, human_bytes(plane["bytes"]))
    console.print(table, highlight=False)


def _print_ops(console: Console, ops: list[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="ops, in execution order", title_justify="left")
    for column in ("layer", "op", "kind", "inputs", "outputs", "kernel", "attributes"):
        table.add_column(column, overflow="fold")
    for op in ops:
        attributes = " ".join(f"{k}={v}" for k, v in op["attrs"].items())
        table.add_row(
            str(op["layer"]), op["name"], op["kind"], " ".join(op["inputs"]), " ".join(op["outputs"]), op["kernel"],
            attributes,
        )  # fmt: skip
    console.print(table, highlight=False)
