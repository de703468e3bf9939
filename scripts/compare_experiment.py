#!/usr/bin/env python3
"""How often ``llmctl bench compare`` is wrong: equal sides called a regression, a planted slowdown not found.

    python scripts/compare_experiment.py --model ./engine --work ~/compare-experiment
    python scripts/compare_experiment.py --model ./engine --work ~/compare-experiment --live 20
    python scripts/compare_experiment.py --simulate 0.02 --resamplings 300

Records rounds of two kinds on this machine, the kinds in turns: a model against itself (A/A), and against itself with
every step of the engine longer, so that it does --slowdown less in the same time. Then it makes 2,000 comparisons of
rounds drawn from each kind's, with replacement, and counts their verdicts; --live N also plays N comparisons of each
kind. Rounds and verdicts are kept in --work: a run that was ended goes on where it was, if it is of the same version
of the code, and its live comparisons of the same rules. --simulate SD makes the rounds up instead, each anew, with
normal noise of so large a standard deviation (a share); also those of a B that is as slow as is just allowed.
Markdown on stdout.

A round is 3 starts of the server and 4 loads: with the demo model on two idle cores and a load of half a second six
seconds, so that 30 rounds of each kind take six minutes and 20 live comparisons of each kind an hour where a round
scatters by 1.5%. On a busy machine nothing is learnt: most verdicts are inconclusive there (docs/bench.md says what
makes rounds scatter less).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from md_table import markdown_table

from llmctl import __version__
from llmctl.bench import local_server
from llmctl.bench.compare import Look, Rules, round_document, rules_of, run_compare
from llmctl.bench.config import BenchCompareConfig
from llmctl.bench.environment import describe_environment
from llmctl.bench.progress import Progress
from llmctl.bench.ratios import Decision
from llmctl.bench.rounds import ORDERS, Player, Round, Visit
from llmctl.bench.serve_plan import make_plan
from llmctl.bench.sides import EngineSide, Side
from llmctl.errors import ExitCode, LlmctlError

KINDS = ("equal", "slowed")
CODES = {ExitCode.OK: "pass", ExitCode.REGRESSION: "regression", ExitCode.INCONCLUSIVE: "undecided"}
SLOWED = Path(__file__).resolve().parent / "slowed"


@dataclass(frozen=True)
class SlowedSide(EngineSide):
    """The model served with longer steps; ``share`` of a step's time is added to it."""

    share: float = 0.0

    @contextlib.contextmanager
    def opened(self, ready_timeout: float, tell: Any) -> Iterator[str]:
        """The address of the server started."""
        path = os.pathsep.join([str(SLOWED), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = local_server.serve_command(self.served, self.options)
        environment = {"PYTHONPATH": path, "SLOWED_STEPS": str(self.share)}
        with local_server.running(command, ready_timeout=ready_timeout, environment=environment, tell=tell) as server:
            yield server.url
            if "slowed: every step takes" not in server.said():
                raise LlmctlError("the slowdown was not planted: the worker did not import scripts/slowed")


def sides_of(kind: str, model: str, options: Sequence[str], slowdown: float) -> tuple[Side, Side]:
    """A, and B which does ``slowdown`` less in the same time if it is of the kind ``slowed``."""
    a = EngineSide(model, tuple(options))
    return a, a if kind == "equal" else SlowedSide(model, tuple(options), share=slowdown / (1 - slowdown))


def round_of(document: Mapping[str, Any]) -> Round:
    """A round as ``round_document`` wrote it."""
    visits = [
        Visit(v["side"], v["date"], {k: x for k, x in v.items() if k not in ("side", "date")}, [])
        for v in document["visits"]
    ]
    return Round(document["order"], document["busy_before"], tuple(visits))


def settled(rules: Rules, rounds: Sequence[Round]) -> Look:
    """The look with which a comparison of these rounds ends."""
    for at in rules.looks.rounds:
        look = rules.look(rounds[:at])
        if look.decision != Decision.UNDECIDED:
            break
    return look


def resample(rules: Rules, rounds: Sequence[Round], trials: int, seed: int) -> list[tuple[str, int]]:
    """(decision, rounds that it took) of comparisons whose rounds are drawn from those recorded."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(trials):
        look = settled(rules, [rounds[i] for i in rng.integers(0, len(rounds), size=rules.looks.max_rounds)])
        found.append((str(look.decision), look.rounds))
    return found


def simulate(rules: Rules, slowdown: float, noise: float, trials: int, seed: int) -> list[tuple[str, int]]:
    """(decision, rounds that it took) of comparisons of rounds made up: all metrics have a visit's noise in common."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(trials):
        look = settled(rules, [_made_up(i, slowdown, noise, rng) for i in range(rules.looks.max_rounds)])
        found.append((str(look.decision), look.rounds))
    return found


def _made_up(number: int, slowdown: float, noise: float, rng: np.random.Generator) -> Round:
    visits = []
    for side in ORDERS[number % 2].lower():
        speed = 100 * (1 - slowdown * (side == "b")) * np.exp(noise * rng.normal())
        own = 1 + 0.3 * noise * rng.normal(size=2)
        figures = {
            "output_throughput": speed,
            "median_tpot_ms": own[0] * 1e3 / speed,
            "median_e2el_ms": own[1] * 1e5 / speed,
        }
        visits.append(Visit(side, "", figures, []))
    return Round(ORDERS[number % 2], 0.0, tuple(visits))


def record(
    config: BenchCompareConfig, work: Path, args: argparse.Namespace, progress: Progress
) -> dict[str, list[Round]]:
    """Rounds of both kinds, in turns; those in ``work`` are not played again."""
    files = {kind: work / f"rounds-{kind}.jsonl" for kind in KINDS}
    rounds = {kind: [round_of(json.loads(line)) for line in read_lines(path)] for kind, path in files.items()}
    plan = make_plan(config)
    players = {
        kind: Player(plan, *sides_of(kind, args.model, args.serve_args, args.slowdown), progress) for kind in KINDS
    }
    while any(len(rounds[kind]) < args.rounds for kind in KINDS):
        kind = min(KINDS, key=lambda name: len(rounds[name]))
        played = players[kind].play(len(rounds[kind]))
        rounds[kind].append(played)
        with files[kind].open("a", encoding="utf-8") as file:
            file.write(json.dumps(round_document(played)) + "\n")
        ratio = played.log_ratio("output_throughput")
        progress.log(f"{kind}: round {len(rounds[kind])}/{args.rounds}: B/A {np.exp(ratio or np.nan):.3f}")
    return rounds


def live(
    config: BenchCompareConfig, work: Path, args: argparse.Namespace, progress: Progress
) -> dict[str, list[tuple[str, int]]]:
    """(verdict, rounds) of comparisons played for real, the kinds in turns."""
    path = work / "live.jsonl"
    found: dict[str, list[tuple[str, int]]] = {kind: [] for kind in KINDS}
    for line in read_lines(path):
        kind, verdict, rounds = json.loads(line)
        found[kind].append((verdict, rounds))
    while any(len(found[kind]) < args.live for kind in KINDS):
        kind = min(KINDS, key=lambda name: len(found[name]))
        outcome = run_compare(config, progress, sides_of(kind, args.model, args.serve_args, args.slowdown))
        if outcome.exit_code not in CODES:
            raise LlmctlError(
                f"a live comparison ended with exit code {int(outcome.exit_code)}: {outcome.result['notes']}"
            )
        row = (CODES[outcome.exit_code], outcome.result["num_rounds"])
        found[kind].append(row)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, *row]) + "\n")
        progress.log(f"{kind}: live comparison {len(found[kind])}/{args.live}: {row[0]} after {row[1]} rounds")
    return found


