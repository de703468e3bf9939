#!/usr/bin/env python3
"""Chats beside long prompts and a hog's queue, under several settings of the server, side by side.

    python scripts/mixed_load.py --model ENGINE --goodput ttft:2000,tpot:200 --rounds 3 \\
        --setting "fcfs: --scheduling-policy fcfs --itl-target 0" --setting "default:" [-- OPTION ...]

Every round starts ``llmctl serve`` once with each setting, forwards in even rounds and backwards in odd ones (ABBA),
and plays the same load on it (``mixed_traffic.py`` says which). The table has the median over rounds and their range;
the last columns are ratios to the first setting in the same round. Exit code 1 when a request fails, 2 on usage.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from md_table import print_table
from mixed_traffic import Shape, play
from served import serving

from llmctl.bench.environment import describe_environment
from llmctl.bench.gate import parse_goodput
from llmctl.bench.metrics import DEFINITIONS
from llmctl.bench.report import to_json, write_text
from llmctl.errors import LlmctlError, UsageError

TITLES = {"alone": "chats alone", "chat": "chats", "long": "long prompts", "hog": "hog", "all": "all"}
LATENCIES = {
    "median_ttft_ms": "TTFT median, ms",
    "p99_ttft_ms": "TTFT p99, ms",
    "median_itl_ms": "ITL median, ms",
    "p99_itl_ms": "ITL p99, ms",
}
ROWS = [
    *(("alone", key, title) for key, title in LATENCIES.items()),
    *(("chat", key, title) for key, title in LATENCIES.items()),
    *(("chat", f"ratio_{key}", title.partition(",")[0] + " to alone") for key, title in LATENCIES.items()),
    *((name, key, title) for name in ("long", "hog") for key, title in LATENCIES.items()),
    *((name, "goodput_ratio", "goodput, share") for name in ("alone", "chat", "long", "hog", "all")),
    *((name, "completed", "requests done") for name in ("chat", "long", "hog")),
    ("all", "output_throughput", "output tok/s"),
    ("all", "total_token_throughput", "prompt and output tok/s"),
    ("all", "failed", "failed"),
]
"""Class of requests, key of its figures, title of a row."""


@dataclass(frozen=True)
class Setting:
    """Options of ``llmctl serve`` under a name."""

    name: str
    options: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Setting:
        """``NAME: OPTIONS``.

        Raises:
            ValueError: not that.
        """
        name, colon, options = text.partition(":")
        if not colon or not name.strip():
            raise ValueError(f"--setting '{text}': expected NAME: OPTIONS such as 'fcfs: --scheduling-policy fcfs'")
        return cls(name.strip(), tuple(shlex.split(options)))


@dataclass(frozen=True)
class Run:
    """One setting in one round. figures: by class of requests, and then by name."""

    setting: str
    round: int
    shape: Shape
    figures: dict[str, Any]

    def value(self, name: str, key: str) -> float | None:
        """One figure; None where there is none."""
        found = self.figures[name].get(key)
        return None if found is None else float(found)


def order(settings: Sequence[Setting], rounds: int) -> list[tuple[int, Setting]]:
    """(round, setting) in the order in which they run: what changes with time meets all settings alike."""
    return [(n, s) for n in range(rounds) for s in (settings if n % 2 == 0 else reversed(settings))]


def measure(args: argparse.Namespace, shape: Shape, limits: Mapping[str, float]) -> list[Run]:
    """All runs.

    Raises:
        RuntimeError: the settings leave room for prompts of different lengths.
        ServerError: a server does not start, or does not end cleanly.
    """
    runs: list[Run] = []
    for number, setting in order(args.setting, args.rounds):
        with serving(args.model, [*args.serve_args, *setting.options]) as server:
            fitted = shape.within(server.max_model_len)
            if runs and fitted != runs[0].shape:
                raise RuntimeError(
                    f"settings '{runs[0].setting}' and '{setting.name}': expected one length of long prompts, "
                    f"found {runs[0].shape.long_prompt} and {fitted.long_prompt}; give --long-prompt what both hold"
                )
            runs.append(Run(setting.name, number, fitted, asyncio.run(play(server, fitted, args.seed, number, limits))))
        _say(runs[-1], args.rounds)
    return runs


def _say(run: Run, rounds: int) -> None:
    chats = run.figures["chat"]
    print(
        f"round {run.round + 1} of {rounds}, {run.setting}: chats' TTFT median {_text(chats['median_ttft_ms'])} ms, "
        f"ITL median {_text(chats['median_itl_ms'])} ms; kinds of failures: {len(run.figures['failures'])}",
        file=sys.stderr,
        flush=True,
    )


def table(runs: Sequence[Run], names: Sequence[str]) -> list[list[str]]:
    """A line for each of ``ROWS`` that has figures: a cell for every setting, and for all but the first the ratio to
    it."""
    lines = []
    for group, key, title in ROWS:
        values = {name: [run.value(group, key) for run in runs if run.setting == name] for name in names}
        if all(v is None for found in values.values() for v in found):
            continue
        first = values[names[0]]
        ratios = [[_ratio(v, base) for v, base in zip(values[n], first, strict=True)] for n in names[1:]]
        lines.append([TITLES[group], title, *(_spread(values[n]) for n in names), *map(_spread, ratios)])
    return lines


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _spread(values: Iterable[float | None]) -> str:
    """Median and range, ``-`` for nothing."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    low, middle, high = (_text(v) for v in (min(known), median(known), max(known)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"


