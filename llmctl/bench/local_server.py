"""A server on this machine for as long as it is needed: started on a free port, awaited, ended with its processes."""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields

from llmctl.config import ServeConfig, option_of
from llmctl.errors import ExitCode, LlmctlError, UsageError
from llmctl.secret_options import SECRET_VARIABLES
from llmctl.serving.parent import ending_with_this

READY_SECONDS = 300.0
STOP_SECONDS = 60.0
_GRACE_SECONDS = 10.0
_LAST_WORDS_SECONDS = 10.0
_NEWS_EVERY_SECONDS = 10.0
_LOG_CHARS = 3000
_POLL_SECONDS = 0.05

ADDRESS = frozenset({"host", "port", "root_path", "ssl_keyfile", "ssl_certfile"})
"""Fields of ``ServeConfig`` that are decided here: how the server is reached."""
# A key of the environment would keep the bench itself out; those of other servers are not for this one to know.
_KEYS = SECRET_VARIABLES | {"LLMCTL_API_KEY_FILE"}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""For our own servers: ``urlopen`` asks a proxy of the environment, of 127.0.0.1 too."""


class ServerError(LlmctlError):
    """A server that did not start, died, or did not end as it should.

    Attributes:
        what: what is wrong. log: the end of what it printed, whose last line the message has beside.
    """

    def __init__(self, message: str, log: str = "") -> None:
        last = _last_line(log)
        super().__init__(message + (f"; it said last: {last}" if last else ""))
        self.what, self.log = message, log


class LocalServer:
    """A server that is ready.

    Attributes:
        url: its address. process: its first process. ready_seconds: from its start to ready.
        terminated: whether it has been told to end.
    """

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: int, ready_seconds: float = 0.0) -> None:
        self.url, self.process, self.ready_seconds = url, process, ready_seconds
        self.terminated = False
        self._log = log

    def said(self) -> str:
        """All that it has printed so far."""
        # Not by seek and read: the server writes at the offset of the same open file.
        return os.pread(self._log, os.fstat(self._log).st_size, 0).decode(errors="replace")

    def announced(self, seconds: float = 5.0) -> str:
        """All that it has printed once the last line of ``llmctl serve``'s readiness is there, or after ``seconds``.

        That is drawn beside the first requests.
        """
        end = time.monotonic() + seconds
        while "\ntry: " not in self.said() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.said()

    def terminate(self) -> None:
        """SIGTERM, once: a second one would have it end at once."""
        if not self.terminated:
            self.terminated = True
            self.process.send_signal(signal.SIGTERM)

    def fail(self, message: str) -> ServerError:
        """The error to raise of it."""
        return ServerError(message, self.said()[-_LOG_CHARS:].strip())


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def serve_command(model: str, options: Sequence[str] = ()) -> list[str]:
    """``llmctl serve`` of this installation, less its port.

    Raises:
        UsageError: an option that says where the server is reached.
    """
    ours = {option_of(name) for name in ADDRESS}
    for option in options:
        if option.partition("=")[0] in ours:
            raise UsageError(f"{option}: a server that is started here gets its address here", fix="leave it out")
    return [sys.executable, "-m", "llmctl", "serve", "--model", model, *options]


def option_words(name: str, value: object) -> list[str]:
    """The words of ``llmctl serve`` that give a field of ``ServeConfig`` a value; none where it is so by default.

    Of an option that may be repeated, ``value`` is a tuple or list; of a switch, a bool.
    """
    option, default = option_of(name), next(field.default for field in fields(ServeConfig) if field.name == name)
    if isinstance(value, tuple | list):
        return [word for one in value for word in (option, str(one))]
    if value == default:
        return []
    if isinstance(default, bool):
        return [option if value else option_of(f"no_{name}")]
    return [option, str(value)]


def split_options(text: str, param: str) -> tuple[str, ...]:
    """Options as a shell would split them.

    Raises:
        UsageError: a quote that is not closed, or a first word that is no option.
    """
    option = "--" + param.replace("_", "-")
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"{option} '{text}': {error}", param=param) from error
    if words and not words[0].startswith("-"):
        raise UsageError(f"{option} '{text}': expected options of 'llmctl serve', found '{words[0]}'", param=param)
    return words


@contextlib.contextmanager
def serving(
    model: str,
    options: Sequence[str] = (),
    *,
    ready_timeout: float = READY_SECONDS,
    tell: Callable[[str], None] | None = None,
) -> Iterator[LocalServer]:
    """``llmctl serve`` on a free port, ready; ended with the context. See ``running``."""
    with running(serve_command(model, options), ready_timeout=ready_timeout, tell=tell) as server:
        yield server


@contextlib.contextmanager
def running(
    command: Sequence[str],
    *,
    ready_timeout: float = READY_SECONDS,
    environment: Mapping[str, str] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Iterator[LocalServer]:
    """``COMMAND --port N``, from the moment its ``/ready`` answers 200 until the context ends; then SIGTERM.

    Whatever ends the context ends the server: a terminal that is closed and SIGTERM too, which end the program as
    ``sys.exit`` does where nothing else was made of them; and on Linux what nobody can handle, SIGKILL, where the
    context is of the main thread.

    Args:
        ready_timeout: seconds from start to ready.
        environment: added to this process's, of which API keys of a server are taken away.
        tell: is given a line now and then while the server starts.

    Raises:
        ServerError: it does not get ready, ends by itself, or does not end cleanly.
    """
    port = free_port()
    variables = {name: value for name, value in os.environ.items() if name not in _KEYS} | dict(environment or {})
    with _ended_by_signals(), tempfile.TemporaryFile("w+b") as log:
        start = time.monotonic()
        words = [*command, "--port", str(port)]
        process = subprocess.Popen(
            # Another thread may end before its process, which the kernel would take for the end of both.
            ending_with_this(words) if threading.current_thread() is threading.main_thread() else words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=variables,
            start_new_session=True,  # a terminal's Ctrl-C is for the bench, which then ends its servers
        )
        server = LocalServer(f"http://127.0.0.1:{port}", process, log.fileno())
        try:
            _await_ready(server, start + ready_timeout, ready_timeout, tell)
            server.ready_seconds = time.monotonic() - start
            yield server
            server.terminate()
            _await_end(server)
        except Exception as error:
            if isinstance(error, ServerError) or _lives(server):
                raise  # nothing that the server could explain
            why = f"exit code {process.returncode} ({type(error).__name__}: {error})"
            raise server.fail(f"the server ended by itself, {why}") from error
        finally:
            _end(server)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGHUP and SIGTERM as SystemExit: their default action would leave the server behind, in its own session.

    A signal that is ignored (``nohup``) or handled stays so.
    """

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    numbers: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        numbers = [n for n in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _await_ready(
    server: LocalServer, deadline: float, ready_timeout: float, tell: Callable[[str], None] | None
) -> None:
    news = time.monotonic() + _NEWS_EVERY_SECONDS
    while True:
        if (code := server.process.poll()) is not None:
            error = server.fail(f"the server ended with exit code {code} before it was ready")
            if code == ExitCode.USAGE:  # a model or an option that it was given by us, who had it from the user
                error.exit_code = ExitCode.USAGE
            raise error
        if _answers(server.url + "/ready"):
            return
        now = time.monotonic()
        if now > deadline:
            raise server.fail(f"the server was not ready within {ready_timeout:g} s")
        if tell is not None and now > news:
            news = now + _NEWS_EVERY_SECONDS
            tell(f"the server is starting: {_last_line(server.said()) or 'nothing said yet'}")
        time.sleep(_POLL_SECONDS)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _answers(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # urllib's own errors are OSErrors
        return False


def _lives(server: LocalServer) -> bool:
    """Whether the server goes on; one that answers no more is given the time to say why and end."""
    if not _answers(server.url + "/health"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(_LAST_WORDS_SECONDS)
    return server.process.poll() is None


def _await_end(server: LocalServer) -> None:
    try:
        code = server.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise server.fail(f"the server did not end within {STOP_SECONDS:g} s of SIGTERM: killed") from None
    if code:
        raise server.fail(f"the server ended with exit code {code}")


def _end(server: LocalServer) -> None:
    """End it and its whole session: children that outlive it would take the next server's processors.

    One that was not told to end yet has a little time for it, unless another Ctrl-C ends that.
    """
    process = server.process
    try:
        if not server.terminated and process.poll() is None:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
