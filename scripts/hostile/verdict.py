"""What a hostile soak found, and whether it passes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from md_table import print_table

from hostile.judgement import Tally
from hostile.levels import Levels
from hostile.prober import Probe
from llmctl.bench.stats import percentile

MORE_FDS = 4
MORE_THREADS = 8
"""Open files and threads that may be left: of a connection that is just being closed; of pools, which grow by use."""
LOG_BYTES = 4 << 20
_BROKEN = re.compile(r"Traceback|never retrieved|Fatal error|core dumped|internal server error", re.IGNORECASE)


@dataclass(frozen=True)
class Bounds:
    """What is allowed: MiB that each process may have grown by; milliseconds of /health's p99."""

    growth_mib: float
    health_ms: float


@dataclass
class Found:
    """All that was seen. quiet: (begin, end) of the time before the attacks; warm, last: idle levels after warm-up and
    at the end; before, after: exact answers; drain: what was wrong with the end; log: all that the server printed."""

    attacks: dict[str, Tally] = field(default_factory=dict)
    honest: Tally = field(default_factory=Tally)
    probes: list[Probe] = field(default_factory=list)
    quiet: tuple[float, float] = (0.0, 0.0)
    warm: Levels | None = None
    last: Levels | None = None
    peak_mib: float = 0.0
    before: Any = None
    after: Any = None
    drain: list[str] = field(default_factory=list)
    log: str = ""


def health(found: Found) -> dict[str, float | None]:
    """Milliseconds until /health answered: before the attacks and during them, and their ratio; how late the prober
    itself woke."""
    begin, end = found.quiet
    quiet = [1000 * p.seconds for p in found.probes if begin <= p.at <= end]
    under = [1000 * p.seconds for p in found.probes if p.at > end]
    late = [1000 * p.late for p in found.probes if p.at > end]
    before, during = percentile(quiet, 99), percentile(under, 99)
    return {
        "quiet_p99_ms": before,
        "median_ms": percentile(under, 50),
        "p99_ms": during,
        "worst_ms": max(under, default=None),
        "p99_to_quiet": during / before if during is not None and before else None,
        "prober_late_p99_ms": percentile(late, 99),
        "probes": float(len(under)),
    }


def slow_health(found: Found, tally: Tally, allowed_ms: float) -> dict[str, float | int | None]:
    """Milliseconds that /health took at most while an attack was played, and how many probes took more than allowed."""
    during = [
        1000 * p.seconds for p in found.probes if any(a <= p.at + p.seconds and p.at <= b for a, b in tally.spans)
    ]
    return {"health_worst_ms": max(during, default=None), "health_slow": sum(ms > allowed_ms for ms in during)}


def reasons(found: Found, bounds: Bounds) -> list[str]:
    """Why it fails, one line each; empty when it passes."""
    said = [
        f"{name}: {tally.faults} faults, first: {tally.examples[0]}"
        for name, tally in (("honest chats", found.honest), *found.attacks.items())
        if tally.faults
    ]
    if not found.honest.answers["200"]:
        said.append("no honest chat was answered")
    if not any(tally.spans for tally in found.attacks.values()):
        said.append("no attack was played")
    said += _health_reasons(found, bounds) + _level_reasons(found, bounds)
    if found.before is None or found.before != found.after:
        said.append("the idle server's greedy answers are not those of before, bit for bit")
    said += [f"the end: {line}" for line in found.drain]
    if (broken := _BROKEN.search(found.log)) is not None:
        lines = found.log[broken.start() :].splitlines()
        why = next((line for line in lines[1:] if line.strip() and not line.startswith(" ")), "")
        said.append(f"the server's log has '{lines[0][:200]}', {why[:200]}")
    if len(found.log) > LOG_BYTES:
        said.append(f"the server's log has {len(found.log)} bytes, allowed {LOG_BYTES}")
    return said


def _health_reasons(found: Found, bounds: Bounds) -> list[str]:
    seen = health(found)
    if seen["p99_ms"] is None or seen["quiet_p99_ms"] is None:
        return ["/health was not probed"]
    said = []
    if seen["p99_ms"] > bounds.health_ms:
        said.append(
            f"/health: p99 {seen['p99_ms']:.1f} ms, allowed {bounds.health_ms:g} "
            f"({seen['p99_to_quiet']:.1f} times the quiet server's)"
        )
    if failed := [p for p in found.probes if p.status != 200]:
        said.append(f"/health: {len(failed)} probes without 200, first: {failed[0].status or 'no answer'}")
    return said


def _level_reasons(found: Found, bounds: Bounds) -> list[str]:
    warm, last = found.warm, found.last
    if warm is None or last is None:
        return ["memory, files and threads were not measured"]
    said = []
    for name, allowed in (
        *(("api_mib", bounds.growth_mib), ("worker_mib", bounds.growth_mib)),
        *(
            ("api_fds", MORE_FDS),
            ("worker_fds", MORE_FDS),
            ("api_threads", MORE_THREADS),
            ("worker_threads", MORE_THREADS),
        ),
    ):
        before, after = getattr(warm, name), getattr(last, name)
        if after - before > allowed:
            said.append(f"{name}: {after:g} at the end, {before:g} after warm-up, allowed {allowed:g} more")
    if not last.idle:
        said.append(
            f"at the end {last.running} requests run, {last.waiting} wait, "
            f"{100 * last.kv_share:.2f}% of the KV pool is held"
        )
    return said


def report(found: Found, bounds: Bounds, said: Sequence[str]) -> dict[str, Any]:
    """The result as JSON data."""
    return {
        "verdict": "FAIL" if said else "PASS",
        "reasons": list(said),
        "bounds": asdict(bounds),
        "attacks": {name: _tally(found, tally, bounds) for name, tally in found.attacks.items()},
        "honest": _tally(found, found.honest, bounds),
        "health": health(found),
        "after_warmup": None if found.warm is None else asdict(found.warm),
        "at_the_end": None if found.last is None else asdict(found.last),
        "api_peak_mib": found.peak_mib,
        "log_bytes": len(found.log),
    }


def _tally(found: Found, tally: Tally, bounds: Bounds) -> dict[str, Any]:
    kept = {**asdict(tally), "answers": dict(sorted(tally.answers.items())), "plays": len(tally.spans)}
    del kept["spans"]
    return {**kept, **slow_health(found, tally, bounds.health_ms)}


def show(result: Mapping[str, Any], sends: Mapping[str, str]) -> None:
    """The result for a person; ``sends``: what each attack sends."""
    rows = [("honest chats", "streams with known answers", result["honest"])]
    rows += [(name, sends.get(name, ""), tally) for name, tally in result["attacks"].items()]
    head = ("attack", "sends", "plays", "requests", "answers by status", "worst, s", "/health, ms", "slow", "faults")
    print_table(head, [_row(*row) for row in rows])
    for name in ("health", "after_warmup", "at_the_end"):
        print(f"{name}: " + ", ".join(f"{key} {_number(value)}" for key, value in (result[name] or {}).items()))
    print(f"api_peak_mib: {_number(result['api_peak_mib'])}; log_bytes: {result['log_bytes']}")
    print("; ".join([result["verdict"], *result["reasons"]]))


def _row(name: str, sends: str, tally: Mapping[str, Any]) -> list[str]:
    answers = ", ".join(f"{status}: {count}" for status, count in tally["answers"].items())
    requests = sum(tally["answers"].values())
    figures = [f"{tally['worst']:.2f}", _number(tally["health_worst_ms"])]
    figures += [str(tally["health_slow"]), str(tally["faults"])]
    return [name, sends, str(tally["plays"]), str(requests), answers, *figures]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