def read_lines(path: Path) -> list[str]:
    """Those of a file; none of one that is not there."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def table(title: str, found: Mapping[str, Sequence[tuple[str, int]]]) -> str:
    """Shares of verdicts by kind."""
    rows = []
    for kind, verdicts in found.items():
        counts, total = Counter(verdict for verdict, _ in verdicts), len(verdicts)
        shares = [f"{counts[str(d)] / total:.2%}" for d in (Decision.REGRESSION, Decision.PASS, Decision.UNDECIDED)]
        rows.append([kind, str(total), *shares, f"{np.median([rounds for _, rounds in verdicts]):g}"])
    return f"{title}\n\n" + markdown_table(
        ["B", "comparisons", "regression", "pass", "inconclusive", "rounds, median"], rows
    )


def spread(rounds: Mapping[str, Sequence[Round]], metrics: Sequence[str]) -> str:
    """What was recorded: the ratio and its scatter over rounds."""
    rows = []
    for kind, played in rounds.items():
        for metric in metrics:
            logs = [value for one in played if (value := one.log_ratio(metric)) is not None]
            rows.append([kind, metric, str(len(logs)), f"{np.exp(np.median(logs)):.4f}", f"{np.std(logs, ddof=1):.2%}"])
    busy = np.median([one.busy_before for played in rounds.values() for one in played])
    head = markdown_table(["B", "metric", "rounds", "B/A, median", "standard deviation of a round"], rows)
    return f"{head}\n\nBefore the rounds others used {busy:.0%} of the processors (median)."


def main() -> int:
    """Run; the process's exit code."""
    args = arguments()
    work = args.work and args.work.expanduser()
    config = configured(args)
    progress = Progress()
    try:
        rules = rules_of(make_plan(config), config)
        if args.simulate is not None:
            # What is allowed of a latency, which becomes 1 / (1 - slowdown) as much.
            slowdowns = {"equal": 0.0, "at the limit": rules.allowed / (1 + rules.allowed), "slowed": args.slowdown}
            ways = {kind: partial(simulate, rules, share, args.simulate) for kind, share in slowdowns.items()}
            print(table("Simulated:", spread_out(ways, args.resamplings)))
            return 0
        work.mkdir(parents=True, exist_ok=True)
        check_kept(work / "experiment.json", experiment_document(config, args), "another experiment is kept there")
        rounds = record(config, work, args, progress)
        ways = {kind: partial(resample, rules, rounds[kind]) for kind in KINDS}
        tables = [spread(rounds, rules.metrics), table("Drawn from them:", spread_out(ways, args.resamplings))]
        if args.live:
            check_kept(
                work / "live.json", rules_document(rules, config), "live comparisons by other rules are kept there"
            )
            tables.append(table("Live:", live(config, work, args, progress)))
    except LlmctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    finally:
        progress.stop()
    print("\n\n".join(tables))
    return 0


