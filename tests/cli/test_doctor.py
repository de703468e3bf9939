"""``llmctl doctor``: whole, pasteable, and an exit code that says whether something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llmctl.cli import diagnosis
from llmctl.cli.main import app
from llmctl.extras import install_hint, pip_install
from llmctl.secret_options import SECRET_OPTIONS
from llmctl.targets.cpu import findings as cpu_findings
from llmctl.targets.cuda import findings as cuda_findings
from llmctl.targets.cuda.device import CudaDevice

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of our own, room on the disk, a compiler, no GPU."""
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**33))
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
    secrets = ["OPENAI_API_KEY", *(f"LLMCTL_{name.upper()}" for name in SECRET_OPTIONS)]
    for name in secrets:
        monkeypatch.setenv(name, "sk-secret")
    found = document()
    assert found["healthy"]
    assert found["problems"] == []
    assert found["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert "Python" in found["target cpu"]["C++ compiler"]
    assert found["target cuda"]["GPU"].startswith("none: ")
    assert found["caches"]["folder"] == "~/cache"
    assert {found["environment"][name] for name in secrets} == {"set (not shown)"}
    shown = run().stdout
    assert "secret" not in shown + json.dumps(found)
    assert "somebody" not in shown + json.dumps(found)
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.endswith("nothing is missing\n")
    assert found["needs"] == []


def test_a_base_install_is_healthy_and_says_what_more_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "missing", lambda extra: "torch" if extra == "quantize" else None)
    (need,) = document()["needs"]
    assert need["fix"] == diagnosis._homeless(install_hint("quantize"))
    *_, last, more = run().stdout.splitlines()
    assert last == "nothing is missing to serve and bench engines"
    assert more == f"{need['needs']}: {need['fix']}"
    assert all(word in more for word in ("quantize", "build", "PyTorch", "pip install"))


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
    assert problem["problem"] == "aiohttp: llmctl needs it"
    wanted = next(line for line in PROJECT["dependencies"] if line.startswith("aiohttp"))
    assert problem["fix"] == diagnosis._homeless(pip_install(wanted))
    assert shlex.quote(wanted) in problem["fix"]


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.os, "access", lambda *_: False)
    (problem,) = document(1)["problems"]
    assert "cannot be written to" in problem["problem"]


def test_no_room_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    (problem,) = document(1)["problems"]
    assert problem["problem"].startswith("free disk: 9 B of disk are free")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
@pytest.mark.parametrize("closed", ["somebody/cache", "somebody"])
def test_a_cache_that_cannot_be_entered(closed: str, tmp_path: Path) -> None:
    (tmp_path / "somebody" / "cache" / "engines").mkdir(parents=True)
    (tmp_path / closed).chmod(0)
    try:
        (problem,) = document(1)["problems"]
    finally:
        (tmp_path / closed).chmod(0o700)
    assert "cannot be written to: nothing can be fetched or built" in problem["problem"]


def test_a_cache_of_which_a_part_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> None:
        raise PermissionError(13, "Permission denied", "/cache/engines")

    monkeypatch.setattr(diagnosis, "cache_entries", closed)
    (problem,) = document(1)["problems"]
    assert problem["problem"] == "folder: /cache/engines cannot be read: Permission denied"
