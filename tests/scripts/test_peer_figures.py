"""Tables and chart of other servers are what was kept of a run, and that is figures alone."""

from __future__ import annotations

import json
from pathlib import Path

import peer_figures
import pytest
from peers.kept import Kept, kept


def test_tables_of_other_servers_are_those_that_were_kept() -> None:
    assert peer_figures.main(["--check"]) == 0, "make peer-table"


def test_a_page_that_says_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = peer_figures.PAGE.read_text(encoding="utf-8")
    changed = tmp_path / "benchmarks.md"
    changed.write_text(page.replace("| 365 (359–365) |", "| 999 (359–365) |"), encoding="utf-8")
    assert changed.read_text(encoding="utf-8") != page
    monkeypatch.setattr(peer_figures, "PAGE", changed)
    monkeypatch.setattr(peer_figures, "CHART", tmp_path / "peers.svg")
    (tmp_path / "peers.svg").write_text("")
    assert peer_figures.main(["--check"]) == 1
    assert peer_figures.main([]) == 0
    assert changed.read_text(encoding="utf-8") == page


def test_of_a_run_only_figures_are_kept() -> None:
    document = json.loads(peer_figures.DATA.read_text(encoding="utf-8"))
    more = {"visits": [1], "command": ["/a/place"], "environment": {}}
    assert kept({**document, **more}) == document


@pytest.mark.parametrize(("key", "said"), [("servers", "no servers"), ("header", "no header")])
def test_what_is_no_report_is_refused(key: str, said: str) -> None:
    document = json.loads(peer_figures.DATA.read_text(encoding="utf-8"))
    del document[key]
    with pytest.raises(ValueError, match=said):
        Kept(document)


def test_a_report_without_a_known_workload_is_refused() -> None:
    document = json.loads(peer_figures.DATA.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="expected figures of some of single, c8, c32"):
        Kept({**document, "summary": {"c9": {}}})


def test_the_chart_has_every_server_and_every_load() -> None:
    measured = Kept(json.loads(peer_figures.DATA.read_text(encoding="utf-8")))
    drawn = peer_figures.chart(measured)
    for title in measured.titles.values():
        assert drawn.count(f">{title}<") == len(measured.workloads)
    assert "1,086 (1,047–1,132)" in drawn
