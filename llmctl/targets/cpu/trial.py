"""Whether a compiled kernel library opens here: tried in a process of its own, which may crash or hang."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from llmctl.checkpoint.resolve import cache_dir
from llmctl.errors import CompileError
from llmctl.targets.cpu.abi import OTHER_VERSION

_SECONDS = 60.0
_OPENED = "opened"
# sys.path is the caller's: the library must agree with the llmctl that runs here.
_CHILD = f"""
import sys
path, *sys.path[:] = sys.argv[1:]
from pathlib import Path
from llmctl.errors import LlmctlError
from llmctl.targets.cpu.abi import open_library
try:
    open_library(Path(path))
except LlmctlError as error:
    sys.exit(error.message)
print({_OPENED!r})
"""


def try_library(path: Path) -> None:
    """Open a kernel library in another process and check that it was built for this version of llmctl.

    Raises:
        CompileError: it does not load, is of another version, crashes or hangs.
    """
    command = [sys.executable, "-c", _CHILD, str(path), *sys.path]
    try:
        child = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refusal(f"kernel library {path.name}: not open after {_SECONDS:.0f} s") from None
    lines = child.stderr.strip().splitlines()
    if child.returncode < 0:
        raise _refusal(f"kernel library {path.name}: opening it ended with {_signal_name(-child.returncode)}")
    if child.returncode:
        raise _refusal(
            lines[-1] if lines else f"kernel library {path.name}: opening it ended with exit code {child.returncode}"
        )
    if not child.stdout.endswith(f"{_OPENED}\n"):
        raise _refusal(f"kernel library {path.name}: opening it ended the process")


def _refusal(message: str) -> CompileError:
    if OTHER_VERSION in message:  # compiled from this installation's sources, by whatever compiler
        return CompileError(message, fix="reinstall llmctl: its Python and its kernels' sources are of two versions")
    cache = cache_dir() / "kernels"
    return CompileError(message, fix=f"rm -r {cache}, then build again; or set CXX to another compiler")


def _signal_name(number: int) -> str:
    """``SIGILL (Illegal instruction)``."""
    try:
        return f"{signal.Signals(number).name} ({signal.strsignal(number)})"
    except ValueError:
        return f"signal {number}"