def spread_out(
    ways: Mapping[str, Callable[[int, int], list[tuple[str, int]]]], trials: int
) -> dict[str, list[tuple[str, int]]]:
    """Each kind's comparisons, made by ``way(trials, seed)`` on all processors."""
    parts = max(1, os.cpu_count() or 1)
    sizes = [len(part) for part in np.array_split(range(trials), parts)]
    with ProcessPoolExecutor(parts) as pool:
        return {
            kind: [row for chunk in pool.map(way, sizes, range(parts)) for row in chunk] for kind, way in ways.items()
        }


def configured(args: argparse.Namespace) -> BenchCompareConfig:
    """The comparison that is tried, as its options' defaults have it unless the arguments say otherwise."""
    config = BenchCompareConfig(
        num_prompts=args.num_prompts,
        max_concurrency=args.max_concurrency,
        input_len=args.input_len,
        output_len=args.output_len,
        max_rounds=args.max_rounds,
    )
    more = {
        name: value for name in ("max_regression", "regression_metrics") if (value := getattr(args, name)) is not None
    }
    return replace(config, **more)


def experiment_document(config: BenchCompareConfig, args: argparse.Namespace) -> dict[str, Any]:
    """What rounds must have in common: the load, what is served, the code and the processor."""
    environment = describe_environment()
    return {
        **{name: getattr(config, name) for name in ("num_prompts", "max_concurrency", "input_len", "output_len")},
        **{"model": str(args.model), "serve_args": list(args.serve_args), "slowdown": args.slowdown},
        **{"cpu": environment["cpu_model"], "version": __version__, "git_commit": environment["git_commit"]},
    }


def rules_document(rules: Rules, config: BenchCompareConfig) -> dict[str, Any]:
    """What live comparisons must have in common as well."""
    return {
        **{"metrics": list(rules.metrics), "allowed": rules.allowed, "confidence": config.confidence},
        "looks": list(rules.looks.rounds),
    }


def check_kept(path: Path, mine: Mapping[str, Any], said: str) -> None:
    """Keep what this run is of beside its results.

    Raises:
        LlmctlError: the folder holds those of another; it names what differs.
    """
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else mine
    differing = [
        f"{key} {kept.get(key)!r} there, {value!r} here" for key, value in mine.items() if kept.get(key) != value
    ]
    if differing:
        raise LlmctlError(f"{path}: {said}: {'; '.join(differing)}", fix="another --work")
    path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="engine, checkpoint or demo:smollm2-135m")
    parser.add_argument("--work", type=Path, help="folder that keeps what was measured")
    parser.add_argument("--rounds", type=int, default=30, help="recorded of each kind (30)")
    parser.add_argument("--slowdown", type=float, default=0.05, help="share that the slowed side does less (0.05)")
    parser.add_argument("--resamplings", type=int, default=2000, help="comparisons drawn of each kind (2000)")
    parser.add_argument("--simulate", type=float, metavar="SD", help="make rounds up, with so much noise (a share)")
    parser.add_argument("--live", type=int, default=0, help="comparisons played of each kind (0)")
    parser.add_argument("--num-prompts", type=int, default=8, help="requests of a visit (8)")
    parser.add_argument("--max-concurrency", type=int, default=4, help="of them at once (4)")
    parser.add_argument("--input-len", default="32", help="tokens of a prompt (32)")
    parser.add_argument("--output-len", default="64", help="tokens of an output (64)")
    parser.add_argument("--max-rounds", type=int, default=30, help="of a comparison (30)")
    parser.add_argument("--max-regression", help="allowed, as of bench compare")
    parser.add_argument("--regression-metrics", help="that decide, as of bench compare")
    parser.add_argument("serve_args", nargs="*", metavar="-- OPTION", help="options of every server")
    args = parser.parse_args()
    if args.simulate is None and not (args.model and args.work):
        parser.error("expected --model and --work, or --simulate")
    return args


if __name__ == "__main__":
    sys.exit(main())
