"""Docker Compose and systemd: every command line is one of llmctl's, and there is time to drain."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deploy_files import AFTER_DRAIN, DEPLOY, REPOSITORY, documents, serve_settings
from dockerfile import environment, stages

from llmctl.config import parse_bytes
from llmctl.errors import ExitCode

SHARED = REPOSITORY / "configs" / "serve" / "shared.yaml"
UNIT = DEPLOY / "llmctl@.service"
DROP_IN = DEPLOY / "llmctl-cuda.conf"
COMPOSE: dict[str, Any] = documents(DEPLOY / "compose.yaml")[0]
SERVICES = sorted(COMPOSE["services"])


def plain(text: str) -> str:
    """A value of the compose file where no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("name", SERVICES)
def test_compose_commands_are_settings(name: str, tmp_path: Path) -> None:
    service = COMPOSE["services"][name]
    assert service["configs"] == [{"source": "serve", "target": "/etc/llmctl/serve.yaml"}]
    assert (DEPLOY / COMPOSE["configs"]["serve"]["file"]).resolve() == SHARED
    command = [plain(word) for word in service["command"]]
    settings = serve_settings(command, SHARED, tmp_path)
    assert settings.host == "0.0.0.0"
    assert service["ports"][0].split(":")[-1] == str(settings.port)
    assert f"--api-key-file=/run/secrets/{service['secrets'][0]}" in command
    assert parse_bytes(service["stop_grace_period"].replace("s", ""), param="-") >= settings.drain_timeout + AFTER_DRAIN
    if settings.kv_cache_memory is not None:
        memory = parse_bytes(plain(service["mem_limit"]), param="mem_limit")
        assert 2 * parse_bytes(settings.kv_cache_memory, param="kv_cache_memory") < memory


@pytest.mark.parametrize("name", SERVICES)
def test_compose_services_fit_their_image(name: str) -> None:
    service = COMPOSE["services"][name]
    target = service["build"]["target"]
    assert service["image"] == f"llmctl:{target}"
    assert target in stages()
    assert ((DEPLOY / service["build"]["context"]).resolve(), service["build"]["dockerfile"]) == (
        REPOSITORY,
        "configs/deploy/Dockerfile",
    )
    assert f"cache:{environment(target)['LLMCTL_CACHE']}" in service["volumes"]
    assert service["read_only"]
    assert service["tmpfs"] == ["/tmp"]
    assert service["profiles"] == [name]


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
    reason="no docker compose here: the compose file is read by these tests alone",
)
def test_compose_takes_the_file(tmp_path: Path) -> None:
    command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml")]
    for name in SERVICES:
        command += ["--profile", name]
    env = {**os.environ, "LLMCTL_API_KEYS": str(tmp_path / "api-keys")}
    done = subprocess.run([*command, "config", "--services"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, sorted(done.stdout.split())) == (0, SERVICES), done.stderr


def unit(path: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=True)
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read_string(path.read_text())
    return parser


def test_the_unit_runs_settings_and_waits_for_the_drain(tmp_path: Path) -> None:
    service = unit(UNIT)["Service"]
    command = shlex.split(service["ExecStart"])
    assert command[0] == "/opt/llmctl/bin/llmctl"
    assert "/etc/llmctl/%i.yaml" in command
    own = tmp_path / "serve.yaml"
    own.write_text(SHARED.read_text() + "model: ./engine\n")
    settings = serve_settings(command[1:], own, tmp_path)
    assert int(service["TimeoutStopSec"]) >= settings.drain_timeout + AFTER_DRAIN
    assert service["KillMode"] == "mixed"
    assert service["RestartPreventExitStatus"] == str(int(ExitCode.USAGE))
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"


def test_the_units_cache_is_its_own() -> None:
    service = unit(UNIT)["Service"]
    variables = dict(word.split("=", 1) for word in service["Environment"].split())
    assert variables["LLMCTL_CACHE"] == f"%C/{service['CacheDirectory']}"
    assert variables.keys() == environment("cpu").keys() - {"PATH"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here: the unit is not verified")
@pytest.mark.parametrize("gpu", [False, True])
def test_systemd_takes_the_unit(gpu: bool, tmp_path: Path) -> None:
    own = tmp_path / "llmctl@serve.service"
    own.write_text(UNIT.read_text().replace("/opt/llmctl/bin/llmctl", sys.executable))
    if gpu:
        folder = tmp_path / f"{own.name}.d"
        folder.mkdir()
        shutil.copy(DROP_IN, folder)
    done = subprocess.run(["systemd-analyze", "verify", str(own)], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or own.name in line]
    assert (done.returncode, said) == (0, [])


_DENY = (
    "import ctypes, os, sys; assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0; os.execv(sys.argv[1], sys.argv[1:])"
)
"""PR_SET_MDWE, what MemoryDenyWriteExecute= sets: no mapping is ever both writable and executable."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cpu_engine_needs_no_writable_code(tiny_llama: Path, tmp_path: Path) -> None:
    """Built and run as the unit's MemoryDenyWriteExecute= has it."""
    assert unit(UNIT)["Service"]["MemoryDenyWriteExecute"] == "yes"
    deny = [sys.executable, "-c", _DENY, sys.executable, "-m", "llmctl"]
    if subprocess.run([*deny, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("a kernel without PR_SET_MDWE (Linux 6.3)")
    env = {**os.environ, "LLMCTL_CACHE": str(tmp_path / "cache")}
    bench = ["bench", "latency", "--model", str(tiny_llama), "--target", "cpu", "--num-iters", "1"]
    done = subprocess.run([*deny, *bench, "--output-len", "4"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("cache/engines/*/kernels/*.so"))
