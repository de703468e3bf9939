"""Every recipe in configs/bench runs: through the command line, with only its size cut down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from fake_openai_server import FakeServer

FOLDER = Path(__file__).parents[2] / "configs" / "bench"
RECIPES = sorted(FOLDER.glob("*.yaml"))
OFFLINE = ("throughput", "latency")


def run(bench: Callable[..., Result], *args: str) -> dict[str, Any]:
    result = bench(*args, "--json")
    assert result.exit_code == 0, result.stderr
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


def test_there_are_recipes() -> None:
    assert {"smoke", "c8", "c32", "ci-gate", *OFFLINE} <= {p.stem for p in RECIPES}


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem not in OFFLINE], ids=lambda p: p.stem)
def test_serve_recipes(
    path: Path,
    bench: Callable[..., Result],
    start: Callable[..., FakeServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    fake = start()
    small = ("--num-prompts", "3", "--request-rate", "inf", "--output-len", "3")
    doc = run(bench, "serve", "--config", str(path), "--base-url", fake.url, *small)
    options = yaml.safe_load(path.read_text())
    assert doc["label"] == options.get("label")
    assert doc["max_concurrency"] == options.get("max-concurrency")
    assert doc["workload"]["input_len"] == options["input-len"]
    assert doc["num_repeats"] == options.get("repeats", 1)
    objectives = [f"{g['metric']}{g['op']}{g['limit']:g}" for g in doc["gates"] if g["kind"] == "slo"]
    assert objectives == options.get("slo", [])
    for key in ("junit", "markdown", "result-filename"):
        assert key not in options or (tmp_path / options[key]).is_file()


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_recipes(name: str, bench: Callable[..., Result], tiny_engine: Path) -> None:
    small = {"throughput": ("--num-prompts", "2"), "latency": ("--num-iters", "1", "--num-iters-warmup", "0")}[name]
    short = ("--output-len", "3", "--kv-cache-memory", "8MiB", "--input-len", "4")
    doc = run(bench, name, "--config", str(FOLDER / f"{name}.yaml"), "--model", str(tiny_engine), *small, *short)
    assert doc["kind"] == name
    assert doc["completed"] > 0
