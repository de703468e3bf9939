"""The images: what the Dockerfile says, its entry point and health check, and, slowly, the CPU image without Docker."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy_files import DEPLOY, REPOSITORY
from dockerfile import Build, context_files, environment, exec_form, is_sent, last, stages, stages_for, steps_of
from fixtures import fetch

from llmctl.config import ServeConfig

TARGETS = ("cpu", "cuda")


@pytest.mark.parametrize("target", TARGETS)
def test_the_user_is_not_root(target: str) -> None:
    assert last(target, "USER") == "10001:10001"
    assert any("--uid 10001" in step.value for step in steps_of(target) if step.instruction == "RUN")


@pytest.mark.parametrize("target", TARGETS)
def test_signals_reach_the_server(target: str) -> None:
    assert last(target, "STOPSIGNAL") == "SIGTERM"
    assert exec_form(last(target, "ENTRYPOINT")) == ["llmctl-entrypoint"]
    assert exec_form(last(target, "CMD")) == ["--help"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_cache_is_a_volume_of_the_user(target: str) -> None:
    (volume,) = exec_form(last(target, "VOLUME"))
    settings = environment(target)
    assert settings["LLMCTL_CACHE"] == volume
    assert settings["HF_HOME"].startswith(f"{volume}/")
    made = f"install --directory --owner=10001 --group=10001 {volume}"
    assert any(step.value.endswith(made) for step in steps_of(target) if step.instruction == "RUN")


@pytest.mark.parametrize("target", TARGETS)
def test_the_health_check_is_for_the_default_port(target: str) -> None:
    port = str(ServeConfig().port)
    assert last(target, "EXPOSE") == port
    flags, _, command = last(target, "HEALTHCHECK").partition(" CMD ")
    assert "--start-period=" in flags
    assert exec_form(command) == ["python", "/usr/local/lib/llmctl/healthcheck.py"]
    assert f"http://127.0.0.1:{port}/health" in (DEPLOY / "healthcheck.py").read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_packages_are_constrained_and_from_public_indexes(target: str) -> None:
    (packages,) = [stage for stage in stages_for(target) if stage.name == f"packages-{target}"]
    index, *extra, install = packages.steps
    assert index.value in {
        "TORCH_INDEX=https://download.pytorch.org/whl/cpu",
        "TORCH_INDEX=https://download.pytorch.org/whl/cu130",
    }
    assert [step.value for step in extra] == (["PACKAGES=quantize"] if target == "cpu" else [])
    assert install.value.endswith(f"-c constraints.txt -r {'${PACKAGES}' if extra else target}.txt")


def test_only_the_cpu_image_has_a_compiler() -> None:
    assert "apt-get install" in str(steps_of("cpu"))
    assert "apt-get" not in str(steps_of("cuda"))


def test_what_is_copied_is_sent() -> None:
    copied = [step for stage in stages().values() for step in stage.steps if step.instruction == "COPY"]
    sources = {s for step in copied if "from" not in step.flags for s in step.rest.split()[:-1]}
    assert {"llmctl", "pyproject.toml", "constraints.txt"} <= sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert is_sent(source), source
    sent = set(context_files())
    assert {path.split("/")[0] for path in sent} == {source.split("/")[0] for source in sources}
    assert {path for path in sent if path.startswith("configs/")} == {s for s in sources if s.startswith("configs/")}
    assert "llmctl/targets/cpu/native/program.cpp" in sent
    assert not is_sent("llmctl/serving/__pycache__/app.cpython-312.pyc")
    assert not is_sent("tests/conftest.py")
    assert not is_sent(".git/config")


def test_the_package_lists_are_the_projects(tmp_path: Path) -> None:
    (step,) = [step for step in stages()["venv"].steps if "tomllib" in step.value]
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    command = step.value.replace("python ", f"'{sys.executable}' ", 1)
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {"base": [], **{name: project["optional-dependencies"][name] for name in ("quantize", "cuda")}}
    for name, more in extras.items():
        assert (tmp_path / f"{name}.txt").read_text().splitlines() == project["dependencies"] + more
        assert not any(requirement.startswith("llmctl") for requirement in more), "pip would look for it on the index"


@pytest.mark.parametrize(
    ("given", "run"),
    [
        ("serve --model m", "serve --model m --host 0.0.0.0"),
        ("serve --model m --host 127.0.0.1", "serve --model m --host 127.0.0.1"),
        ("serve --host=:: --model m", "serve --host=:: --model m"),
        ("serve --config serve.yaml", "serve --config serve.yaml"),
        ("build --model m", "build --model m"),
        ("", ""),
    ],
)
def test_the_entry_point_listens_where_it_is_reached(tmp_path: Path, given: str, run: str) -> None:
    (tmp_path / "llmctl").write_text('#!/bin/sh\necho "$$ $*"\n')
    (tmp_path / "llmctl").chmod(0o755)
    child = subprocess.Popen(
        [DEPLOY / "entrypoint.sh", *given.split()],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.communicate()[0].split() == [str(child.pid), *run.split()]  # the same process: signals reach it


@pytest.fixture
def answering() -> Iterator[tuple[str, list[int]]]:
    """A URL that answers with the status in the list."""
    status = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/health", status
        server.shutdown()
        thread.join()


def test_the_health_check_tells_alive_from_dead(answering: tuple[str, list[int]]) -> None:
    url, status = answering

    def check(url: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(DEPLOY / "healthcheck.py")]
        env = {**os.environ, "LLMCTL_HEALTH_URL": url}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert check(url).returncode == 0
    status[0] = 503
    dead = check(url)
    assert (dead.returncode, dead.stderr) == (1, f"{url}: HTTP Error 503: Service Unavailable\n")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert check(f"http://127.0.0.1:{closed.getsockname()[1]}/health").returncode == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cpu_image_builds_serves_and_drains(tmp_path: Path, tiny_llama: Path) -> None:
    """Every step of the cpu target but user and compiler, which are this machine's; torch comes from where pip's own
    configuration finds it."""
    build = Build(tmp_path / "root", {"TORCH_INDEX": ""})
    build.target("cpu")
    assert [step.split()[0] for step in build.left_out] == ["useradd", "if"]
    cache = Path(build.rooted(environment("cpu")["LLMCTL_CACHE"]))
    cache.mkdir(exist_ok=True)
    entry = exec_form(last("cpu", "ENTRYPOINT"))
    command, env = build.command([*entry, *exec_form(last("cpu", "CMD"))], "cpu")
    shown = subprocess.run(command, cwd=cache, env=env, capture_output=True, text=True, check=True).stdout
    assert "serve" in shown
    _serves(build, entry, tiny_llama, cache)


def _serves(build: Build, entry: list[str], model: Path, cache: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*entry, "serve", "--model", str(model), "--target", "cpu", "--port", str(port)]
    command, env = build.command(words, "cpu")
    server = subprocess.Popen(command, cwd=cache, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 600  # the kernels are compiled
        while not _is_ready(url):
            assert server.poll() is None, server.communicate()[0]
            assert time.monotonic() < end, "never ready"
            time.sleep(0.1)
        assert list(cache.glob("engines/*/kernels/*.so")), "no native kernels were compiled into the volume"
        check, env = build.command(exec_form(last("cpu", "HEALTHCHECK").partition(" CMD ")[2]), "cpu")
        subprocess.run(check, env={**env, "LLMCTL_HEALTH_URL": f"{url}/health"}, check=True)
        assert subprocess.run(check, env={**env, "LLMCTL_HEALTH_URL": f"{url}/nowhere"}, check=False).returncode == 1
        answers: list[int] = []
        body = b'{"model":"tiny-llama","prompt":"x \xc3\xa9","max_tokens":450,"n":64}'
        asking = threading.Thread(target=lambda: answers.append(fetch(f"{url}/v1/completions", body)[0]))
        asking.start()
        while not _is_busy(url):
            assert asking.is_alive(), "the request ended before the signal"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        asking.join()
        assert answers == [200], "the running request did not outlive the signal"
    finally:
        server.kill()
        server.communicate()


def _is_ready(url: str) -> bool:
    try:
        return fetch(f"{url}/ready")[0] == 200
    except OSError:
        return False


def _is_busy(url: str) -> bool:
    lines = fetch(f"{url}/metrics")[1].splitlines()
    return any(line.startswith("llmctl:num_requests_running{") and not line.endswith(" 0.0") for line in lines)
