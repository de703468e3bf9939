"""A dead worker is replaced: what its requests become, what is said meanwhile, and when it is the end after all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fixtures import LOOP_TEXT, ServerProcess, fetch

LONG = {"prompt": "x é", "max_tokens": 450, "temperature": 0}
SHORT = {"prompt": "x é", "max_tokens": 3, "temperature": 0}
POISON_ID = 77
POISON = {"prompt": [POISON_ID, POISON_ID, 5], "max_tokens": 4, "temperature": 0}

# Loaded by every Python process that starts with this folder on its path; makes one token id the worker's end.
DEADLY_RUNTIME = f"""
import os, signal, sys
if "llmctl.serving.worker" in sys.orig_argv:
    from llmctl.targets.reference.runtime import ReferenceRuntime
    execute = ReferenceRuntime.execute
    def deadly(self, plan, sampling):
        if any({POISON_ID} in piece.token_ids for piece in plan.slices):
            os.kill(os.getpid(), signal.SIGKILL)
        return execute(self, plan, sampling)
    ReferenceRuntime.execute = deadly
"""


class Call:
    """A request in a thread."""

    def __init__(self, server: ServerProcess, body: dict[str, Any], path: str = "/v1/completions") -> None:
        self.status, self.text = 0, ""

        def run() -> None:
            self.status, self.text = fetch(server.url + path, json.dumps(body).encode(), timeout=60)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def end(self) -> tuple[int, Any]:
        """Status and document; of a stream, its last event before the end."""
        self.thread.join(60)
        assert not self.thread.is_alive(), "never answered"
        text = self.text
        if text.startswith(("data: ", ": keep-alive")):
            events = text.strip().split("\n\n")
            assert events[-1] == "data: [DONE]"
            text = events[-2].removeprefix("data: ")
        return self.status, json.loads(text)


def worker_of(server: ServerProcess) -> int:
    """The present worker's process id; no child of the server is a zombie."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        children = psutil.Process(server.process.pid).children()
        if children and all(child.status() != psutil.STATUS_ZOMBIE for child in children):
            (child,) = children
            return child.pid
        time.sleep(0.01)
    raise AssertionError("no worker, or one that nobody waits for")


