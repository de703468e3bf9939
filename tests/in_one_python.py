"""Several commands of llmctl in a Python of their own, with its environment: imports are paid for once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping

_COMMANDS = """
import json, sys
from typer.testing import CliRunner
from llmctl.cli.main import app

results = []
for args in json.load(sys.stdin):
    result = CliRunner().invoke(app, args)
    results.append([result.exit_code, result.stdout, result.stderr, repr(result.exception)])
print(json.dumps(results))
"""


def run(variables: Mapping[str, str], *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Python with these arguments; ``variables`` beside this process's own."""
    env = {**os.environ, **variables}
    command = [sys.executable, *args]
    return subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def answers(variables: Mapping[str, str], *commands: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command; an exception that is no exit fails."""
    done = run(variables, "-c", _COMMANDS, stdin=json.dumps(commands))
    assert done.returncode == 0, done.stderr
    found = []
    for code, stdout, stderr, exception in json.loads(done.stdout):
        assert "SystemExit" in exception or exception == "None", exception
        found.append((code, stdout, stderr))
    return found
