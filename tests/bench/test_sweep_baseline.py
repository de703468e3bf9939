"""``bench sweep --baseline``: each load against the same load of an earlier sweep."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from fake_openai_server import FakeServer
from played_loads import Played

from llmctl.bench import sweep as sweep_module
from llmctl.bench import sweep_measure
from llmctl.errors import LlmctlError

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
    unhashable = whole | {"points": [whole["points"][0] | {"variant": {"x": []}}]}
    none = (
        {"completed": 5},
        {"kind": "sweep"},
        {"kind": "sweep", "points": [{}]},
        [],
        whole | {"points": 5},
        unhashable,
    )
    for broken in none:
        Path(missing).write_text(json.dumps(broken))
        code, _, made = sweep("--baseline", missing)
        assert (code, "expected a result of bench sweep" in made.stderr) == (2, True), broken
    for name in ("workload", "environment"):
        Path(missing).write_text(json.dumps(whole | {name: [1]}))
        assert f"damaged: its '{name}' is no object" in sweep("--baseline", missing)[2].stderr
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


class Servers(list[str]):
    """Models that were served, in order. ``dying``: how often each of some is served before it starts no more."""

    def __init__(self) -> None:
        self.dying: dict[str, int] = {}


@pytest.fixture
def servers(start: Start, monkeypatch: pytest.MonkeyPatch) -> Servers:
    served = Servers()

    @contextlib.contextmanager
    def serving(model: str, *_: Any, **__: Any) -> Iterator[Any]:
        if served.count(model) >= served.dying.get(model, 99):
            raise LlmctlError(f"the server of {model} ended")
        served.append(model)
        yield SimpleNamespace(url=start().url)

    monkeypatch.setattr(sweep_module, "serving", serving)
    return served


@pytest.fixture
def vary(servers: Servers, bench: Callable[..., Result], played: Played) -> Sweep:
    """``bench sweep`` of two models of ours."""
    played.noise = 0.005

    def run(*args: str) -> tuple[int, dict[str, Any], Result]:
        small = ("--num-prompts", "6", "--input-len", "4", "--output-len", "3", "--num-warmups", "0", "--json")
        servers.clear()
        made = bench("sweep", "--vary", "model=a,b", "--max-concurrency", "1,4", *small, *args)
        return made.exit_code, json.loads(made.stdout) if made.stdout.strip() else {}, made

    return run


def test_a_server_that_ends_is_an_error_and_no_doubt(
    vary: Sweep, servers: Servers, played: Played, tmp_path: Path
) -> None:
    path = str(tmp_path / "both.json")
    assert vary("--baseline", path, "--update-baseline")[0] == 0
    servers.dying = {"b": 0}
    for slower, more in ((1.0, ()), (1.0, ("--exit-zero",)), (1.2, ("--exit-zero",))):
        played.slower = slower
        code, doc, made = vary("--baseline", path, *more)
        assert (code, doc["exit_code"]) == (1, 1)
        assert not [gate for gate in doc["gates"] if gate["kind"] == "inconclusive"]
        assert made.stderr.splitlines()[-1] == "error: the server of b ended"
    servers.dying = {"b": 1}  # in its second visit
    code, doc, made = vary("--baseline", str(tmp_path / "none.json"), "--allow-missing-baseline", "--repeats", "2")
    assert (code, len(doc["points"])) == (1, 4)
    assert doc["notes"][0].startswith("no baseline yet")
    assert made.stderr.splitlines()[-1] == "error: the server of b ended"


def test_other_work_is_found_before_a_server_is_started_or_at_the_first(
    vary: Sweep, servers: Servers, tmp_path: Path
) -> None:
    path = tmp_path / "both.json"
    assert vary("--baseline", str(path), "--update-baseline")[0] == 0
    code, _, made = vary("--baseline", str(path), "--output-len", "4")
    assert (code, list(servers)) == (2, [])
    assert "output_len '3' there, '4' here" in made.stderr
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"workload": whole["workload"] | {"prompt_length_source": "tokenizer"}}))
    code, _, made = vary("--baseline", str(path))
    assert (code, list(servers)) == (2, ["a"])
    assert "prompt_length_source 'tokenizer' there, 'server' here" in made.stderr
