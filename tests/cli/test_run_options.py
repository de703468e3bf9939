"""The options of a run as ``serve`` and the offline benches take them, and how memory is shown; nothing is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_gptq
from typer.testing import CliRunner

from llmctl.artifact.request import EngineRequest
from llmctl.bench import offline
from llmctl.cli.main import app
from llmctl.config import EngineOptions
from llmctl.serving import launch
from llmctl.targets.cuda import target as cuda
from llmctl.targets.cuda.device import CudaDevice

FLAGS = {
    "--kv-cache-dtype": "fp8",
    "--gpu-memory-utilization": "0.8",
    "--max-num-seqs": "7",
    "--max-num-batched-tokens": "99",
    "--max-model-len": "512",
    "--dtype": "float16",
    "--target": "cuda",
}
COMMANDS = {"serve": "run_server", "bench throughput": "run_throughput", "bench latency": "run_latency"}


class Caught(Exception):
    """The settings that a command would have run with."""

    settings: EngineOptions


@pytest.fixture(params=COMMANDS)
def settings_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command line makes of the settings, for each command that runs an engine."""

    def catch(settings: EngineOptions, *_: object) -> None:
        caught = Caught()
        caught.settings = settings
        raise caught

    module = launch if request.param == "serve" else offline
    monkeypatch.setattr(module, COMMANDS[request.param], catch)

    def parse(*args: str) -> EngineOptions:
        result = CliRunner().invoke(app, [*request.param.split(), "--model", "m", *args])
        assert isinstance(result.exception, Caught), result.output
        return result.exception.settings

    return parse


def test_every_flag_arrives(settings_of: Any) -> None:
    found = settings_of(*(word for pair in FLAGS.items() for word in pair), "--enforce-eager")
    request = EngineRequest.of(found)
    assert (request.kv_cache_dtype, request.gpu_memory_utilization) == ("fp8_e4m3", 0.8)
    assert (request.max_num_seqs, request.max_num_batched_tokens, request.max_model_len) == (7, 99, 512)
    assert (request.enforce_eager, request.dtype, request.target) == (True, "float16", "cuda")


def test_what_is_not_given_is_the_targets(settings_of: Any) -> None:
    assert EngineRequest.of(settings_of()) == EngineRequest()


def test_a_yaml_file_says_the_same(settings_of: Any, tmp_path: Path) -> None:
    lines = [f"{flag[2:]}: {value}" for flag, value in FLAGS.items()]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "enforce-eager: true"]))
    found = EngineRequest.of(settings_of("--config", str(tmp_path / "c.yaml")))
    assert (found.kv_cache_dtype, found.gpu_memory_utilization, found.enforce_eager) == ("fp8_e4m3", 0.8, True)


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_device", lambda: CudaDevice((9, 0), (13, 0), 2**30))
    monkeypatch.setattr(cuda, "held_bytes", lambda _: 2**26)


@pytest.mark.usefixtures("gpu")
def test_a_plan_for_this_machines_gpu(tmp_path: Path) -> None:
    model = write_gptq(tmp_path / "tiny")
    plan = ("build", "--model", model, "--target", "cuda", "--dry-run")
    shown = run(*plan)
    assert max(map(len, shown.splitlines())) <= 80
    for text in ("tiny for cuda:sm_90, float16", "not quantized, float16", "device context", "sequences of 512 tokens"):
        assert text in shown
    assert "budget: 0.9 of the GPU's 1.0 GiB, less 0.1 GiB that others hold" in shown
    document = json.loads(run(*plan, "--json"))
    assert document["memory_budget_bytes"] == int(2**30 * 0.9) - 2**26
    assert document["unquantized"]["weights_bytes"] > document["weights_bytes"]
    short = run(*plan, "--memory-budget", "768.5MiB", code=1)
    assert "does not fit: memory: expected at most 768.5 MiB (the budget that was given)" in short
    assert "free memory" in short


def test_a_target_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_device", lambda: None)
    model = write_gptq(tmp_path / "tiny")
    said = run("build", "--model", model, "--target", "cuda", "--output", tmp_path / "e", code=2)
    assert said.startswith("error: --target cuda: expected some of sm_80, sm_86, ")
    assert said.rstrip().endswith("(fix: --target cpu; or, to build for another machine, --target cuda:sm_80)")


def test_inspect_shows_the_plan(tmp_path: Path) -> None:
    model = write_gptq(tmp_path / "tiny")
    run("build", "--model", model, "--target", "reference", "--output", tmp_path / "e")
    for what in (tmp_path / "e", model):
        shown = run("inspect", what)
        assert "sequences of 512 tokens" in shown
        assert "budget: 70% of the memory available now" in shown
        memory = json.loads(run("inspect", what, "--json"))["memory"]
        assert "rows" not in memory
        assert memory["fits"]
        assert memory["unquantized"]["dtype"] in ("float32", "bfloat16")
