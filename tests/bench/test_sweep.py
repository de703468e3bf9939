"""``llmctl bench sweep`` on scripted servers and played loads: points, search, variants, quality, files, Ctrl-C."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from fake_openai_server import FakeServer, Reply

from llmctl.bench import sweep as sweep_module
from llmctl.bench import sweep_measure
from llmctl.bench.sweep import mark_knees
from llmctl.bench.sweep_measure import costs
from llmctl.bench.sweep_plan import Level, Variant
from llmctl.bench.sweep_view import SweepView
from llmctl.errors import LlmctlError

Start = Callable[..., FakeServer]
Bench = Callable[..., Result]

SMALL = ("--num-prompts", "6", "--input-len", "4", "--output-len", "3", "--num-warmups", "0", "--json")


def document(result: Result, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, result.stderr
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


def test_every_load_is_a_point(start: Start, bench: Bench) -> None:
    fake = start(Reply(first_delay=0.002))
    options = ("--max-concurrency", "1,3", "--repeats", "2", "--goodput", "ttft:20000", "--price-per-hour", "2.5")
    result = bench("sweep", "--base-url", fake.url, *options, *SMALL)
    doc = document(result)
    assert [(p["request_rate"], p["max_concurrency"]) for p in doc["points"]] == [("inf", 1), ("inf", 3)]
    assert (doc["kind"], doc["axis"], doc["exit_code"]) == ("sweep", "max_concurrency", 0)
    for point in doc["points"]:
        assert (point["completed"], point["failed"], len(point["repeats"])) == (12, 0, 2)
        assert point["output_throughput"] == pytest.approx(36 / point["duration"])
        assert point["goodput_ratio"] == 1
        assert point["meets"]
        assert point["max_concurrent_requests"] <= point["max_concurrency"]
        hours = point["duration"] / 3600
        assert point["cost_per_million_tokens"]["output"] == pytest.approx(2.5 * hours / 36 * 1e6)
    assert len({seen.body["prompt"] for seen in fake.seen}) == 24, "no prompt twice: no cache of prefixes helps"
    for line in ("1 at once: ", "3 at once: "):
        assert result.stderr.count(line) == 2, "a line each time that a point is measured"


@pytest.mark.usefixtures("played")
def test_loads_go_there_and_back(start: Start, bench: Bench) -> None:
    fake = start()
    options = ("--request-rate", "200,400,800", "--repeats", "2", "--num-prompts", "2")
    result = bench("sweep", "--base-url", fake.url, *SMALL[2:], *options)
    document(result)
    assert re.findall(r"^(\d+) req/s", result.stderr, re.MULTILINE) == ["200", "400", "800", "800", "400", "200"]


def test_failed_requests(start: Start, bench: Bench) -> None:
    args = ("--base-url", start(Reply("http_500")).url, "--max-concurrency", "2", *SMALL)
    (point,) = document(bench("sweep", *args), 3)["points"]
    assert (point["meets"], point["failed"]) == (False, 6)


@pytest.mark.usefixtures("played")
def test_objectives(start: Start, bench: Bench) -> None:
    args = ("--base-url", start().url, "--max-concurrency", "1,7", "--num-prompts", "21", *SMALL[2:])
    doc = document(bench("sweep", *args, "--slo", "p99_ttft_ms<=5"), 4)
    assert [p["missed"] for p in doc["points"]] == [["p99_ttft_ms<=5"]] * 2
    doc = document(bench("sweep", *args, "--slo", "p99_ttft_ms<=25"))
    assert [(p["meets"], p["settled"]) for p in doc["points"]] == [(True, False), (False, True)]


def test_find_max_finds_what_the_server_holds(start: Start, bench: Bench, played: list[str]) -> None:
    options = ("--find-max", "--max-concurrency", "1", "--slo", "p90_ttft_ms<=25")
    result = bench("sweep", "--base-url", start().url, *options, *SMALL)
    doc = document(result)
    (found,) = doc["find_max"]
    assert (found["axis"], found["highest"], found["missed"]) == ("max_concurrency", 6, 7)
    assert found["resolution"] == pytest.approx(1 / 6)
    assert found["settled"]
    assert [trial["load"] for trial in found["trials"]] == [1, 2, 4, 8, 6, 7]
    # What meets a p90 is not settled before 42 requests; what misses it altogether after the first round. A round is
    # 11 requests, and at least three for each that is under way.
    assert [trial["requests"] for trial in found["trials"]] == [44, 44, 48, 24, 54, 21]
    assert len(set(played)) == len(played) == 235, "no prompt twice: no cache of prefixes helps"
    assert doc["gates"][1]["metric"] == "highest_max_concurrency"
    assert "highest load that meets the objectives: 6 requests at once; 7 miss them" in result.stderr


@pytest.mark.usefixtures("played")
def test_a_round_of_a_search_is_large_enough_to_be_its_load(start: Start, bench: Bench) -> None:
    options = ("--find-max", "--request-rate", "2", "--slo", "median_ttft_ms<=25", "--resolution", "50%")
    trials = document(bench("sweep", "--base-url", start().url, *options, *SMALL))["find_max"][0]["trials"]
    assert [(round(t["load"], 2), t["requests"]) for t in trials] == [(2, 20), (4, 40), (8, 80), (5.66, 57)]


@pytest.mark.usefixtures("played")
def test_find_max_that_finds_nothing_is_a_missed_objective(start: Start, bench: Bench) -> None:
    options = ("--find-max", "--max-concurrency", "2", "--slo", "p99_ttft_ms<=0.0001")
    result = bench("sweep", "--base-url", start().url, *SMALL, *options)
    (found,) = document(result, 4)["find_max"]
    assert (found["highest"], found["missed"], found["settled"]) == (None, 1, True)
    assert "no load met the objectives" in result.stderr


@pytest.fixture
def served(start: Start, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """Our servers are scripted ones; what was started, in order. A model named ``broken`` does not start."""
    started: list[tuple[str, tuple[str, ...]]] = []

    @contextlib.contextmanager
    def serving(model: str, options: Sequence[str], **_: Any) -> Iterator[Any]:
        if model == "broken":
            raise LlmctlError("the server ended with exit code 1 before it was ready")
        started.append((model, tuple(options)))
        yield SimpleNamespace(url=start().url)

    monkeypatch.setattr(sweep_module, "serving", serving)
    return started


@pytest.mark.usefixtures("played")
def test_variants_are_measured_in_turns(served: list[tuple[str, tuple[str, ...]]], bench: Bench) -> None:
    options = ("--engine", "e", "--vary", "max-num-seqs=8,32", "--max-concurrency", "1,2", "--repeats", "2")
    doc = document(bench("sweep", *options, *SMALL))
    words = [dict(zip(o[::2], o[1::2], strict=True))["--max-num-seqs"] for _, o in served]
    assert words == ["8", "32", "32", "8"]
    assert [(p["variant"], p["max_concurrency"]) for p in doc["points"]] == [
        ({"max-num-seqs": seqs}, n) for seqs in ("8", "32") for n in (1, 2)
    ]
    assert [g["note"] for g in doc["gates"]] == ["max-num-seqs=8", "max-num-seqs=32"]


@pytest.mark.usefixtures("played", "served")
def test_a_variant_that_does_not_start_is_told_and_the_rest_is_measured(bench: Bench) -> None:
    result = bench("sweep", "--vary", "model=broken,good", "--max-concurrency", "1", *SMALL)
    doc = document(result, 1)
    assert doc["refused"] == [
        {"variant": {"model": "broken"}, "reason": "the server ended with exit code 1 before it was ready"}
    ]
    assert [p["variant"] for p in doc["points"]] == [{"model": "good"}]
    assert "model=broken: not measured: the server ended" in result.stderr
    result = bench("sweep", "--vary", "model=broken", "--max-concurrency", "1", *SMALL)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: the server ended with exit code 1")


@pytest.mark.usefixtures("played", "served")
def test_quality_beside_speed(bench: Bench, tmp_path: Path, tiny_engine: Path) -> None:
    file = tmp_path / "quality.yaml"
    file.write_text(f"text: builtin\ncontext: 32\nwindows: 2\nagainst: {tiny_engine}\nmin-agreement: 100%\n")
    args = ("sweep", "--engine", str(tiny_engine), "--max-concurrency", "1", *SMALL, "--quality", str(file))
    doc = document(bench(*args))
    (quality,) = doc["quality"]
    assert quality["perplexity"] > 1
    assert quality["kl"] == pytest.approx(0, abs=1e-6)
    assert [g["metric"] for g in doc["gates"]] == ["points_without_failures", "top1_agreement"]
    file.write_text(file.read_text() + "max-kl: -1\n")
    assert document(bench(*args), 4)["gates"][1]["metric"] == "kl"
    file.write_text("modle: x\n")
    result = bench(*args)
    assert result.exit_code == 2
    assert f"--quality {file}: unknown option 'modle'" in result.stderr


@pytest.mark.usefixtures("played")
def test_a_search_that_ends_before_a_load_is_decided(
    start: Start, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round of the four that the load needs: nothing is known, and what was measured is kept all the same."""
    run_once = sweep_measure.run_once
    runs: list[int] = []

    def once(*args: Any) -> Any:
        runs.append(1)
        if len(runs) == 2:
            raise sweep_measure._TimeUpError
        return run_once(*args)

    monkeypatch.setattr(sweep_measure, "run_once", once)
    page = tmp_path / "s.html"
    options = ("--find-max", "--request-rate", "1", "--slo", "p99_ttft_ms<=50", "--html", str(page))
    result = bench("sweep", "--base-url", start().url, *options, *SMALL)
    doc = document(result, 4)
    assert (doc["find_max"][0]["trials"], len(doc["points"])) == ([], 1)
    assert "the search ended before a load was decided" in result.stderr
    assert "no load was decided" in doc["gates"][1]["note"]
    assert page.exists()


