"""A server for the time of a context, played by a script without a model: started, awaited, ended whatever it does."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llmctl.bench import local_server
from llmctl.bench.config import BenchCompareConfig
from llmctl.bench.local_server import ServerError, running, serve_command, split_options
from llmctl.bench.progress import Progress
from llmctl.bench.rounds import Player, Visit
from llmctl.bench.serve_plan import make_plan
from llmctl.cli import serve_options
from llmctl.errors import ExitCode, UsageError
from llmctl.secret_options import SECRET_VARIABLES

# COMMAND --port N: refuses the first READY_AFTER probes; what it does when told to end is END.
_STUB = """
import http.server, os, signal, subprocess, sys, threading
asked = 0
print("loading weights", flush=True)
end = os.environ.get("END", "0")
if end == "at once":
    sys.exit("error: out of memory")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        loading = asked <= int(os.environ.get("READY_AFTER", "0"))
        if asked == 1 + int(os.environ.get("READY_AFTER", "0")):
            threading.Timer(0.3, print, ("try: me",), {"flush": True}).start()
        self.send_response(503 if loading else 200)
        self.end_headers()
        self.wfile.write(os.environ.get("LLMCTL_API_KEY", "no key").encode())
    def log_message(self, *_):
        pass

server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler)
if end == "never":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: (print("draining", flush=True), os._exit(int(end))))
server.serve_forever()
"""
STUB = [sys.executable, "-c", _STUB]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "_LAST_WORDS_SECONDS", 0.2)
    monkeypatch.setattr(local_server, "STOP_SECONDS", 20.0)


def child_of(said: str) -> int:
    """The process that the stub left behind."""
    return int(said.split("child ")[1].split()[0])


def gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet has)."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_gone(pid: int) -> None:
    """SIGKILL is delivered in its own time."""
    with_grace = psutil.Process(pid) if psutil.pid_exists(pid) else None
    if with_grace is not None and not gone(pid):
        psutil.wait_procs([with_grace], timeout=10)
    assert gone(pid)


def test_from_ready_to_ended_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCTL_API_KEY", "secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen's own remembers the variables of its first call
    with running(STUB, environment={"READY_AFTER": "2"}) as server:
        with local_server.DIRECT.open(server.url + "/x", timeout=10) as answer:
            assert answer.read() == b"no key", "the bench would be kept out"
        assert server.ready_seconds > 0
        said = server.announced()
        assert "try: me" in said, "what is said beside the first requests is waited for"
    assert server.process.returncode == 0
    wait_gone(child_of(said))


def test_another_exit_code_than_0_is_an_error() -> None:
    with (
        pytest.raises(ServerError, match="ended with exit code 7; it said last: draining") as caught,
        running(STUB, environment={"END": "7"}),
    ):
        pass
    assert "loading weights" in caught.value.log


def test_one_that_ends_before_it_is_ready() -> None:
    with (
        pytest.raises(ServerError, match="exit code 1 before it was ready; it said last: error: out of memory") as it,
        running(STUB, environment={"END": "at once"}),
    ):
        pytest.fail("entered")
    assert it.value.exit_code == ExitCode.RUNTIME


def test_a_model_or_option_that_the_server_refuses_is_the_users() -> None:
    refuses = [sys.executable, "-c", "import sys; print('error: no such model'); sys.exit(2)"]
    with pytest.raises(ServerError, match="exit code 2") as caught, running(refuses):
        pytest.fail("entered")
    assert caught.value.exit_code == ExitCode.USAGE


def test_one_that_is_not_ready_in_time_is_ended() -> None:
    with (
        pytest.raises(ServerError, match=r"not ready within 0\.5 s") as caught,
        running(STUB, environment={"READY_AFTER": "100000"}, ready_timeout=0.5),
    ):
        pytest.fail("entered")
    if "child" in caught.value.log:
        wait_gone(child_of(caught.value.log))


def test_one_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "STOP_SECONDS", 0.2)
    with (
        pytest.raises(ServerError, match="did not end within"),
        running(STUB, environment={"END": "never"}) as it,
    ):
        pass
    assert it.process.returncode == -9


@pytest.mark.parametrize("dies", [False, True])
def test_an_error_of_the_block_is_the_servers_only_if_it_died(dies: bool) -> None:
    def block() -> None:
        with running(STUB) as server:
            if dies:
                server.process.kill()
            raise LookupError("in the block")

    with pytest.raises(ServerError if dies else LookupError, match="in the block"):
        block()


@pytest.mark.parametrize("error", [KeyboardInterrupt, LookupError])
def test_whatever_ends_the_block_the_server_is_told_to_end_first(error: type[BaseException]) -> None:
    with pytest.raises(error), running(STUB) as server:
        raise error
    assert server.process.returncode == 0, "SIGTERM, not SIGKILL"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_ends_the_server_too_unless_it_is_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with running(STUB):
            assert signal.getsignal(number) == signal.SIG_IGN, "as under nohup"
        signal.signal(number, signal.SIG_DFL)
        with pytest.raises(SystemExit) as caught, running(STUB) as server:
            signal.raise_signal(number)
        assert caught.value.code == 128 + number
        assert server.process.returncode == 0
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word, of Linux alone")
def test_a_server_does_not_outlive_a_killed_program() -> None:
    code = (
        "import sys, time\nfrom llmctl.bench.local_server import running\n"
        "with running(sys.argv[1:]) as server:\n    print(server.process.pid, flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, *STUB], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        assert not gone(pid)
        program.kill()
    wait_gone(pid)


def test_a_command_that_there_is_not() -> None:
    with pytest.raises(ServerError, match=r"it said last: error: /no/such/command: No such file"):
        running(["/no/such/command"]).__enter__()


class StubSide:
    """The stub as a side of a comparison."""

    shown, model, api_key, server = "stub", None, None, None

    @contextlib.contextmanager
    def opened(self, ready_timeout: float, tell: Callable[[str], None]) -> Iterator[str]:
        with running(STUB, ready_timeout=ready_timeout, tell=tell) as self.server:
            yield self.server.url


def test_requests_that_failed_because_the_server_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison's visit: the server's end is told, and what it said last; not only that nobody answers."""
    side = StubSide()

    def visit(*_: object) -> Visit:
        assert side.server is not None
        side.server.process.kill()
        figures = {"failed": 2, "completed": 0, "failed_ratio": 1.0}
        return Visit("a", "", figures, [{"kind": "connect", "count": 2, "messages": ["cannot connect"]}])

    for name in ("_ready", "_count_by"):
        monkeypatch.setattr(Player, name, lambda *_: None)
    monkeypatch.setattr(Player, "_visit", visit)
    said = (
        r"ended by itself, exit code -9 \(FailedRequestsError: 2 of 2 requests failed: cannot connect\); it said last"
    )
    with pytest.raises(ServerError, match=said):
        Player(make_plan(BenchCompareConfig()), side, side, Progress()).play(0)


def test_news_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "_NEWS_EVERY_SECONDS", 0.01)
    news: list[str] = []
    tell: Callable[[str], None] = news.append
    with running(STUB, environment={"READY_AFTER": "12"}, tell=tell):
        pass
    assert any(line.startswith("the server is starting: child ") for line in news)


def test_options_of_the_server() -> None:
    wanted = ["-m", "llmctl", "serve", "--model", "m", "--threads", "2"]
    assert serve_command("m", ["--threads", "2"])[1:] == wanted
    for option in ("--port", "--port=1", "--host", "--ssl-keyfile=x"):
        with pytest.raises(UsageError, match=option.partition("=")[0]):
            serve_command("m", [option])
    assert split_options("--threads 2 --seed '3'", "a_args") == ("--threads", "2", "--seed", "3")
    for text, said in (("--x 'y", "No closing quotation"), ("threads", "expected options of 'llmctl serve'")):
        with pytest.raises(UsageError, match=said):
            split_options(text, "a_args")


def test_keys_are_those_that_serve_reads() -> None:
    read = set(re.findall(r'envvar="(LLMCTL_\w*KEY\w*)"', Path(serve_options.__file__).read_text(encoding="utf-8")))
    assert read | SECRET_VARIABLES == local_server._KEYS
