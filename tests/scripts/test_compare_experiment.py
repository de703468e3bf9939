"""The experiment on ``bench compare``, on rounds that are made up: what it counts, and what it keeps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import compare_experiment as experiment  # noqa: E402

from llmctl.bench.compare import Rules, round_document  # noqa: E402
from llmctl.bench.config import BenchCompareConfig  # noqa: E402
from llmctl.bench.looks import Looks  # noqa: E402
from llmctl.bench.rounds import ORDERS, Round, Visit  # noqa: E402
from llmctl.bench.sides import EngineSide  # noqa: E402
from llmctl.errors import LlmctlError  # noqa: E402

RULES = Rules(("output_throughput",), 0.025, Looks(14, 0.01))


def rounds(ratio: float, noise: float, count: int = 12) -> list[Round]:
    rng = np.random.default_rng(5)

    def visit(side: str) -> Visit:
        speed = (100 * ratio if side == "b" else 100) * math.exp(noise * rng.normal())
        return Visit(side, "20260101-000000", {"output_throughput": speed, "failed_ratio": 0.0}, [])

    return [Round(ORDERS[i % 2], 0.1, tuple(visit(one) for one in ORDERS[i % 2].lower())) for i in range(count)]


def test_verdicts_of_drawn_comparisons_are_counted() -> None:
    busy = [*rounds(0.6, 0.01, 6), *rounds(1 / 0.6, 0.01, 6)]
    recorded = {"equal": rounds(1.0, 0.003), "slowed": rounds(0.95, 0.003), "busy": busy}
    found = {kind: experiment.resample(RULES, played, 8, seed=1) for kind, played in recorded.items()}
    for kind, verdict in (("equal", "pass"), ("slowed", "regression"), ("busy", "undecided")):
        assert {decision for decision, _ in found[kind]} == {verdict}
    assert {at for _, at in found["equal"]} <= {10, 14} == {10, *(at for _, at in found["busy"])}
    written = experiment.table("Drawn:", found)
    assert "| equal | 8 | 0.00% | 100.00% | 0.00% | " in written
    assert "| slowed | 8 | 100.00% | 0.00% | 0.00% | " in written
    assert "| busy | 8 | 0.00% | 0.00% | 100.00% | 14 |" in written


def test_made_up_rounds_have_the_noise_and_the_slowdown_asked_for() -> None:
    rng = np.random.default_rng(1)
    logs = [experiment._made_up(i, 0.05, 0.02, rng).log_ratio("output_throughput") for i in range(400)]
    assert np.mean(logs) == pytest.approx(math.log(0.95), abs=0.004)
    assert np.std(logs) == pytest.approx(0.02, rel=0.15)
    assert experiment.simulate(RULES, 0.05, 0.003, 3, seed=1) == 3 * [("regression", 10)]


def test_rounds_are_kept_as_they_were() -> None:
    for played in rounds(0.9, 0.1, 2):
        assert experiment.round_of(json.loads(json.dumps(round_document(played)))) == played


def test_the_slowed_side_does_so_much_less_in_the_same_time() -> None:
    a, b = experiment.sides_of("slowed", "m", ["--threads", "2"], 0.05)
    assert isinstance(b, experiment.SlowedSide)
    assert 1 / (1 + b.share) == pytest.approx(0.95)
    assert (b.served, b.options) == ("m", ("--threads", "2"))
    assert a == EngineSide("m", ("--threads", "2")) == experiment.sides_of("equal", "m", ["--threads", "2"], 0.05)[1]


def test_rounds_of_another_experiment_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--model", "m", "--work", str(tmp_path)])
    args = experiment.arguments()
    config, path = experiment.configured(args), tmp_path / "x.json"
    for _ in range(2):
        experiment.check_kept(path, experiment.experiment_document(config, args), "another")
    monkeypatch.setattr(experiment, "__version__", "0.0.0")
    args.slowdown = 0.1
    with pytest.raises(
        LlmctlError, match=r"another: slowdown 0\.05 there, 0\.1 here; version '.*' there, '0\.0\.0' here"
    ):
        experiment.check_kept(path, experiment.experiment_document(config, args), "another")


def test_live_comparisons_of_other_rules_are_not_mixed_in(tmp_path: Path) -> None:
    config, path = BenchCompareConfig(), tmp_path / "x.json"
    experiment.check_kept(path, experiment.rules_document(RULES, config), "other rules")
    for rules in (replace(RULES, allowed=0.05), replace(RULES, looks=Looks(30, 0.01)), replace(RULES, metrics=("x",))):
        with pytest.raises(LlmctlError, match=r"other rules: (allowed|looks|metrics) .* there"):
            experiment.check_kept(path, experiment.rules_document(rules, config), "other rules")


def test_steps_of_a_worker_are_slowed_and_of_nothing_else() -> None:
    environment = {"PYTHONPATH": f"{SCRIPTS / 'slowed'}:{SCRIPTS.parent}", "SLOWED_STEPS": "0.5"}
    code = "import sys; sys.exit('llmctl.engine.llm_engine' in sys.modules)"
    plain = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (plain.returncode, plain.stderr) == (0, "")
    worker = subprocess.run(
        [sys.executable, "-m", "llmctl.serving.worker"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "slowed: every step takes 1.5000 times as long" in worker.stderr
