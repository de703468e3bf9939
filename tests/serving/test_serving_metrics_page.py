"""What /metrics shows is well-formed, is what docs/metrics.md says, and is all that the Grafana dashboard asks for."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from serving.metrics_page import Series, families, full_page, samples, series

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "configs" / "grafana" / "llmctl.json").read_text())
PAGE = full_page()
WRONG_UNITS = re.compile("_(ms|milliseconds|us|microseconds|ns|minutes|hours|kb|mb|gb|mib|kib|percent)(_|$)")
# vLLM's.
NAMED_AS_A_COUNTER = {"llmctl:iteration_tokens_total"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory and CPU time are read from /proc")


def test_every_series_is_well_formed() -> None:
    """What ``promtool check metrics`` asks, but for the colon in vLLM's names."""
    names = [family.name for family in families(PAGE)]
    assert len(names) == len(set(names))
    for family in families(PAGE):
        assert family.documentation.strip(), family.name
        assert family.type in ("counter", "gauge", "histogram", "summary"), family.name
        assert family.samples, family.name
        assert re.fullmatch("[a-z][a-z0-9_:]*", family.name), family.name
        assert not WRONG_UNITS.search(family.name), family.name
        for sample in family.samples:
            assert all(re.fullmatch("[a-z][a-z0-9_]*", label) for label in sample.labels), sample
            assert "llmctl" not in sample.labels, sample
    for line in PAGE.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            ends = name.endswith("_total") and name not in NAMED_AS_A_COUNTER
            assert ends == (kind == "counter"), name
            assert not name.endswith(("_count", "_sum", "_bucket", "_created")), name


def documented() -> dict[str, Series]:
    """The tables of docs/metrics.md, as ``series`` gives a page."""
    found: dict[str, Series] = {}
    common: set[str] = set()
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells[:2] == ["series", "type"]:
            common = {"labels": {"model_name", "engine"}, "all labels": set[str]()}[cells[2]]
        elif len(cells) == 4 and cells[0].startswith("`"):
            name = cells[0].strip("`")
            if not name.startswith(("http_", "process_", "python_")):
                name = "llmctl:" + name
            assert name not in found, name
            found[name] = Series(cells[1], frozenset(common | set(re.findall("`([^`]+)`", cells[2]))))
    return found


def test_the_documentation_lists_what_is_shown() -> None:
    said, shown = documented(), series(PAGE)
    assert sorted(said.items()) == sorted(shown.items())


def expressions(node: Any) -> list[str]:
    """Every PromQL expression of the dashboard."""
    if isinstance(node, dict):
        return [node["expr"]] if "expr" in node else [e for child in node.values() for e in expressions(child)]
    return [e for child in node for e in expressions(child)] if isinstance(node, list) else []


def metric_selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """The selectors of an expression; refused when it is not PromQL."""
    text = expression.replace("${prefix}", "llmctl").replace("$__rate_interval", "5m")
    found: list[promql_parser.VectorSelector] = []

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(text), visit)
    return found


@pytest.mark.parametrize("expression", expressions(DASHBOARD))
def test_the_dashboard_asks_for_what_is_there(expression: str) -> None:
    selectors = metric_selectors(expression)
    assert selectors
    groups = re.findall(r"(?:by|on|ignoring) \(([^)]*)\)", expression)
    grouped = {label for group in groups for label in group.split(", ")}
    shown = samples(PAGE)
    for selector in selectors:
        labels = shown[selector.name] | {"instance"}  # Prometheus adds where it was scraped
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels
        assert grouped <= labels


def test_the_dashboards_variables_are_those_it_uses() -> None:
    made = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    used = set(re.findall(r"\$\{?([a-z_]+)", text)) - {"__rate_interval", "__all"}
    assert used == made
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {"${datasource}"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            (asked,) = re.findall(r"\$\{prefix\}:(\w+)", variable["query"])
            assert variable["name"] in samples(PAGE)["llmctl:" + asked] | {"instance"}