def failures(runs: Iterable[Run]) -> list[str]:
    """What failed, a line for every kind in every run."""
    return [
        f"round {run.round + 1}, {run.setting}: {row['count']} x {row['kind']}: {row['messages'][0]}"
        for run in runs
        for row in run.figures["failures"]
    ]


def show(runs: Sequence[Run], names: Sequence[str], environment: Mapping[str, Any]) -> None:
    """The table on stdout, with where it was measured."""
    shape = runs[0].shape
    print(
        f"{environment['cpu_model']}, {environment['cpu_cores_usable']} cores usable. {shape.chats} chats of "
        f"{shape.chat_prompt} + {shape.chat_output} tokens a turn, {shape.longs} prompts of {shape.long_prompt} + "
        f"{shape.long_output}, a hog's {shape.hog} of {shape.hog_prompt} + {shape.hog_output}. "
        f"Median and range of {1 + max(run.round for run in runs)} rounds.\n"
    )
    head = ["requests", "figure", *names, *(f"{name} / {names[0]}" for name in names[1:])]
    print_table(head, table(runs, names))


def main() -> int:
    """The command line; the exit code."""
    parser = _parser()
    args = parser.parse_args()
    names = [setting.name for setting in args.setting]
    if len(set(names)) < len(names):
        parser.error(f"--setting: expected different names, found {', '.join(names)}")
    for name in ("rounds", "chats", "chat_prompt", "chat_output", "alone_turns"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(args, name)}")
    shape = Shape(**{field: getattr(args, field) for field in Shape.__dataclass_fields__})
    environment = describe_environment()
    try:
        runs = measure(args, shape, parse_goodput(args.goodput))
        if args.json:
            document = {
                "settings": {s.name: list(s.options) for s in args.setting},
                "serve_args": args.serve_args,
                "goodput_ms": parse_goodput(args.goodput),
                "environment": environment,
                "definitions": DEFINITIONS,
                "runs": [asdict(run) for run in runs],
            }
            write_text(Path(args.json), to_json(document))
    except UsageError as error:
        parser.error(str(error))
    except (LlmctlError, RuntimeError, OSError, aiohttp.ClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(runs, names, environment)
    failed = failures(runs)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _setting(text: str) -> Setting:
    try:
        return Setting.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an engine, or anything that llmctl serve takes")
    parser.add_argument(
        *("--setting",), action="append", required=True, type=_setting, metavar="'NAME: OPTIONS'", help="repeatable"
    )
    parser.add_argument("--rounds", type=int, default=3, help="servers of each setting (3)")
    parser.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="such as ttft:2000,tpot:200")
    parser.add_argument("--chats", type=int, default=4, help="streams at once (4)")
    parser.add_argument("--chat-prompt", type=int, default=64, help="words of a turn (64)")
    parser.add_argument("--chat-output", type=int, default=32, help="tokens of its answer (32)")
    parser.add_argument("--alone-turns", type=int, default=4, help="of each chat before the load (4)")
    parser.add_argument("--longs", type=int, default=2, help="long prompts (2)")
    parser.add_argument("--long-prompt", type=int, default=8192, help="tokens of each, if they fit (8192)")
    parser.add_argument("--long-output", type=int, default=16, help="tokens of its answer (16)")
    parser.add_argument("--hog", type=int, default=250, help="requests of the hog (250)")
    parser.add_argument("--hog-prompt", type=int, default=16, help="words of each (16)")
    parser.add_argument("--hog-output", type=int, default=16, help="tokens of its answer (16)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (0)")
    parser.add_argument("--json", metavar="FILE", help="everything that was measured")
    parser.add_argument("serve_args", nargs="*", metavar="-- OPTION", help="options of every server")
    return parser


if __name__ == "__main__":
    sys.exit(main())
