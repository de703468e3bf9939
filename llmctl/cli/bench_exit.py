"""How a bench ends: CI is told what failed, and the process exits with the verdict."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import typer

from llmctl.errors import ExitCode

if TYPE_CHECKING:
    from llmctl.bench.outcome import Outcome

EXIT_CODES = (
    "Exit codes: 0 pass, 1 run-time error, 2 usage, 3 failed requests, 4 objective missed, 5 regression, "
    "6 inconclusive (bench compare, bench sweep --baseline)."
)
INTERRUPTED = "interrupted: what was measured until then is in the result"


def finish(outcome: Outcome, exit_zero: bool, title: str) -> None:
    """A line on stderr for each gate that failed, as GitHub's annotations in its jobs; then the exit."""
    from llmctl.bench.verdict import job_annotations, lines

    result, code = outcome.result, outcome.exit_code
    if os.environ.get("GITHUB_ACTIONS") == "true":
        # GitHub reads commands on stderr as well; stdout may be a document.
        said = job_annotations(result, title)
    else:
        words = {"FAIL": "gate failed", "OPEN": "undecided"}
        said = [f"{words[word]}: {text}" for word, text in lines(result) if word in words]
    for line in said:
        print(line, file=sys.stderr)
    if code == ExitCode.INTERRUPTED:
        print(INTERRUPTED, file=sys.stderr)
    elif code in (ExitCode.RUNTIME, ExitCode.USAGE):
        reasons = [each["reason"] for each in result.get("refused", ())] or result.get("notes", ())  # a sweep's, first
        for reason in reasons[:1]:
            print(f"error: {reason}", file=sys.stderr)
    elif exit_zero:
        return
    if code:
        raise typer.Exit(int(code))