def kill_worker(server: ServerProcess) -> None:
    os.kill(worker_of(server), signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One seat, so that what waits is known; a runtime that one token kills."""
    folder = tmp_path_factory.mktemp("deadly")
    (folder / "sitecustomize.py").write_text(DEADLY_RUNTIME)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    args = ("--model", str(tiny_engine), "--max-num-seqs", "1", "--max-restarts", "100", "--stall-timeout", "1")
    with ServerProcess(*args, env={"PYTHONPATH": path}) as process:
        process.wait_ready()
        yield process


def test_a_stopped_worker_is_told_while_idle_and_recovers(server: ServerProcess) -> None:
    pid = worker_of(server)
    time.sleep(1.5)
    assert server.get("/ready")[0] == 200  # silence is not mistaken for death
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        reason = json.loads(server.wait_status("/ready", 503, 3))
        assert time.monotonic() - began < 1.5
        assert reason["status"] == "stalled"
        assert "no sign of life from the idle worker for 1 s" in reason["reason"]
    finally:
        os.kill(pid, signal.SIGCONT)
    server.wait_status("/ready", 200, 3)
    assert worker_of(server) == pid
    assert server.post("/v1/completions", SHORT)[0] == 200


def test_what_runs_ends_and_what_waits_is_served_by_the_next_worker(server: ServerProcess) -> None:
    restarts = restarts_of(server)
    stream = Call(server, {**LONG, "stream": True})
    server.wait_load(1)
    waiting = [Call(server, SHORT), Call(server, {**SHORT, "stream": True})]
    waiting.append(Call(server, {"input": "x é", "pooling": "mean"}, "/v1/embeddings"))
    leaver = threading.Thread(target=leave, args=(server,))
    leaver.start()
    server.wait_load(1, 4)
    dead = worker_of(server)
    os.kill(dead, signal.SIGKILL)
    reason = json.loads(server.wait_status("/ready", 503))
    assert reason["status"] == "restarting"
    assert "restarting: the engine worker died: killed by SIGKILL" in reason["reason"]
    status, body = server.post("/v1/completions", SHORT)
    assert (status, body["error"]["code"]) == (503, "not_ready")
    assert json.loads(server.get("/health")[1]) == {"status": "ok", "engine": "restarting"}
    status, event = stream.end()
    assert (status, event["error"]["code"], event["error"]["type"]) == (200, "engine_dead", "service_unavailable")
    status, body = waiting[0].end()
    assert (status, body["choices"][0]["text"]) == (200, LOOP_TEXT[1])
    status, body = waiting[1].end()
    assert (status, body["choices"][0]["finish_reason"]) == (200, "length")
    status, body = waiting[2].end()
    assert (status, len(body["data"][0]["embedding"])) == (200, 64)
    leaver.join()
    server.wait_load(0)
    server.wait_status("/ready", 200)
    assert worker_of(server) != dead
    assert not psutil.pid_exists(dead)
    assert restarts_of(server) == restarts + 1
    assert server.leftovers() == []


def leave(server: ServerProcess) -> None:
    """Ask for much, and go away before the next worker can be there."""
    with pytest.raises(TimeoutError):
        fetch(server.url + "/v1/completions", json.dumps(LONG).encode(), timeout=1.0)


def restarts_of(server: ServerProcess) -> float:
    _, text = server.get("/metrics")
    lines = [line for line in text.splitlines() if line.startswith("llmctl:worker_restarts_total{")]
    counts = {line.split('reason="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert sum(counts.values()) == counts["SIGKILL"]
    return counts["SIGKILL"]


def test_a_whole_answer_that_was_being_made_is_503(server: ServerProcess) -> None:
    call = Call(server, LONG)
    server.wait_load(1)
    kill_worker(server)
    status, body = call.end()
    assert (status, body["error"]["code"]) == (503, "engine_dead")
    assert "SIGKILL" in body["error"]["message"]
    server.wait_status("/ready", 200)


def test_what_kills_two_workers_is_not_given_to_a_third(server: ServerProcess) -> None:
    restarts = restarts_of(server)
    blocker = Call(server, LONG)  # so that all the others are there before the first of them runs
    server.wait_load(1)
    poison = Call(server, POISON)
    server.wait_load(1, 1)
    others = [Call(server, SHORT) for _ in range(3)]
    assert blocker.end()[0] == 200
    status, body = poison.end()
    assert (status, body["error"]["code"]) == (500, "request_quarantined")
    assert [other.end()[0] for other in others] == [200] * 3
    assert restarts_of(server) == restarts + 2
    server.wait_status("/ready", 200)


def test_sigterm_while_restarting_serves_what_waits(tiny_engine: Path) -> None:
    with ServerProcess("--model", str(tiny_engine), "--max-num-seqs", "1") as server:
        server.wait_ready()
        running = Call(server, LONG)
        server.wait_load(1)
        waiting = Call(server, SHORT)
        server.wait_load(1, 1)
        kill_worker(server)
        server.wait_status("/ready", 503)
        server.process.send_signal(signal.SIGTERM)
        assert running.end()[0] == 503
        status, body = waiting.end()
        assert (status, body["choices"][0]["text"]) == (200, LOOP_TEXT[1])
        assert server.process.wait(20) == 0
        assert server.leftovers() == []
        assert "Traceback" not in server.output


@pytest.mark.slow
def test_sigterm_while_restarting_with_nothing_to_do_ends_at_once(tiny_engine: Path) -> None:
    with ServerProcess("--model", str(tiny_engine)) as server:
        server.wait_ready()
        kill_worker(server)
        server.wait_status("/ready", 503)
        child = worker_of(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        assert not psutil.pid_exists(child)
        assert server.leftovers() == []
        assert "Traceback" not in server.output


@pytest.mark.slow
def test_a_worker_that_does_not_come_back_ends_the_server(tiny_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine, engine)
    with ServerProcess("--model", str(engine), "--max-restarts", "2", "--max-num-seqs", "1") as server:
        server.wait_ready()
        running = Call(server, LONG)
        server.wait_load(1)
        waiting = Call(server, SHORT)
        server.wait_load(1, 1)
        (engine / "engine.json").unlink()
        kill_worker(server)
        assert (running.end()[0], waiting.end()[0]) == (503, 503)
        code = server.process.wait(30)
        last = server.output.strip().splitlines()[-1]
        assert code in (1, 2), server.output
        assert last.startswith("error: ")
        assert "2 of 2 restarts within 10 minutes are spent" in last
        assert "Traceback" not in server.output
        assert server.leftovers() == []
