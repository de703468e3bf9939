"""Where a run was taken: machine, how busy it was before, versions, commit. No device library is imported for it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from llmctl import __version__
from llmctl.config import option_of
from llmctl.secret_options import SECRET_OPTIONS
from llmctl.targets.machine import usable_cores

_PACKAGES = ("numpy", "aiohttp", "torch", "transformers", "tokenizers", "cupy-cuda13x")


def describe_environment() -> dict[str, object]:
    """Facts of this machine and process, JSON-ready; takes about 0.3 s to sample how busy the processors are.

    ``cpu_busy_before`` is the share of all cores busy during that sample, before any load of ours; memory is in
    bytes.
    """
    import psutil

    memory = psutil.virtual_memory()
    return {
        "cpu_model": cpu_model(),
        "cpu_cores": os.cpu_count(),
        "cpu_cores_usable": usable_cores(),
        "memory_total": memory.total,
        "memory_available_before": memory.available,
        "load_average_before": load_average(),
        "cpu_busy_before": round(psutil.cpu_percent(interval=0.3) / 100, 3),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "llmctl": __version__,
        "packages": package_versions(),
        "git_commit": git_commit(),
        "command": [Path(sys.argv[0]).name, *without_secrets(sys.argv[1:])],
    }


def cpu_model() -> str:
    """The processor's marketing name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model\t", "Hardware\t")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load_average() -> list[float] | None:
    """1, 5 and 15 minute load averages."""
    try:
        return [round(x, 2) for x in os.getloadavg()]
    except OSError:
        return None


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter, where installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the repository in the current folder, with ``-dirty`` when it has uncommitted changes."""
    described = _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    return described or None


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def without_secrets(arguments: list[str]) -> list[str]:
    """A command line with its keys and headers blotted out."""
    shown: list[str] = []
    hide = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = name == "--header" or name in map(option_of, SECRET_OPTIONS)
        shown.append("***" if hide else f"{name}=***" if secret and equals else argument)
        hide = secret and not equals
    return shown