@pytest.mark.usefixtures("played", "served")
def test_what_names_another_server_is_refused_beside_our_own(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (("--host", "h"), ("--port", "1"), ("--api-key", "k"), ("--insecure",)):
        result = bench("sweep", "--engine", "e", *words, *SMALL)
        assert result.exit_code == 2
        assert f"{words[0]}: is of another server" in result.stderr
    monkeypatch.setenv("OPENAI_API_KEY", "of-another")
    document(bench("sweep", "--engine", "e", "--max-concurrency", "1", *SMALL))


def test_our_server_has_as_long_to_start_as_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def serving(*_: Any, ready_timeout: float, **__: Any) -> Any:
        asked.append(ready_timeout)
        raise LlmctlError("no")

    monkeypatch.setattr(sweep_module, "serving", serving)
    for words in ((), ("--ready-timeout", "5"), ("--ready-timeout", "1800")):
        assert bench("sweep", "--engine", "e", "--max-concurrency", "1", *words, *SMALL).exit_code == 1
    assert asked == [300, 5, 1800]


@pytest.mark.usefixtures("played")
def test_files(start: Start, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    names = {kind: tmp_path / f"out/s.{kind}" for kind in ("html", "svg", "csv", "json")}
    options = [word for kind in ("html", "svg", "csv") for word in (f"--{kind}", str(names[kind]))]
    options += ["--junit", str(tmp_path / "j.xml"), "--markdown", str(tmp_path / "m.md"), "--label", "<a|b>"]
    options += ["--result-dir", str(tmp_path / "out"), "--result-filename", "s.json"]
    fake = start(Reply(first_delay=0.002))
    args = (
        "--base-url",
        fake.url,
        "--max-concurrency",
        "1,2,4",
        "--slo",
        "p99_ttft_ms<=20000",
        "--price-per-hour",
        "1",
    )
    doc = document(bench("sweep", *args, *SMALL, *options, "--goodput", "ttft:20000"))
    assert json.loads(names["json"].read_text()) == doc
    drawn = ET.fromstring(names["svg"].read_text())
    assert len(drawn.findall(".//{http://www.w3.org/2000/svg}polyline")) == 6, "five latencies and goodput"
    page = names["html"].read_text()
    assert page.count("<svg") == 6
    assert "objective 20000 ms" in page
    assert "Cost of a million tokens" in page
    assert not re.search(r"(src|href)=|@import|url\(", page), "it loads nothing"
    assert doc["points"][0]["knee"] + doc["points"][1]["knee"] + doc["points"][2]["knee"] == 1
    assert "knee" in page
    table = list(csv.DictReader(names["csv"].open()))
    assert [row["max_concurrency"] for row in table] == ["1", "2", "4"]
    assert float(table[2]["output_throughput"]) == doc["points"][2]["output_throughput"]
    markdown = (tmp_path / "m.md").read_text()
    assert markdown.startswith("### llmctl bench sweep: passed")
    assert markdown in (tmp_path / "summary.md").read_text()
    cases = ET.parse(tmp_path / "j.xml").getroot().findall(".//testcase")
    assert [case.get("name") for case in cases] == ["points_without_failures >= 1", "points_that_meet >= 1"]


@pytest.mark.usefixtures("played")
def test_ctrl_c_keeps_what_was_measured(
    start: Start, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_once = sweep_measure.run_once
    runs = 0

    def cut(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise KeyboardInterrupt
        return run_once(*args)

    monkeypatch.setattr(sweep_measure, "run_once", cut)
    page = tmp_path / "s.html"
    args = ("--base-url", start().url, "--max-concurrency", "1,2,4,6", "--html", str(page), *SMALL)
    doc = document(bench("sweep", *args), 130)
    assert [p["max_concurrency"] for p in doc["points"]] == [1, 2]
    assert doc["interrupted"]
    assert "interrupted" in page.read_text()


def test_time_that_is_up_ends_the_sweep(start: Start, bench: Bench) -> None:
    fake = start(Reply(first_delay=0.2))
    result = bench("sweep", "--base-url", fake.url, "--max-concurrency", "1,2", *SMALL, "--max-duration", "0.3")
    doc = document(result)
    (point,) = doc["points"]
    assert doc["time_up"]
    assert 1 <= point["completed"] < 6
    assert point["completed"] + point["not_sent"] == 6
    assert "--max-duration was over" in result.stderr


def test_cost_and_knee() -> None:
    figures = {"duration": 1800.0, "total_input_tokens": 1_000_000, "total_output_tokens": 500_000}
    assert costs(figures, 4.0) == {"input": 2.0, "output": 4.0, "total": pytest.approx(4 / 3)}
    assert costs({**figures, "total_output_tokens": 0}, 4.0)["output"] is None

    def point(speed: float, latency: float | None, label: str = "") -> dict[str, Any]:
        found = {"variant": {"v": label}, "completed": 1, "output_throughput": speed, "median_e2el_ms": latency}
        return {**found, "knee": False}

    points = [point(10, 100), point(19, 105), point(30, 150), point(35, 400), point(9e9, None), point(1, 1, "other")]
    mark_knees(points)
    assert [p["knee"] for p in points] == [False, False, True, False, False, False]


def test_a_terminal_shows_the_table_while_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    figures = {"variant": {}, "request_rate": "inf", "max_concurrency": 4, "output_throughput": 123.4, "failed": 0}
    figures |= {"request_throughput": 5.0, "completed": 6, "cost_per_million_tokens": None, "missed": []}
    point = {**figures, "meets": True, "settled": True, "knee": False}
    view = SweepView()
    drawn: list[int] = []
    shown = view._shown
    monkeypatch.setattr(view, "_shown", lambda: (drawn.append(1), shown())[1])
    view.start("4 at once", 6)
    begun = len(drawn)
    for _ in range(100):
        view.advance()
    assert len(drawn) - begun < 20, "not for every request"
    view._done = 0
    view.advance()
    view.advance(failed=True)
    view.stop()
    view.point(Variant(), Level(max_concurrency=4), point)
    view.log("a note")
    view.close()
    said = screen.getvalue()
    assert "4 at once: 2 of 6 requests, 1 failed" in said
    assert "123" in said
    assert "a note" in said
    assert said.index("a note") < said.rindex("2 of 6"), "lines stay above the table"


@pytest.mark.slow
def test_variants_of_a_real_server(bench: Bench, tiny_engine: Path) -> None:
    options = ("--engine", str(tiny_engine), "--vary", "max-num-seqs=1,4", "--max-concurrency", "1,3", *SMALL)
    doc = document(bench("sweep", *options))
    assert [(p["variant"], p["completed"], p["failed"]) for p in doc["points"]] == [
        ({"max-num-seqs": seqs}, 6, 0) for seqs in ("1", "4") for _ in range(2)
    ]
    result = bench("sweep", "--engine", str(tiny_engine), "--vary", "max-model-len=64,100000", *options[4:])
    doc = document(result, 1)
    assert [p["variant"] for p in doc["points"]] == [{"max-model-len": "64"}] * 2
    assert doc["refused"][0]["variant"] == {"max-model-len": "100000"}
