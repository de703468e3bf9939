"""``llmctl doctor``: whole, pasteable, and an exit code that says whether something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llmctl.cli import diagnosis
from llmctl.cli.main import app
from llmctl.targets.cpu import findings as cpu_findings
from llmctl.targets.cuda import findings as cuda_findings
from llmctl.targets.cuda.device import CudaDevice


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of our own, a compiler, no GPU."""
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path / "somebody" / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(cpu_findings, "find_compiler", lambda: (sys.executable,))
    monkeypatch.setattr(cuda_findings, "cuda_device", lambda: None)


def run(*args: str, code: int = 0) -> Result:
    made = CliRunner().invoke(app, ["doctor", *args], env={"COLUMNS": "80"})
    assert made.exit_code == code, made.output
    return made


def document(code: int = 0) -> dict[str, Any]:
    return dict(json.loads(run("--json", code=code).stdout))


def test_a_machine_that_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    found = document()
    assert found["healthy"]
    assert found["problems"] == []
    assert found["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert "Python" in found["target cpu"]["C++ compiler"]
    assert found["target cuda"]["GPU"].startswith("none: ")
    assert found["caches"]["folder"] == "~/cache"
    assert found["environment"]["OPENAI_API_KEY"] == "set (not shown)"
    shown = run().stdout
    assert "secret" not in shown + json.dumps(found)
    assert "somebody" not in shown + json.dumps(found)
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.endswith("nothing is missing\n")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_findings, "find_compiler", lambda: None)
    (problem,) = document(1)["problems"]
    assert problem["problem"].startswith("C++ compiler: cpu engines that are built here run on torch")
    assert "install a C++ compiler" in problem["fix"]
    assert "missing: C++ compiler" in run(code=1).stdout


def test_a_gpu_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_findings, "cuda_device", lambda: CudaDevice((9, 0), (12, 4), 2**36))
    monkeypatch.setattr(cuda_findings, "held_bytes", lambda _: 2**30)
    monkeypatch.setattr(cuda_findings, "missing_here", lambda *_, **__: "cupy is not installed")
    found = document(1)
    assert found["target cuda"]["GPU"] == "sm_90, 64.0 GiB, of which others hold 1.0 GiB"
    assert [p["problem"] for p in found["problems"]] == ["cuda engines: cupy is not installed"]


def test_a_package_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    version = diagnosis._version
    monkeypatch.setattr(diagnosis, "_version", lambda name: None if name == "aiohttp" else version(name))
    (problem,) = document(1)["problems"]
    assert problem == {"problem": "aiohttp: llmctl needs it", "fix": "pip install aiohttp"}


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.os, "access", lambda *_: False)
    (problem,) = document(1)["problems"]
    assert "cannot be written to" in problem["problem"]
