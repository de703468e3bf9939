"""The mixed load: order of runs, what counts for which class, the table. Without a server, but for one slow run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mixed_load
import pytest
from mixed_load import Run, Setting
from mixed_traffic import CLASSES, Load, Shape, figures

from llmctl.bench.metrics import RequestRecord

SHAPE = Shape(4, 64, 32, 4, 2, 8192, 16, 250, 16, 16)
SCRIPTS = Path(mixed_load.__file__).parent


def record(start: float, *times: float, error: str | None = None) -> RequestRecord:
    """A request whose tokens came at these seconds."""
    return RequestRecord(0, 10, len(times), start=start, end=start + 1, chunk_times=list(times), error=error)


def test_settings_run_forwards_and_backwards() -> None:
    a, b = Setting.parse("a: --itl-target 0"), Setting.parse("b:")
    assert (a, b) == (Setting("a", ("--itl-target", "0")), Setting("b", ()))
    assert [(n, s.name) for n, s in mixed_load.order([a, b], 3)] == [
        *((0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")),
    ]
    with pytest.raises(ValueError, match="expected NAME: OPTIONS"):
        Setting.parse("--itl-target 0")


def test_long_prompts_are_cut_to_the_context() -> None:
    assert SHAPE.within(8192).long_prompt == 8176
    assert SHAPE.within(100_000) == SHAPE


def test_a_chat_goes_on_until_the_load_is_gone() -> None:
    load = Load()
    assert [load.phase(0), load.phase(1)] == ["lead", "lead"]
    load.come = 1.0
    assert load.phase(1) == "chat"
    load.gone = True
    assert [load.phase(1), load.phase(2)] == ["chat", None]


def test_what_counts_for_which_class() -> None:
    records = {
        "alone": [record(0, 0.1, 0.2, 0.3)],
        "lead": [record(9, 9.1, 9.2, 10.2)],  # the load came at 10
        "chat": [record(11, 13, 13.5), record(11, error="cut")],
        "long": [record(10, 19.0)],
        "hog": [record(10, 11, 12), record(10, 30, 31)],
    }
    found = figures(records, alone=1, come=10, seconds=20, limits={"ttft": 2000})
    assert found["chat"]["median_ttft_ms"] == pytest.approx(2000)  # not that of the turn before the load
    assert found["chat"]["median_itl_ms"] == pytest.approx(750)  # 1 s of that turn, 0.5 s of the next
    assert found["chat"]["ratio_median_ttft_ms"] == pytest.approx(20)
    assert found["chat"]["ratio_median_itl_ms"] == pytest.approx(7.5)
    assert [found[name]["goodput_ratio"] for name in CLASSES] == [1, 0.5, 0, 0.5, 0.4]
    assert (found["all"]["completed"], found["all"]["failed"]) == (4, 1)
    assert found["all"]["output_throughput"] == pytest.approx(7 / 20)
    assert [row["count"] for row in found["failures"]] == [1]


def run(setting: str, number: int, ttft: float | None) -> Run:
    """Figures with one latency."""
    empty: dict[str, Any] = {name: {} for name in CLASSES}
    return Run(setting, number, SHAPE, {**empty, "chat": {"median_ttft_ms": ttft}, "failures": []})


def test_the_table_has_medians_ranges_and_ratios_within_a_round() -> None:
    runs = [run("a", 0, 100), run("b", 0, 50), run("b", 1, 100), run("a", 1, 400), run("a", 2, 200), run("b", 2, None)]
    (line,) = mixed_load.table(runs, ["a", "b"])
    assert line == ["chats", "TTFT median, ms", "200 (100 to 400)", "75 (50 to 100)", "0.375 (0.25 to 0.5)"]


def test_failures_are_named_with_their_run() -> None:
    failed = run("a", 1, 5)
    failed.figures["failures"] = [{"kind": "http_429", "count": 3, "messages": ["full"]}]
    assert mixed_load.failures([run("a", 0, 5), failed]) == ["round 2, a: 3 x http_429: full"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--setting", "x"], "expected NAME: OPTIONS"),
        (["--setting", "x:", "--setting", "x:"], "expected different names"),
        (["--setting", "x:", "--rounds", "0"], "--rounds: expected at least 1"),
        (["--setting", "x:", "--goodput", "ttf:1"], "unknown metric"),
    ],
)
def test_bad_usage_starts_no_server(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    sys.argv = ["mixed_load.py", "--model", "/nowhere", *arguments]
    with pytest.raises(SystemExit) as ended:
        mixed_load.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_two_settings_of_a_real_server(tiny_engine: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "mixed_load.py"), "--model", str(tiny_engine), "--rounds", "2"]
    command += ["--setting", "fcfs: --scheduling-policy fcfs", "--setting", "fair:", "--goodput", "ttft:60000"]
    command += [
        "--hog",
        "20",
        "--alone-turns",
        "1",
        "--json",
        str(tmp_path / "found.json"),
        "--",
        "--max-num-seqs",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "| fair / fcfs |" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [run["setting"] for run in found["runs"]] == ["fcfs", "fair", "fair", "fcfs"]
    for run_ in found["runs"]:
        assert run_["figures"]["hog"]["completed"] == 20
        assert run_["figures"]["long"]["completed"] == 2
        assert run_["figures"]["all"]["goodput_ratio"] == 1
        assert run_["shape"]["long_prompt"] == 512 - 16
