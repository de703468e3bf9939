"""A client's process: started, given its time, and heard."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from client_trials.catalog import SCENARIOS, Client
from client_trials.environments import Environment, clean_variables, folder_name
from client_trials.outcomes import Outcome, Trial

REASON_CHARS = 300
_PORT = re.compile(r"(//127\.0\.0\.1):\d+")  # another one in every run


@dataclass(frozen=True)
class Endpoint:
    """What is tried.

    Attributes:
        url: without ``/v1``; ``{scenario}`` in it is replaced.
        key: an API key; None: the server asks for none. tokenizer: folder of the model's.
    """

    url: str
    key: str | None
    model: str
    tokenizer: Path

    def at(self, url: str) -> Endpoint:
        """The same by another address."""
        return replace(self, url=url)

    def variables(self) -> dict[str, str]:
        """As scenarios read them."""
        return {
            "TRIAL_URL": self.url,
            "TRIAL_KEY": self.key or "none",
            "TRIAL_MODEL": self.model,
            "TRIAL_TOKENIZER": str(self.tokenizer),
        }


def play(client: Client, environment: Environment, endpoint: Endpoint, seconds: float, work: Path) -> Trial:
    """Every scenario that the client has, in one process of at most so many seconds."""
    home = work / f"{folder_name(client)}-home"
    variables = clean_variables(home) | endpoint.variables()
    if client.is_npm:
        # Node finds modules beside the file that asks for them.
        variables["TRIAL_MODULES"] = str(work / folder_name(client) / "node_modules")
    try:
        lines, end = _heard([*environment.command, str(client.path)], variables, home, seconds)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return Trial(client.name, environment.version, _outcomes(lines, end, endpoint))


def _heard(command: list[str], variables: Mapping[str, str], home: Path, seconds: float) -> tuple[list[str], str]:
    """What a process printed, and how it ended: empty when well."""
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            command, cwd=home, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        end = ""
        try:
            if process.wait(seconds):
                err.seek(0)
                end = f"exit code {process.returncode}: {(err.read().strip().splitlines() or [''])[-1]}"
        except subprocess.TimeoutExpired:
            end = f"not done within {seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the client's own children too
            process.wait()
        out.seek(0)
        return out.read().splitlines(), end


def _outcomes(lines: list[str], end: str, endpoint: Endpoint) -> dict[str, Outcome]:
    announced: list[str] | None = None
    found: dict[str, Outcome] = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # clients print things too
            said = json.loads(line)
            if isinstance(said, dict) and "scenarios" in said:
                announced = said["scenarios"]
            elif isinstance(said, dict) and "scenario" in said:
                failed = said["reason"]
                reason = _PORT.sub(r"\1", " ".join(str(failed).split()))[:REASON_CHARS] if failed else ""
                found[said["scenario"]] = Outcome("failed" if failed else "ok", reason)
    if announced is None:
        return dict.fromkeys(SCENARIOS, Outcome("failed", (end or "it printed nothing")[:REASON_CHARS]))
    unknown = set(announced) - set(SCENARIOS)
    if unknown:
        raise ValueError(f"unknown scenarios: {', '.join(sorted(unknown))}")
    for name in announced:
        if name not in found:
            found[name] = Outcome("failed", (end or "it ended before this one")[:REASON_CHARS])
    if endpoint.key is None and "wrong_key" in found:
        found["wrong_key"] = Outcome("not tried", "the server asks for no key")
    return {name: found.get(name, Outcome("none")) for name in SCENARIOS}


def untried(client: Client, reason: str) -> Trial:
    """Of a client that cannot be run here."""
    return Trial(client.name, "", dict.fromkeys(SCENARIOS, Outcome("not tried", reason)))
