"""Start, drain, death: real servers that are ended in every way, and what they leave behind."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fixtures import ServerProcess, fetch, make_tiny_llama

RECIPES = Path(__file__).parents[2] / "configs" / "serve"
KEY = {"Authorization": "Bearer secret-1"}
LONG = {"prompt": "x é", "max_tokens": 450, "temperature": 0, "stream": True}


class Servers:
    """Servers that are started together, because each spends seconds importing torch."""

    def __init__(self, engine: Path, checkpoint: Path, folder: Path) -> None:
        self.keyed = ServerProcess(
            *("--config", str(RECIPES / "shared.yaml"), "--host", "127.0.0.1", "--model", str(engine)),
            *(
                "--served-model-name",
                "mine",
                "--max-num-seqs",
                "1",
                "--max-num-queued-reqs",
                "1",
                "--metrics-prefix",
                "vllm",
            ),
            env={"LLMCTL_API_KEY": "secret-1,secret-2"},
        )
        self.built = ServerProcess(
            *("--model", str(checkpoint), "--target", "reference", "--stall-timeout", "0.5"),
            env={"LLMCTL_CACHE": str(folder / "cache")},
        )
        self.victim = ServerProcess("--model", str(engine), "--max-restarts", "0")
        self.twice = ServerProcess("--model", str(engine))
        self.all = [self.keyed, self.built, self.victim, self.twice]


@pytest.fixture(scope="module")
def servers(tiny_engine: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tiny_engine, tiny_llama, tmp_path_factory.mktemp("servers"))
    try:
        for server in servers.all:
            server.wait_ready(90)
        yield servers
    finally:
        for server in servers.all:
            server.__exit__()


class Stream:
    """A streaming request in a thread: its events, and that it has begun."""

    def __init__(self, server: ServerProcess, headers: dict[str, str] | None = None, **changes: object) -> None:
        self.status, self.text = 0, ""
        body = json.dumps({**LONG, **changes}).encode()

        def run() -> None:
            try:
                self.status, self.text = fetch(server.url + "/v1/completions", body, headers, timeout=60)
            except (OSError, http.client.HTTPException) as error:  # cut off
                self.text = str(error)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def end(self) -> list[str]:
        """Its events."""
        self.thread.join(60)
        return self.text.split("\n\n")


def wait_running(server: ServerProcess, running: int, waiting: int = 0, headers: dict[str, str] | None = None) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        _, text = fetch(server.url + "/metrics", headers=headers)
        pairs = re.findall(r"^\w+:num_requests_(running|waiting)\{.*\} (.*)", text, re.MULTILINE)
        if dict(pairs) == {"running": f"{running}.0", "waiting": f"{waiting}.0"}:
            return
        time.sleep(0.01)
    raise AssertionError(f"never {running} running and {waiting} waiting")


def wait_gone(pid: int) -> None:
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the process still runs"
        time.sleep(0.02)


def test_everything_but_liveness_needs_the_key(servers: Servers) -> None:
    server = servers.keyed
    assert server.get("/health")[0] == 200
    assert server.get("/ready")[0] == 200
    for path in ("/v1/models", "/metrics", "/version", "/engine", "/requests", "/openapi.json", "/nowhere"):
        status, text = server.get(path)
        assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key"), path
    for wrong in ("Bearer wrong", "Bearer secret-1x", "Basic secret-1", "secret-1", "Bearer "):
        assert server.post("/v1/completions", {}, Authorization=wrong)[0] == 401
    for key in ("secret-1", "secret-2"):
        status, text = fetch(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert (status, json.loads(text)["data"][0]["id"]) == (200, "mine")


def test_the_openai_client_sees_a_wrong_key(servers: Servers) -> None:
    import openai

    with (
        openai.OpenAI(base_url=servers.keyed.url + "/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="API key"),
    ):
        client.models.list()


def test_a_full_queue_is_429_with_retry_after(servers: Servers) -> None:
    server = servers.keyed
    running = Stream(server, KEY)
    wait_running(server, 1, headers=KEY)
    waiting = Stream(server, KEY, max_tokens=3)
    wait_running(server, 1, 1, headers=KEY)
    status, body = server.post("/v1/completions", LONG, **KEY)
    assert (status, body["error"]["code"], body["error"]["type"]) == (429, "queue_full", "rate_limit_error")
    assert running.end()[-2] == "data: [DONE]"
    assert waiting.end()[-2] == "data: [DONE]"
    _, text = fetch(server.url + "/metrics", headers=KEY)
    assert 'vllm:admission_rejections_total{model_name="mine",reason="max_num_queued_reqs"} 1.0' in text
    assert "llmctl:" not in text


def test_no_files_while_it_runs(servers: Servers) -> None:
    for server in servers.all:
        assert server.leftovers() == []


def test_a_checkpoint_is_built_into_the_cache_and_named_after_its_folder(servers: Servers) -> None:
    assert "building tiny-llama for reference" in servers.built.output
    _, body = servers.built.post("/v1/completions", {"prompt": "x é", "max_tokens": 3, "temperature": 0})
    assert body["model"] == "tiny-llama"
    assert body["choices"][0]["text"] == "日"


def test_a_stalled_engine_is_not_ready(servers: Servers) -> None:
    server = servers.built
    stream = Stream(server)
    wait_running(server, 1)
    os.kill(server.worker_pid, signal.SIGSTOP)
    try:
        reason = server.wait_status("/ready", 503, 10)
        assert "stalled: no step for" in reason
        assert server.get("/health")[0] == 200
    finally:
        os.kill(server.worker_pid, signal.SIGCONT)
    server.wait_status("/ready", 200, 10)
    assert stream.end()[-2] == "data: [DONE]"


def test_sigterm_drains(servers: Servers) -> None:
    server = servers.keyed
    pid = server.worker_pid
    os.kill(pid, signal.SIGTERM)  # what a service manager sends to the whole group; the worker must outlive the drain
    stream = Stream(server, KEY)
    wait_running(server, 1, headers=KEY)
    server.process.send_signal(signal.SIGTERM)
    assert "draining" in server.wait_status("/ready", 503)
    status, body = server.post("/v1/completions", LONG, **KEY)
    assert (status, body["error"]["type"]) == (503, "service_unavailable")
    events = stream.end()
    assert stream.status == 200
    assert events[-2] == "data: [DONE]"
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(20) == 0
    wait_gone(pid)
    assert server.leftovers() == []


def test_without_restarts_the_workers_death_ends_the_server_with_the_reason(servers: Servers) -> None:
    server = servers.victim
    stream = Stream(server)
    wait_running(server, 1)
    os.kill(server.worker_pid, signal.SIGKILL)
    reason = server.wait_status("/health", 503, 10)
    assert "killed by SIGKILL" in reason
    assert server.get("/ready")[0] == 503
    assert server.post("/v1/completions", LONG)[1]["error"]["code"] == "engine_dead"
    events = stream.end()
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert server.process.wait(20) == 1
    last = server.output.strip().splitlines()[-1]
    assert last.startswith("error: the engine worker died: killed by SIGKILL")
    assert "Traceback" not in server.output
    assert server.leftovers() == []


def test_the_worker_dies_with_the_server(servers: Servers) -> None:
    server = servers.built
    pid = server.worker_pid
    server.process.kill()
    server.process.wait()
    wait_gone(pid)
    assert server.leftovers() == []


def test_a_second_signal_stops_at_once(servers: Servers) -> None:
    server = servers.twice
    stream = Stream(server)
    wait_running(server, 1)
    pid = server.worker_pid
    server.process.send_signal(signal.SIGTERM)
    server.wait_status("/ready", 503)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(5) == 128 + signal.SIGTERM
    stream.end()
    wait_gone(pid)
    assert server.leftovers() == []


def test_a_signal_during_start(tiny_engine: Path) -> None:
    with ServerProcess("--model", str(tiny_engine)) as server:
        server.wait_status("/health", 200)
        status, text = server.get("/ready")
        assert (status, json.loads(text)["status"]) == (503, "starting")
        assert server.post("/v1/completions", LONG)[0] == 503
        pid = server.worker_pid
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 128 + signal.SIGINT  # a step of a pipeline must not take it for served
        wait_gone(pid)
        assert server.leftovers() == []


def test_a_missing_model_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    with ServerProcess("--model", str(tmp_path / "nowhere"), env={"HF_HUB_OFFLINE": "1"}) as server:
        assert server.process.wait(60) == 2
        errors = [line for line in server.output.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "nowhere" in errors[0]
        assert "Traceback" not in server.output
        assert server.leftovers() == []


@pytest.mark.parametrize(
    "name", ["weights-00001-of-00001.safetensors", pytest.param("tokenizer.json", marks=pytest.mark.slow)]
)
def test_a_damaged_engine_is_one_line(tiny_engine: Path, tmp_path: Path, name: str) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine, engine)
    (engine / name).write_bytes((engine / name).read_bytes()[:-1])
    with ServerProcess("--model", str(engine)) as server:
        assert server.process.wait(60) == 1
        errors = [line for line in server.output.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert name in errors[0]
        assert "Traceback" not in server.output
        assert server.leftovers() == []


def test_an_engine_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    """The worker and the server find it missing at the same time; only one of them says so."""
    model = make_tiny_llama(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    with ServerProcess("--model", str(model), "--target", "reference") as server:
        assert server.process.wait(60) == 1
        assert server.output.count("no tokenizer.json") == 1, server.output
        assert "Traceback" not in server.output


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(tiny_engine: Path, tmp_path: Path) -> None:
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    subprocess.run(
        [*"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout".split(), key, "-out", cert],
        check=True,
        capture_output=True,
    )
    args = ("--model", str(tiny_engine), "--ssl-keyfile", key, "--ssl-certfile", cert)
    with ServerProcess(*args, scheme="https") as server:
        server.wait_status("/health", 200)
