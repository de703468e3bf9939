"""A bench result as rich tables, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmctl.bench.metrics import LATENCIES
from llmctl.bench.report import failure_lines
from llmctl.bench.units import interval, unit
from llmctl.bench.verdict import headline, lines

_COLOURS = {"pass": "green", "FAIL": "bold red", "OPEN": "bold yellow"}
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}


def print_result(result: Mapping[str, Any], title: str, console: Console) -> None:
    """Totals, latencies, gates and failures."""
    console.print(_totals(result, f"{title}: {headline(result)}"))
    latencies = _latencies(result)
    if latencies.row_count and result.get("completed"):
        console.print(latencies)
    if "batching" in result:
        console.print(_batching(result["batching"]))
    print_verdict(result, console)
    for line in failure_lines(result):
        console.print(line, style="red", markup=False, highlight=False)


def _totals(result: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=SIMPLE_HEAD)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("unit")
    rows = (
        *("completed", "failed", "duration", "request_throughput", "request_goodput", "output_throughput"),
        *("total_token_throughput", "total_input_tokens", "total_output_tokens"),
        *("elapsed_time", "requests_per_second", "tokens_per_second", "avg_latency"),
        *("prefill_tokens_per_second", "decode_tokens_per_second", "peak_rss_bytes", "threads"),
    )
    for key in rows:
        if result.get(key) is not None:
            value, shown_unit = result[key], unit(key)
            if shown_unit == "B":
                value, shown_unit = value / 2**20, "MiB"
            table.add_row(key.replace("_", " "), _number(value) + _spread(result, key), shown_unit)
    client = result.get("client")
    if client:
        table.add_row("client CPU", _number(client["cpu_seconds"]), "s")
    return table


def _batching(found: Mapping[str, Any]) -> Table:
    """Continuous batching against static batching, in which ``found`` has the ratios."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(f"batches of {found['batch_size']}")
    for column in ("static", "continuous / static", "interval", "unit"):
        table.add_column(column, justify="right")
    for key, row in found["ratios"].items():
        ratio = f"{row['ratio']:.2f}x", interval(row, digits=2)
        table.add_row(key.replace("_", " "), _number(found["static"][key]), *ratio, unit(key))
    return table


def _latencies(result: Mapping[str, Any]) -> Table:
    words = ["mean", "median", "std"]
    present = [name for name in LATENCIES if f"mean_{name}_ms" in result]
    suffixes = tuple(f"_{name}_ms" for name in present)
    keys = [key for key in result if present and key.endswith(suffixes)]
    percentiles = list(dict.fromkeys(key.split("_", 1)[0] for key in keys if key[0] == "p"))
    percentiles = [word for word in percentiles if word != "p50"]  # the median
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("ms")
    for word in (*words, *percentiles):
        table.add_column(word, justify="right")
    for name in present:
        table.add_row(_NAMES[name], *(_number(result.get(f"{word}_{name}_ms")) for word in (*words, *percentiles)))
    return table


def print_verdict(result: Mapping[str, Any], console: Console) -> None:
    """A line a gate, those that failed first, then what else is to be known."""
    for word, said in lines(result):
        console.print(Text.assemble((f"{word}  ", _COLOURS[word]), said))
    for note in result.get("notes") or ():
        console.print(Text.assemble(("note  ", "yellow"), note))


def _spread(result: Mapping[str, Any], key: str) -> str:
    interval = (result.get("confidence") or {}).get(key)
    return f" ± {_number(interval['half_width'])}" if interval and interval["half_width"] is not None else ""


def _number(value: object) -> str:
    """With a digit more than ``units.brief``: these are read against another run's."""
    if not isinstance(value, int | float):
        return "-"
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    size = abs(value)
    return (
        f"{value:,.0f}"
        if size >= 1000
        else f"{value:.1f}"
        if size >= 100
        else f"{value:.2f}"
        if size >= 1
        else f"{value:.3g}"
    )
