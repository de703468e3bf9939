"""What ``gpu_check.sh --engine`` makes of its figures: traces, targets, reports, charts, another program's times."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from engine_check import (
    chart,
    goals,
    kernel_trace,
    report,
    supervise,
    trial,
)  # fmt: skip
from engine_check_cases import RESULTS, W4, decode

# Traces


def test_gaps_of_a_trace() -> None:
    spans = [(0.0, 4.0, "a"), (5.0, 5.0, "b<int>(x)"), (8.0, 4.0, "c")]
    assert kernel_trace.gaps(spans) == [1.0, 0.0]
    assert (kernel_trace.busy(spans), kernel_trace.span(spans)) == (11.0, 12.0)
    twice = [*spans, *((start + 100, us, name) for start, us, name in spans)]
    found = kernel_trace.replay_gaps(twice, 2)
    assert (found["kernels"], found["busy us"], found["gap us in the trace"]) == (3, 11.0, 1.0)
    assert found["us by kernel"] == {"b": 5.0, "a": 4.0, "c": 4.0}
    with pytest.raises(ValueError, match="3 kernels traced in 2 replays"):
        kernel_trace.replay_gaps(spans, 2)


def test_gaps_between_steps_are_the_largest() -> None:
    spans = [(start + 10 * step + 3 * (step == 2), 3.0, "k") for step in range(3) for start in (0.0, 4.0)]
    found = kernel_trace.engine_gaps(spans, 3)
    assert found["idle share"] == pytest.approx((1 + 3 + 1 + 6 + 1) / 30)
    assert found["between steps"] == pytest.approx((3 + 6) / 30)
    assert found["longest gap us"] == 6.0


# Targets, reports, charts


def test_targets_are_reached_missed_or_not_measured() -> None:
    words = {v.goal.name.partition(":")[0]: (v.word, v.found) for v in goals.judge(RESULTS)}
    assert words["small models as the reference"][0] == "reached"
    assert words["one stream, 4-bit, 128 in, 256 out"] == ("reached", "305 tok/s (over HTTP)")
    assert words["one stream, 4-bit, 128 in"][0] == "MISSED"
    assert words["64 at once, 4-bit, 512 in, 256 out"] == ("reached", "4,100 tok/s (in process)")
    assert words["64 at once, bf16, 512 in, 256 out"] == ("not measured", "")
    assert words["decode steps"] == ("MISSED", "1.10 × (the worst of 2 cases: 4-bit B64 L512)")
    assert words["idle in a decode step"] == ("MISSED", "4.0% (batch 64, 4-bit)")
    assert words["idle between decode steps"][0] == "reached"
    assert words["prefill of 8,192 tokens"] == ("reached", "60.0% (Llama-3-8B 4-bit)")
    assert words["start to ready, 4-bit"][0] == "reached"


def test_nothing_measured_is_no_target_reached() -> None:
    assert all(v.reached is None for v in goals.judge({}))


def test_a_wrong_model_is_a_failure() -> None:
    found = report.as_document(
        {"measured": True}, supervise.Report({"right": {"w8": {"wrong": ["x"], "wrong in all": 3}}})
    )
    assert report.failed(found) == ["w8: x"]
    assert goals.judge(found["results"])[0].word == "MISSED"


def test_report_files(tmp_path: Path) -> None:
    grown = supervise.Report(
        {**RESULTS, "facts": {"card": "a GPU"}}, ["decode x: gone"], ["trial: no time left"], {"right": 3.2}
    )
    report.write(tmp_path, {"date": "today", "measured": True}, grown)
    document = json.loads((tmp_path / "gpu_engine.json").read_text())
    assert document["facts"] == {"date": "today", "measured": True, "card": "a GPU"}
    text = (tmp_path / "gpu_engine.md").read_text()
    assert "| Llama-3-8B 4-bit | 64 | 512 | 11.000 | 1.0% | 5,818 | 2,000 | 67% | 1.10 |" in text
    assert "| Llama-3-8B 4-bit | 8,192 | 300.0 | 27,000 | 420 | 60% | 2.0 |  |" in text
    assert "## Failed\n\n* decode x: gone" in text
    assert "## Left out\n\n* trial: no time left" in text
    assert "Qwen" not in text
    for name in ("gpu_engine.svg", "gpu_engine_prefill.svg"):
        ET.fromstring((tmp_path / name).read_text())
    assert not list(tmp_path.glob(".*"))


def test_a_dry_run_has_reached_no_target(tmp_path: Path) -> None:
    report.write(tmp_path, {"measured": False}, supervise.Report(RESULTS))
    table = (tmp_path / "gpu_engine.md").read_text().partition("## Targets")[2].partition("##")[0]
    assert "305 tok/s" not in table
    assert table.count("not measured") == len(goals.GOALS) - 1


def test_charts_have_a_point_for_every_case_and_the_bound() -> None:
    text = chart.decode_chart(RESULTS)
    assert text is not None
    assert text.count("<circle") == 2
    assert text.count("<polyline") == 2
    assert "read bound" in text
    assert chart.charts({}) == {}
    slow = {"models": {W4: {"decode": {"B1 L512": decode(1, 512, 3.0)}}}}
    assert "bound" not in chart.charts(slow)["gpu_engine.svg"]


def test_the_trial_is_read_and_compared(tmp_path: Path) -> None:
    document = {
        "results": {
            "w4 B1 L512": {"ms": 3.0}, "w4 B1 L512 graph for 8192": {"ms": 9.0}, "bfloat16 B64 L512": {"ms": 8.0},
            "w4 prefill 512": {"eager ms": 22.0, "graph ms": 20.0}, "rates": {"copy GB/s": 1}, "seconds": {"x": 1},
        },
        "problems": ["one"],
    }  # fmt: skip
    (tmp_path / "source.json").write_text(json.dumps(document))
    found = trial.run_trial(
        f"cp {tmp_path / 'source.json'} $OUT/trial.json; test $TRIAL_SECONDS = 16", tmp_path / "o", 20
    )
    assert found["ending"] == "exit code 0"
    assert found["decode"] == {"4-bit": {"B1 L512": 3.0}, "bf16": {"B64 L512": 8.0}}
    assert found["prefill"] == {"4-bit": {"512": 20.0}}
    ours = {"trial": found, "models": {W4: {"decode": {"B1 L512": decode(1, 512, 3.3)}}}}
    assert trial.ratios(ours) == {"4-bit B1 L512": pytest.approx(1.1)}
    with pytest.raises(RuntimeError, match="exit code 3, and no trial"):
        trial.run_trial("echo broken; exit 3", tmp_path / "empty", 20)
    with pytest.raises(RuntimeError, match="ended after 1 s"):
        trial.run_trial("exec sleep 30", tmp_path / "slow", 1)
