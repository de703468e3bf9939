"""The result of ``bench compare`` in text: tables, Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmctl.bench import report
from llmctl.bench.table import print_verdict
from llmctl.bench.units import figure, interval, quantity, unit
from llmctl.bench.verdict import headline

_SHOWN = ("median_", "p99_")


def shown_ratios(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The ratios that a person is shown: those compared, then speeds, medians and 99th percentiles."""
    rows = result["ratios"].items()
    return [
        (name, row) for name, row in rows if row["decision"] or name.startswith(_SHOWN) or name.endswith("throughput")
    ]


def print_comparison(result: Mapping[str, Any], title: str, console: Console) -> None:
    """The verdict first, then the ratios."""
    console.print(f"[bold]{title}: {headline(result)}[/]", highlight=False)
    print_verdict(result, console)
    for letter in ("a", "b"):
        console.print(f"{letter.upper()}: {_served(result[letter])}", markup=False, highlight=False)
    if not result["ratios"]:
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("metric", no_wrap=True)
    for column in ("A", "B", "B/A", "interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in shown_ratios(result):
        table.add_row(_with_unit(name), figure(row["a"]), figure(row["b"]), f"{row['ratio']:.3f}", interval(row))
    console.print(table)
    console.print(level(result), highlight=False)


def _served(side: Mapping[str, Any]) -> str:
    version = f", version {side['version']}" if side["version"] else ""
    return f"{side['served']} (model {side['model_id']}{version})"


def _with_unit(metric: str) -> str:
    return f"{metric.removesuffix('_ms')}, {unit(metric)}" if unit(metric) else metric


def level(result: Mapping[str, Any]) -> str:
    """How many rounds the ratios are of, and what their intervals are."""
    row = next(iter(result["ratios"].values()))
    return f"{result['num_rounds']} of at most {result['max_rounds']} rounds; {row['method']}, {row['confidence']:.2%}"


def to_markdown(result: Mapping[str, Any], title: str) -> str:
    """The verdict, and the ratios and the set-up folded away."""
    sides = [f"- {letter.upper()}: {report.cell(_served(result[letter]))}" for letter in ("a", "b")]
    rows = [
        [
            name,
            *(quantity(name, row[letter]) for letter in ("a", "b")),
            f"{row['ratio']:.3f}",
            interval(row),
            row["decision"] or "",
        ]
        for name, row in result["ratios"].items()
    ]
    table = report.table(["metric", "A", "B", "B/A", "interval", ""], rows)
    ratios = [*table, "", f"{level(result)}."] if rows else ["no whole round"]
    return "\n".join(
        [
            *report.verdict_markdown(result, title),
            *sides,
            "",
            *report.folded("Ratios", ratios),
            "",
            report.where(result),
            "",
        ]
    )


def to_csv(result: Mapping[str, Any]) -> str:
    """A header, and a row a visit."""
    visits = [
        {"round": number, "order": played["order"], "place": place, **visit}
        for number, played in enumerate(result["rounds"], start=1)
        for place, visit in enumerate(played["visits"], start=1)
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(visits[0]) if visits else ["round"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(visits)
    return out.getvalue()
