"""Throw-away environments: a virtual environment for each Python client, a folder of modules for each of npm's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers.contest import Install, PeerError, Setup
from peers.venvs import install as install_venv

from client_trials.catalog import Client

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "SSL_CERT_FILE", "SYSTEMROOT")
NPM_SECONDS = 600


@dataclass(frozen=True)
class Environment:
    """Where a client's scenarios run: ``command`` is followed by their file. version: of the client."""

    command: tuple[str, ...]
    version: str


def folder_name(client: Client) -> str:
    """Of the client's environment and of what is kept of it."""
    return re.sub(r"\W+", "-", client.name).strip("-")


def install(client: Client, setup: Setup, say: Callable[[str], None]) -> Environment:
    """The client's environment, made unless it holds what is pinned already.

    Raises:
        PeerError: it cannot be made.
    """
    return _npm(client, setup, say) if client.is_npm else _venv(client, setup, say)


def _venv(client: Client, setup: Setup, say: Callable[[str], None]) -> Environment:
    first, pinned = client.packages[0].split("==")
    name = first.partition("[")[0]
    wanted = Install(folder_name(client), (client.packages,), (name,))
    (found,) = install_venv(setup, wanted, say).values()
    if found != pinned:
        folder = setup.venv(wanted.venv)
        raise PeerError(f"{folder}: expected {name} {pinned}, found {found}; remove the folder")
    return Environment((setup.binary(wanted.venv, "python"),), found)


def _npm(client: Client, setup: Setup, say: Callable[[str], None]) -> Environment:
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        raise PeerError(f"no {'npm' if npm is None else 'node'} on PATH")
    name, _, pinned = client.packages[0].rpartition("@")
    folder = setup.work / folder_name(client)
    manifest = folder / "node_modules" / name / "package.json"
    if not manifest.exists():
        say(f"installing {client.name} into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts"]
        command += ["--cache", str(setup.work / "npm-cache")]
        done = subprocess.run(
            [*command, *client.packages], capture_output=True, text=True, check=False, timeout=NPM_SECONDS
        )
        if done.returncode:
            raise PeerError(f"npm install {' '.join(client.packages)} failed: {done.stderr.strip()[:300]}")
    found = str(json.loads(manifest.read_text(encoding="utf-8"))["version"])
    if found != pinned:
        raise PeerError(f"{folder}: expected {name} {pinned}, found {found}; remove the folder")
    return Environment((node,), found)


def clean_variables(home: Path) -> dict[str, str]:
    """A process's environment in which no client finds this user's keys, settings or caches, nor reports its use."""
    temporary = home / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        **kept,
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
        "DO_NOT_TRACK": "1",
        "HF_HOME": str(home / "huggingface"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LLM_USER_PATH": str(home / "llm"),
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
    }


def setup_of(work: Path, model: str, pip_flags: tuple[str, ...]) -> Setup:
    """For installations below ``work``."""
    return Setup(work, model, tuple(range(os.cpu_count() or 1)), pip_flags=pip_flags)
