"""``bench sweep --baseline``: each load against the same load of an earlier sweep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from fake_openai_server import FakeServer
from played_loads import Played

from llmctl.bench import sweep_measure

Start = Callable[..., FakeServer]
Sweep = Callable[..., tuple[int, dict[str, Any], Result]]


@pytest.fixture
def sweep(start: Start, bench: Callable[..., Result], played: Played) -> Sweep:
    """``bench sweep`` of loads that are made up, with a noise of half a percent."""
    played.noise = 0.005
    url = start().url

    def run(*args: str, loads: str = "1,4") -> tuple[int, dict[str, Any], Result]:
        small = ("--num-prompts", "6", "--input-len", "4", "--output-len", "3", "--num-warmups", "0", "--json")
        made = bench("sweep", "--base-url", url, "--max-concurrency", loads, *small, *args)
        return made.exit_code, json.loads(made.stdout) if made.stdout.strip() else {}, made

    return run


@pytest.fixture
def earlier(sweep: Sweep, tmp_path: Path) -> str:
    path = tmp_path / "sweep.json"
    code, doc, made = sweep("--baseline", str(path), "--update-baseline")
    assert (code, doc["num_repeats"]) == (0, 3), made.stderr
    assert path.exists()
    return str(path)


def test_the_same_again_passes_at_every_load(sweep: Sweep, earlier: str) -> None:
    code, doc, _ = sweep("--baseline", earlier)
    assert code == 0
    points = doc["baseline"]["points"]
    assert [(row["max_concurrency"], row["variant"]) for row in points] == [(1, {}), (4, {})]
    assert all(row["delta"]["output_throughput"]["method"] == "student-t" for row in points)
    regressions = [gate for gate in doc["gates"] if gate["kind"] == "regression"]
    assert len(regressions) == 2 * 4
    assert all(gate["passed"] for gate in regressions)


def test_a_load_that_became_slower_is_named(sweep: Sweep, earlier: str, played: Played) -> None:
    played.slower = 1.2
    code, doc, made = sweep("--baseline", earlier)
    assert code == 5
    assert "gate failed: output_throughput at 4 at once fell 17%" in made.stderr
    code, _, _ = sweep("--baseline", earlier, "--max-regression", "30%")
    assert code == 0
    code, doc, _ = sweep("--baseline", earlier, "--update-baseline")
    assert code == 0
    assert doc["baseline"]["points"][0]["delta"]["output_throughput"]["change"] == pytest.approx(1 / 1.2 - 1, rel=0.1)
    assert sweep("--baseline", earlier)[0] == 0, "it was replaced"


def test_confidence_is_shared_out_over_loads(sweep: Sweep, earlier: str, tmp_path: Path) -> None:
    one = str(tmp_path / "one.json")
    assert sweep("--baseline", one, "--update-baseline", loads="4")[0] == 0
    alone = sweep("--baseline", one, loads="4")[1]["baseline"]["points"][0]["delta"]["output_throughput"]
    beside = sweep("--baseline", earlier)[1]["baseline"]["points"][1]["delta"]["output_throughput"]
    assert beside["noise"] > alone["noise"]


@pytest.mark.usefixtures("played")
def test_other_loads_or_work_are_refused(sweep: Sweep, earlier: str, played: Played) -> None:
    before = len(played)
    code, _, made = sweep("--baseline", earlier, loads="1,2")
    assert code == 2
    assert "it measured other loads: 4 at once there alone; 2 at once here alone" in made.stderr
    code, _, made = sweep("--baseline", earlier, "--output-len", "4")
    assert code == 2
    assert "output_len '3' there, '4' here" in made.stderr
    code, _, made = sweep("--baseline", earlier, "--find-max", "--slo", "p99_ttft_ms<=5", loads="1")
    assert (code, "--find-max, --baseline" in made.stderr) == (2, True)
    assert len(played) == before, "nothing was sent"
    assert sweep("--baseline", earlier, "--slo", "p99_ttft_ms<=500")[0] == 0, "an objective is no work"


def test_what_is_no_sweep_is_refused(sweep: Sweep, earlier: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.json")
    assert "make it with --baseline" in sweep("--baseline", missing)[2].stderr
    code, doc, _ = sweep("--baseline", missing, "--allow-missing-baseline")
    assert (code, doc["baseline"]) == (0, None)
    assert doc["notes"][0].startswith("no baseline yet")
    whole = json.loads(Path(earlier).read_text())
    for broken in ({"completed": 5}, {"kind": "sweep"}, {"kind": "sweep", "points": [{}]}, [], whole | {"points": 5}):
        Path(missing).write_text(json.dumps(broken))
        code, _, made = sweep("--baseline", missing)
        assert (code, "expected a result of bench sweep" in made.stderr) == (2, True), broken
    Path(missing).write_text(json.dumps(whole | {"interrupted": True}))
    assert "it is no baseline" in sweep("--baseline", missing)[2].stderr


def test_a_load_for_which_the_time_was_too_short_decides_nothing(
    sweep: Sweep, earlier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never becomes a baseline."""
    before = Path(earlier).read_text()
    now = iter(range(0, 10_000, 60))
    monkeypatch.setattr(sweep_measure, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    for more in ((), ("--update-baseline",)):
        code, doc, made = sweep("--baseline", earlier, "--max-duration", "100", *more)
        assert (code, doc["time_up"]) == (6, True), made.stderr
        assert "undecided: points" in made.stderr
    assert Path(earlier).read_text() == before
