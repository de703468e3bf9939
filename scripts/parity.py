#!/usr/bin/env python3
"""Checkpoints between llmctl and other tools, both ways: what one writes the other reads, weight by weight.

    python scripts/parity.py                              # all tools; the tables on stdout
    python scripts/parity.py --keep ~/parity --docs       # environments kept; the tables in docs/formats.md
    python scripts/parity.py --only gptqmodel,autoawq

Tools and versions, and the kinds of checkpoints: ``parity_trials/catalog.py``; what each tool does:
``parity_tools/with_*``. Each has an environment of its own, made under a temporary folder, which is removed, or under
``--keep``, where it is found again. A weight is what a tool's linear computes with (it is given the identity), and
equal when ours, rounded to the dtype the tool computes in, has the same bits. Progress goes to stderr.

Exit codes: 0 all are equal; 1 one differs, or was not made or not read; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from md_table import with_section
from parity_trials.catalog import TOOLS, Tool
from parity_trials.report import to_markdown, to_text
from parity_trials.trials import Trial, Trials, write_dense
from peers.contest import Setup
from trial_options import chosen, work_folder

from llmctl.errors import ExitCode, LlmctlError

DOCS = Path(__file__).resolve().parent.parent / "docs" / "formats.md"
MARKERS = ("<!-- parity: scripts/parity.py --docs -->", "<!-- end of parity -->")


def main() -> int:
    """Run; the process's exit code."""
    parser = _parser()
    args = parser.parse_args()
    try:
        tools = chosen(args.only, {tool.name: tool for tool in TOOLS})
        if args.docs and len(tools) < len(TOOLS):
            raise ValueError("--docs: the table is of all tools, so not with --only")
    except ValueError as error:
        parser.error(str(error))
    try:
        with work_folder(args.keep, "llmctl-parity-") as work:
            found = _tried(args, tools, work)
    except (LlmctlError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return int(ExitCode.RUNTIME)
    versions = {name: versions for name, (versions, _) in found.items()}
    trials = [trial for _, trials in found.values() for trial in trials]
    if args.json:
        print(json.dumps({"versions": versions, "trials": [asdict(trial) for trial in trials]}, indent=2))
    else:
        print(to_text(trials))
    if args.docs:
        section = to_markdown(versions, trials)
        DOCS.write_text(with_section(DOCS.name, DOCS.read_text(encoding="utf-8"), MARKERS, section), encoding="utf-8")
    return 0 if all(trial.equal for trial in trials) else 1


def _tried(args: argparse.Namespace, tools: list[Tool], work: Path) -> dict[str, tuple[dict[str, str], list[Trial]]]:
    flags = tuple(args.pip_flags.split())
    setup = Setup(work, args.model, tuple(range(os.cpu_count() or 1)), pip_flags=flags)
    trials = Trials(setup, write_dense(args.model, work / "dense"), _say, args.timeout)
    return {tool.name: trials.of(tool) for tool in tools}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", metavar="NAMES", help=f"comma-separated, of {', '.join(tool.name for tool in TOOLS)}")
    add("--model", default="demo:smollm2-135m", help="whose tokenizer the random model is given (%(default)s)")
    add("--keep", type=Path, metavar="DIR", help="environments and checkpoints; environments are reused when there")
    add("--timeout", type=float, default=900, help="seconds for each step (%(default)s)")
    add("--pip-flags", default="", help="further options of pip install")
    add("--json", action="store_true", help="JSON instead of the table")
    add("--docs", action="store_true", help="write the tables into docs/formats.md too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
