"""Types commands of documents and pipelines into a shell, in one folder, with a port of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from docs.documents import ROOT
from fixtures import fetch

from llmctl.bench.local_server import free_port

_PORT = "8000"
_SERVES = "llmctl serve"
_READY_SECONDS = 300


class Typist:
    """A folder, and what was started in it; as a context manager it leaves no process behind.

    What is typed has the documents' port replaced by a free one. A server that is not sent to the background is, for a
    reader has another terminal; whatever comes next waits until it is ready. ``curl`` fails when it is refused.

    Args:
        variables: of the environment, beside this process's.
    """

    def __init__(self, folder: Path, variables: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.port = 0
        self._groups: list[int] = []
        self._serving: subprocess.Popen[bytes] | None = None
        programs = folder / ".bin"
        programs.mkdir(parents=True)
        shim = programs / "llmctl"
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llmctl "$@"\n')
        shim.chmod(0o755)
        path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **(variables or {})}

    def __enter__(self) -> Typist:
        return self

    def __exit__(self, *_: object) -> None:
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)
        for _ in range(100):
            if not any(_alive(group) for group in self._groups):
                return
            time.sleep(0.1)
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def type(self, script: str) -> str:
        """Run a script; what it printed.

        Raises:
            AssertionError: it failed; with its output.
        """
        if _SERVES in script:  # now: one that is chosen minutes before may be taken by then
            self.port = free_port()
        script = script.replace(_PORT, str(self.port))
        if script.startswith(_SERVES) and not script.rstrip().endswith("&"):
            script += "" if "--port" in script else f" --port {self.port}"
            self._serving = self._start(script, self.folder / "serve.log")
            return ""
        if self._serving is not None:
            self._wait_ready(self._serving)
            self._serving = None
        log = self.folder / ".output"
        process = self._start(script.replace("curl ", "curl -fsS "), log)
        code = process.wait(600)
        output = log.read_text(encoding="utf-8")
        assert code == 0, f"{script}\nexit code {code}\n{output}"
        return output

    def _start(self, script: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._groups.append(process.pid)
        return process

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end:
            log = (self.folder / "serve.log").read_text(encoding="utf-8")
            assert process.poll() is None, log
            with contextlib.suppress(OSError):
                if fetch(f"http://127.0.0.1:{self.port}/ready", timeout=5)[0] == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready within {_READY_SECONDS} s\n{log}")


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
