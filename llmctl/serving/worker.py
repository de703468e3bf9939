"""The worker process: one engine loop behind one channel. ``python -m llmctl.serving.worker``, settings on stdin.

It dies with the API process: on Linux the kernel kills it (PR_SET_PDEATHSIG), elsewhere the end of stdin, which the API
process holds open, does. It ignores SIGINT, SIGTERM and SIGHUP: a terminal's Ctrl-C and a service manager signal the
whole group, and the worker must outlive the drain and a reload; the API process tells it when to stop.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading

import msgspec

from llmctl.errors import HostMemoryError, LlmctlError, MissingPackageError, resource_error
from llmctl.extras import missing_package
from llmctl.serving.parent import end_with_parent
from llmctl.serving.spawned import FOR_ITS_PARENT
from llmctl.serving.transport import WorkerChannel
from llmctl.serving.wire import ErrorInfo, Event, WorkerFailed, encode
from llmctl.serving.worker_settings import WorkerSettings

log = logging.getLogger("llmctl.worker")

_NO_MISTAKES = (HostMemoryError, MissingPackageError)
"""What is said in place of an exception of other code, whose traceback tells nobody anything."""


def ignore_signals() -> None:
    """What is for the API process alone; it held them back until now, see ``SpawnedWorker``."""
    for number in FOR_ITS_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_ITS_PARENT)


def die_with_parent(parent_pid: int) -> None:
    """Make sure that this process does not outlive its parent."""
    lives = end_with_parent(signal.SIGKILL, parent_pid)
    threading.Thread(target=_exit_at_end_of_stdin, name="parent-watch", daemon=True).start()
    if not lives:
        os._exit(1)


def _exit_at_end_of_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def _read_settings() -> WorkerSettings:
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = os.read(0, 1)  # unbuffered: the rest of stdin belongs to the parent watch
        if not chunk:
            sys.exit("llmctl.serving.worker is started by 'llmctl serve', with its settings on stdin")
        line += chunk
    return msgspec.json.decode(bytes(line), type=WorkerSettings)


def _preload() -> None:
    """Import what engines need while the settings are on their way; what fails here fails again in ``main``, which
    tells."""
    gc.disable()
    with contextlib.suppress(Exception):
        import llmctl.artifact.start
        import llmctl.serving.engine_loop
        import llmctl.structured.compiler  # noqa: F401
    gc.freeze()
    gc.enable()


def _as_said(error: Exception) -> LlmctlError:
    """What the API process tells of an exception: what a user can see going wrong as it is, a mistake by its name."""
    if isinstance(error, LlmctlError):
        return error
    if (known := missing_package(error) or resource_error(error)) is not None:
        return known
    if isinstance(error, OSError):
        return LlmctlError(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    text = " ".join(str(error).split())
    return LlmctlError(f"the engine failed: {type(error).__name__}" + (f": {text}" if text else ""))


def main() -> int:
    """Serve one engine until told to stop; the exit code."""
    ignore_signals()
    _preload()
    settings = _read_settings()
    die_with_parent(settings.parent_pid)
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s worker: %(message)s")
    channel = WorkerChannel(socket.socket(fileno=settings.channel))

    def send(event: Event) -> None:
        channel.send(encode(event))

    try:
        # Imported inside the try: the first failure of a heavy import is reported, too.
        from llmctl.serving.engine_loop import EngineLoop, start
        from llmctl.structured.compiler import GrammarCompiler

        started = start(settings.config, send, settings.processors)
        engine = started.engine
        compiler = GrammarCompiler(lambda: started.tokenizer, engine.limits.vocab_size, engine.eos_token_ids)
        gc.collect()
        gc.freeze()  # what start-up allocated stays; do not scan it again in the middle of a step
        EngineLoop(engine, channel, compiler, settings.idle_seconds).run()
    except (EOFError, ConnectionError):  # the API process is gone; its death ends this one, too
        return 1
    except Exception as error:
        said = _as_said(error)
        if said is not error and not isinstance(error, OSError) and not isinstance(said, _NO_MISTAKES):
            log.exception("the engine failed")
        with contextlib.suppress(ConnectionError):
            send(WorkerFailed(ErrorInfo.of(said)))
        return int(said.exit_code)
    finally:
        channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
