"""Throw-away virtual environments: made once, reused while what they must hold is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from peers.contest import Install, PeerError, Setup

_CONSTRAINT = "torch-constraint.txt"


def installed(folder: Path) -> dict[str, str]:
    """Versions of the distributions in a virtual environment, by normalized name; empty without one."""
    python = folder / "bin" / "python"
    if not python.exists():
        return {}
    listed = subprocess.run(
        [str(python), "-m", "pip", "--disable-pip-version-check", "list", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        raise PeerError(f"{folder}: pip does not run there: {listed.stderr.strip()[-200:]}; remove the folder")
    return {_normal(row["name"]): str(row["version"]) for row in json.loads(listed.stdout)}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def install(setup: Setup, wanted: Install, say: Callable[[str], None]) -> dict[str, str]:
    """Make the environment unless it holds the wanted distribution already; versions of what is to be shown.

    Raises:
        PeerError: pip failed; its output is in the log that the message names.
    """
    folder = setup.venv(wanted.venv)
    if _normal(wanted.shown[0]) not in installed(folder):
        log = setup.work / f"{wanted.venv}-install.log"
        say(f"installing {wanted.shown[0]} into {folder} (log: {log})")
        log.unlink(missing_ok=True)
        _run([sys.executable, "-m", "venv", str(folder)], {}, log)
        for group in wanted.groups:
            _run(pip_install(setup, folder, group), build_limits(setup.threads) | dict(wanted.environment), log)
            _pin_torch(folder)
    found = installed(folder)
    unwanted = [name for name in wanted.unwanted if _normal(name) in found]
    if unwanted:
        _run([_python(folder), "-m", "pip", "uninstall", "--yes", *unwanted], {}, setup.work / f"{wanted.venv}.log")
    return {name: found[_normal(name)] for name in wanted.shown if _normal(name) in found}


def pip_install(setup: Setup, folder: Path, group: tuple[str, ...]) -> list[str]:
    """The command that installs a group; PyTorch stays the one that the first group brought."""
    constraint = folder / _CONSTRAINT
    pinned = ["--constraint", str(constraint)] if constraint.exists() else []
    return [_python(folder), "-m", "pip", "install", "--disable-pip-version-check", *setup.pip_flags, *pinned, *group]


def build_limits(threads: int) -> dict[str, str]:
    """Variables that keep a source build from starting a compiler for every file at once."""
    return {"CMAKE_BUILD_PARALLEL_LEVEL": str(threads), "MAKEFLAGS": f"-j{threads}", "MAX_JOBS": str(threads)}


def _pin_torch(folder: Path) -> None:
    """Without this a package that asks for any torch pulls PyTorch's newest build, gigabytes of CUDA included."""
    version = installed(folder).get("torch")
    if version is not None:
        (folder / _CONSTRAINT).write_text(f"torch=={version}\n", encoding="utf-8")


def _python(folder: Path) -> str:
    return str(folder / "bin" / "python")


def _run(command: list[str], environment: Mapping[str, str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        done = subprocess.run(
            command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise PeerError(f"{' '.join(command[:5])} … failed: {' '.join(tail)[:300]} (log: {log})")
