"""What a script of vLLM's quickstart does, against a tiny Phi, dense and GPTQ: its command line, curl, requests."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from fixtures import ServerProcess
from random_models import write_model
from tiny_checkpoint import write_dense

from llmctl.config import QuantizeConfig
from llmctl.quantize.driver import quantize_checkpoint

LINE = (
    *("--dtype", "auto", "--gpu-memory-utilization", "0.90", "--enforce-eager"),
    *("--tensor-parallel-size", "1", "--disable-log-requests", "--swap-space", "4"),
)


@pytest.fixture(scope="module", params=["dense", "gptq"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("m")
    model, method = write_model(folder / "dense", "phi"), ()
    if request.param == "gptq":
        model, method = _quantized(model, folder), ("--quantization", "gptq")
    with ServerProcess(
        *(str(model), *LINE, *method, "--target", "reference", "--served-model-name", "facebook/opt-125m"),
        *("--served-model-name", "opt"),
        env={"LLMCTL_CACHE": str(tmp_path_factory.mktemp("cache"))},
    ) as process:
        process.wait_ready(120)
        yield process


def _quantized(model: Path, folder: Path) -> Path:
    text, output = folder / "text.txt", folder / "gptq"
    text.write_text("the quick brown fox reads a book about engines " * 200)
    settings = {"group_size": 16, "calib": str(text), "calib_samples": 8, "calib_length": 32}
    quantize_checkpoint(QuantizeConfig(model=str(model), output=str(output), method="gptq", **settings))
    return output


def test_the_quickstart(server: ServerProcess) -> None:
    for flag in ("--disable-log-requests", "--gpu-memory-utilization 0.9", "--enforce-eager"):
        assert f"{flag} has no effect" in server.output
    body = {"model": "facebook/opt-125m", "prompt": "ab", "max_tokens": 7, "temperature": 0}
    by_requests = requests.post(f"{server.url}/v1/completions", json={**body, "model": "opt"}, timeout=60).json()
    assert by_requests["model"] == "facebook/opt-125m"
    assert by_requests["usage"]["completion_tokens"] >= 1
    assert [card["id"] for card in requests.get(f"{server.url}/v1/models/", timeout=60).json()["data"]] == [
        *("facebook/opt-125m", "opt")
    ]
    if shutil.which("curl"):
        command = ["curl", "-s", f"{server.url}/v1/completions", "-H", "Content-Type: application/json"]
        done = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)["choices"] == by_requests["choices"]


@pytest.mark.slow
def test_a_method_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "m")
    line = (str(model), "--quantization", "awq", "--target", "reference")
    with ServerProcess(*line, env={"LLMCTL_CACHE": str(tmp_path)}) as process:
        assert process.process.wait(120) == 2
        assert "error: --quantization awq: " in process.output
