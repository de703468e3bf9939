#!/usr/bin/env python3
"""How long ``llmctl serve`` takes to be ready: from its exec to the first 200 of ``/ready``, and what it says itself.

    python scripts/start_time.py --model ./engine
    python scripts/start_time.py --model ./engine --starts 20 -- --threads 2

``/ready`` is asked every 50 ms, so that the first figure is that much too large at most. The first start, which may
find files that are not in memory, is not counted. Options after ``--`` are the server's.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from statistics import median

from md_table import print_table

from llmctl.bench import local_server
from llmctl.bench.environment import describe_environment
from llmctl.errors import LlmctlError


def said_seconds(said: str) -> float:
    """What the server's line of readiness says.

    Raises:
        LlmctlError: there is none.
    """
    found = re.search(r"ready in ([\d.]+) s", said)
    if found is None:
        raise LlmctlError(f"expected 'ready in N s' of the server, found {said[-200:]!r}")
    return float(found[1])


def start(model: str, options: Sequence[str]) -> tuple[float, float]:
    """(seconds to ``/ready``, what the server says) of one start."""
    with local_server.serving(model, options) as server:
        return server.ready_seconds, said_seconds(server.announced())


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an engine")
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("options", nargs="*", help="of the server, after --")
    args = parser.parse_args()
    if args.starts < 1:
        parser.error(f"--starts: expected at least 1, found {args.starts}")
    try:
        found = [start(args.model, args.options) for _ in range(args.starts + 1)][1:]
    except LlmctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    names = ("exec to the first 200 of /ready", "what the server says")
    rows = [
        [name, f"{median(seconds):.2f}", f"{min(seconds):.2f}–{max(seconds):.2f}"]
        for name, seconds in zip(names, zip(*found, strict=True), strict=True)
    ]
    print_table(["start, s", "median", "range"], rows)
    print(f"\n{args.starts} starts; {describe_environment()['cpu_model']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
