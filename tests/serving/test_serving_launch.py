"""How ``llmctl serve`` starts: its port, its worker, what it keeps to itself."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

from llmctl.config import ServeConfig
from llmctl.errors import UsageError
from llmctl.serving import allocator, launch, spawned
from llmctl.serving.keys import ServerKeys
from llmctl.serving.launch import _Server, bind
from llmctl.serving.redaction import Redactor
from llmctl.serving.spawned import FOR_ITS_PARENT, SpawnedWorker, early_worker
from llmctl.serving.supervisor import describe_exit


def test_what_runs_has_no_plain_key(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        ended_early = 0

        def __init__(self, config: ServeConfig, _: object, keys: ServerKeys, __: object) -> None:
            assert "sk-" not in str(vars(config))
            assert [bool(keys.find(key)) for key in (b"sk-one", b"sk-two", b"sk-")] == [True, True, False]
            self.made.append(config)

        made: ClassVar[list[ServeConfig]] = []

        async def run(self, spawned: SpawnedWorker) -> None:
            assert spawned.process.poll() is None
            self.spawned.append(spawned)

        spawned: ClassVar[list[SpawnedWorker]] = []

    monkeypatch.setattr(launch, "_Server", Server)
    monkeypatch.setattr(launch, "bind", lambda *_: socket.socket())
    launch.run_server(ServeConfig(model="m", api_key="sk-one", priority_keys="sk-two"))
    assert len(Server.made) == 1
    assert Server.spawned[0].process.poll() == -signal.SIGKILL  # told nothing, it is not left behind


def test_a_worker_is_not_left_behind_where_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SpawnedWorker] = []
    settled: list[bool] = []
    monkeypatch.setattr(spawned, "SpawnedWorker", lambda: made.append(SpawnedWorker()) or made[0])
    monkeypatch.setattr(allocator, "give_freed_memory_back", lambda: settled.append(True))
    with pytest.raises(UsageError, match="--log-level"):
        launch.run_server(ServeConfig(model="m", log_level="loud"))
    assert made[0].process.poll() is not None
    assert settled == [True]  # before any option is looked at, and any thread is begun


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how many may wait")
def test_as_many_connections_wait_as_the_system_allows() -> None:
    allowed = int(Path("/proc/sys/net/core/somaxconn").read_text())
    with bind("127.0.0.1", 0) as listener:
        told = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        assert int.from_bytes(told[28:32], sys.byteorder) == allowed  # tcpi_sacked, which means this of a listener


@pytest.mark.parametrize(("level", "told"), [("info", False), ("debug", True)])
def test_what_is_no_http_is_told_to_who_debugs(level: str, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("uvicorn.error")
    monkeypatch.setattr(log, "level", log.level)
    keys = ServerKeys(None, None)
    with bind("127.0.0.1", 0) as listener:
        _Server(ServeConfig(model="m", log_level=level), listener, keys, Redactor(keys))._http_server(None)
    assert log.isEnabledFor(logging.WARNING) == told
    assert log.isEnabledFor(logging.ERROR)


def test_bind_refuses_a_taken_port_and_a_foreign_host() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
            bind("127.0.0.1", port)
    with pytest.raises(UsageError, match="--host 256"):
        bind("256.1.1.1", 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_bind_takes_ipv6() -> None:
    try:
        with bind("::1", 0) as listener:
            assert listener.family == socket.AF_INET6
    except UsageError:
        pytest.skip("no IPv6 loopback here")


def test_describe_exit() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-11) == "killed by SIGSEGV"
    assert "out of memory" in describe_exit(-9)


def _signals(process: int, which: str) -> set[int]:
    """Signals that a process blocks (``SigBlk``) or ignores (``SigIgn``)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    bits = next(int(line.split()[1], 16) for line in lines if line.startswith(f"{which}:"))
    return {number for number in FOR_ITS_PARENT if bits >> (number - 1) & 1}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what a process ignores")
def test_a_worker_ignores_what_is_for_its_parent() -> None:
    with early_worker() as spawned:
        end = time.monotonic() + 60
        while _signals(spawned.process.pid, "SigIgn") != FOR_ITS_PARENT:
            assert time.monotonic() < end
            time.sleep(0.01)
        while _signals(spawned.process.pid, "SigBlk"):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_worker_hears_no_signal_from_its_first_moment_and_needs_its_settings(
    capfd: pytest.CaptureFixture[str],
) -> None:
    spawned = SpawnedWorker()
    for number in FOR_ITS_PARENT:  # while Python itself starts
        spawned.process.send_signal(number)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & FOR_ITS_PARENT
    spawned.process.communicate(timeout=60)  # the end of its stdin
    spawned.channel.close()
    assert spawned.process.returncode == 1
    said = capfd.readouterr().err
    assert "started by 'llmctl serve'" in said
    assert "KeyboardInterrupt" not in said


def test_the_api_process_imports_nothing_heavy() -> None:
    code = (
        "import sys, llmctl.serving.app, llmctl.serving.launch, llmctl.serving.summary, llmctl.artifact.loader\n"
        "sys.exit(str({'torch', 'transformers', 'cupy', 'opentelemetry.sdk'} & set(sys.modules) or ''))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.stderr.strip() == ""
