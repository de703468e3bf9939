"""What this machine has for llmctl, as one document: machine, targets, packages, caches, what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl import __version__
from llmctl.artifact.cache import cache_entries
from llmctl.artifact.memory import human_bytes
from llmctl.bench.environment import cpu_model, git_commit
from llmctl.checkpoint.resolve import cache_dir
from llmctl.extras import DISTRIBUTION, MODULES, install_command, install_hint, missing, pip_install
from llmctl.secret_options import SECRET_VARIABLES
from llmctl.targets.base import Finding
from llmctl.targets.machine import available_memory, physical_cores, usable_cores
from llmctl.targets.table import machine_findings

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_OPTIONAL = ("torch", "transformers", "cupy-cuda13x", "nvidia-cuda-nvrtc", "opentelemetry-sdk", "peft", "datasets")
"""Packages of extras whose version says something about a problem."""
_VARIABLES = (
    "LLMCTL_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "CXX", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "COLUMNS",
)  # fmt: skip
_SECRETS = (*sorted(SECRET_VARIABLES), "OPENAI_API_KEY", "HF_TOKEN")
NEED_TORCH = "quantize, build, convert, merge, eval, and serving what is no engine yet, need PyTorch"
_LEAST_FREE = 1 << 30
"""Bytes of disk below which hardly an engine fits."""


@dataclass
class Diagnosis:
    """Sections of lines (what, found), what is missing, and what some commands would need beside: each with what to do
    about it."""

    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)
    needs: list[dict[str, str]] = field(default_factory=list)

    def add(self, section: str, findings: Iterable[Finding]) -> None:
        """Take in what was found."""
        lines = self.sections.setdefault(section, {})
        for finding in findings:
            lines[finding.name] = _homeless(finding.found)
            if finding.problem:
                problem = f"{finding.name}: {finding.problem}"
                self.problems.append({"problem": _homeless(problem), "fix": _homeless(finding.fix)})

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        head = {"llmctl": __version__, "healthy": not self.problems}
        return {**head, **self.sections, "problems": self.problems, "needs": self.needs}


def diagnose() -> Diagnosis:
    """Look around; nothing is started or loaded but what a target asks its driver."""
    found = Diagnosis()
    found.add("llmctl", _ourselves())
    found.add("machine", _machine())
    for target, findings in machine_findings().items():
        found.add(f"target {target}", findings)
    found.add("packages", _packages())
    found.add("extras", _extras())
    if missing("quantize"):
        found.needs.append({"needs": NEED_TORCH, "fix": _homeless(install_hint("quantize"))})
    found.add("caches", _caches())
    if variables := _variables():
        found.add("environment", variables)
    return found


def _ourselves() -> list[Finding]:
    package, clone = Path(__file__).parents[1], _PROJECT.is_file()
    commit = git_commit() if clone else None
    return [
        Finding("version", __version__ + (f", commit {commit[:12]}" if commit else "")),
        Finding("installed in", f"{package}" + (", a clone" if clone else "")),
        Finding("Python", f"{platform.python_version()}, {platform.python_implementation()}"),
    ]


def _machine() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    return [
        Finding("system", platform.platform()),
        Finding("CPU", cpu_model()),
        Finding(
            "cores", f"{os.cpu_count()} logical; {usable_cores()} usable here, {physical_cores()} of them physical"
        ),
        Finding("memory", f"{human_bytes(memory.total)}, {human_bytes(available_memory())} of it to be had now"),
    ]


def _packages() -> list[Finding]:
    """Those that llmctl cannot do without, and what of the others is installed."""
    findings = []
    for name, requirement in _required().items():
        version = _version(name)
        if version is None:
            findings.append(Finding(name, "not installed", "llmctl needs it", pip_install(requirement)))
        else:
            findings.append(Finding(name, version))
    named = {finding.name for finding in findings}
    return findings + [Finding(name, _version(name) or "not installed") for name in _OPTIONAL if name not in named]


def _required() -> dict[str, str]:
    """The packages that llmctl depends on, each with the versions that will do: as a clone's pyproject.toml or its own
    metadata says."""
    try:
        declared = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    except OSError:
        try:
            declared = importlib.metadata.requires(DISTRIBUTION) or []
        except importlib.metadata.PackageNotFoundError:  # run out of a folder that nobody installed
            declared = []
    plain = [line.partition(";")[0].strip() for line in declared if "extra ==" not in line and "win32" not in line]
    return {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]: line for line in sorted(plain)}


def _extras() -> list[Finding]:
    """What is installed beside them; nothing is needed of it until it is asked for."""
    return [
        Finding(name, f"not installed: {install_command(name)}" if missing(name) else "installed") for name in MODULES
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _caches() -> list[Finding]:
    root = cache_dir()
    there = next(path for path in (root, *root.parents) if os.path.exists(path))  # Path's own raises in a closed folder
    problem = (
        "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to: nothing can be fetched or built"
    )
    sizes: dict[str, int] = {}
    try:
        for entry in cache_entries():
            sizes[entry.kind] = sizes.get(entry.kind, 0) + entry.size
    except OSError as error:
        problem = problem or f"{error.filename or root} cannot be read: {error.strerror}"
    free = shutil.disk_usage(there).free
    short = "" if free >= _LEAST_FREE else f"{human_bytes(free)} of disk are free: hardly an engine fits"
    return [
        Finding("folder", str(root), problem, "LLMCTL_CACHE=DIR names another folder"),
        *(Finding(kind, human_bytes(size)) for kind, size in sizes.items()),
        Finding("free disk", human_bytes(free), short, "llmctl list shows what can go"),
    ]


def _variables() -> list[Finding]:
    """Those that change what llmctl does. Of secrets only that they are set."""
    shown = [Finding(name, os.environ[name]) for name in _VARIABLES if name in os.environ]
    return shown + [Finding(name, "set (not shown)") for name in _SECRETS if name in os.environ]


def _homeless(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Paths without the user's name in them."""
    home = environment.get("HOME", "")
    return re.sub(re.escape(home.rstrip("/")) + r"(?![\w.-])", "~", text) if len(home) > 1 else text
