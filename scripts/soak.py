#!/usr/bin/env python3
"""Mixed load on a server for a long time: does memory grow, are KV blocks conserved, does it ever stall or fail?

    python scripts/soak.py --model ./engine --minutes 20
    python scripts/soak.py --base-url http://127.0.0.1:8000 --pid 1234
    python scripts/soak.py --hostile --model ./engine --minutes 20

Starts ``llmctl serve`` (or takes a running one; ``--pid`` is then its API process) and drives it in rounds of changing
concurrency: completions and chat, streamed and not, seeds, log-probabilities, stop strings, clients that leave in the
middle of a stream or of the prefill, prompts that are too long. After each round the server must fall idle, with all
KV blocks free and no request left. Memory is the sum of the anonymous memory of all processes of the server at
those idle moments; the first ``--warmup`` minutes do not count, during which the KV cache's pages should all be touched
(the server that this script starts has a small one, so that they are).

With ``--hostile`` attacks of every kind take turns beside well-behaved streams whose answers are known
(``hostile/attacks.py`` has the table, ``hostile/verdict.py`` what must hold); ``--minutes 0.2`` plays a few,
with ``--growth-mib 200``: a warm-up that short does not touch all of the KV cache, whose pages then count as growth.

Exit code 0 when every bound holds, 1 otherwise. Stdout holds the verdict (one JSON document with ``--json``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import psutil
from process_memory import tree_memory
from served import client_session, parse_metrics, serving
from soak_clients import KINDS, Client, Endpoint, Record

LEVELS = (1, 4, 8, 16, 32, 2)
POLL_SECONDS = 0.2
GROWTH_MIB = 16.0
IDLE_SERIES = (
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "generation_tokens_total",
    "num_preemptions_total",
)  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """What is allowed. growth_mib: memory after warm-up. stall_seconds: without a step while requests run, or between
    two chunks of a stream. idle_seconds: from the last answer until nothing runs. Seconds are those of ``OwnClock``."""

    growth_mib: float
    stall_seconds: float
    idle_seconds: float


@dataclass(frozen=True)
class Sample:
    """An idle moment. at: seconds since the start; anonymous, resident: MiB over all processes of the server (None
    when they are not known); blocks: share of the KV cache held; tokens, preemptions: so far."""

    at: float
    anonymous: float | None
    resident: float | None
    blocks: float
    running: float
    waiting: float
    tokens: float
    preemptions: float


@dataclass
class SoakRecord(Record):
    """With what was seen from outside. step_gap: longest time without a step while requests ran, seconds of
    ``clock``."""

    step_gap: float = 0.0
    samples: list[Sample] = field(default_factory=list)


def growth(samples: Sequence[Sample], warm: float) -> float | None:
    """MiB that the anonymous memory grew after ``warm`` seconds: median of the last third over that of the first third.

    None with fewer than three samples, or when memory was not measured.
    """
    values = [s.anonymous for s in samples if s.at >= warm and s.anonymous is not None]
    if len(values) < 3:
        return None
    third = max(1, len(values) // 3)
    return _median(values[-third:]) - _median(values[:third])


def verdict(record: SoakRecord, bounds: Bounds, warm: float, expect_memory: bool) -> list[str]:
    """Every bound that does not hold, one line each; empty when all is well."""
    found = []
    grown = growth(record.samples, warm)
    if expect_memory and grown is None:
        found.append("memory: fewer than three idle moments after warm-up; run longer")
    if grown is not None and grown > bounds.growth_mib:
        found.append(f"memory grew by {grown:.1f} MiB after warm-up, allowed {bounds.growth_mib:g}")
    for sample in record.samples:
        if sample.running or sample.waiting:
            found.append(
                f"{sample.running:g} running and {sample.waiting:g} waiting requests at {sample.at:.0f} s, "
                f"{bounds.idle_seconds:g} s after the last client was done"
            )
        elif sample.blocks:
            found.append(f"{100 * sample.blocks:.2f}% of the KV blocks held at {sample.at:.0f} s with no request")
    for what, seconds in (("no step while requests ran", record.step_gap), ("between two chunks", record.chunk_gap)):
        if seconds > bounds.stall_seconds:
            found.append(f"stall: {what} for {seconds:.2f} s, allowed {bounds.stall_seconds:g}")
    if record.answers["failed"]:
        found.append(f"{record.answers['failed']} failures, first: {record.errors[0]}")
    if not any(record.answers[kind] for kind in KINDS):
        found.append("no request was answered")
    return found


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


class Watcher:
    """Polls the server's metrics and memory."""

    def __init__(self, session: aiohttp.ClientSession, url: str, pid: int | None, record: SoakRecord) -> None:
        self.session, self.url, self.record, self.start = session, url, record, time.monotonic()
        self.process = psutil.Process(pid) if pid else None

    async def idle_metrics(self) -> dict[str, float]:
        """As ``metrics``, with all that an idle moment needs.

        Raises:
            RuntimeError: a series is missing.
        """
        found = await self.metrics()
        for name in IDLE_SERIES:
            if name not in found:
                raise RuntimeError(f"{self.url}: not an llmctl server: its /metrics has no llmctl:{name}")
        return found

    async def metrics(self) -> dict[str, float]:
        """All series now."""
        async with self.session.get(f"{self.url}/metrics") as answer:
            return parse_metrics(await answer.text())

    async def watch_steps(self) -> None:
        """For ever: the longest time in which requests ran and no step was made."""
        clock = self.record.clock
        steps, since, ran = -1.0, clock.now(), False
        while True:
            try:
                found = await self.metrics()
            except (aiohttp.ClientError, TimeoutError) as error:
                self.record.fail(f"/metrics: {type(error).__name__}: {error}")
                found = {}
            now = clock.now()
            if ran:
                self.record.step_gap = max(self.record.step_gap, now - since)
            ran = bool(found.get("num_requests_running"))
            if found.get("engine_steps_total", steps) != steps or not ran:
                steps, since = found.get("engine_steps_total", steps), now
            await asyncio.sleep(POLL_SECONDS)

    async def idle(self, patience: float) -> Sample:
        """Wait until nothing runs (at most ``patience`` seconds) and look."""
        end = self.record.clock.now() + patience
        while True:
            found = await self.idle_metrics()
            busy = found["num_requests_running"] + found["num_requests_waiting"] + found["kv_cache_usage_perc"]
            if not busy or self.record.clock.now() > end:
                break
            await asyncio.sleep(POLL_SECONDS)
        anonymous, resident = tree_memory(self.process) if self.process else (None, None)
        return Sample(
            round(time.monotonic() - self.start, 1),
            anonymous,
            resident,
            found["kv_cache_usage_perc"],
            found["num_requests_running"],
            found["num_requests_waiting"],
            found["generation_tokens_total"],
            found["num_preemptions_total"],
        )


async def soak(url: str, pid: int | None, args: argparse.Namespace) -> SoakRecord:
    """Drive the server for ``args.minutes``; what was seen."""
    record = SoakRecord()
    async with client_session(timeout=300) as session:
        endpoint = await find_endpoint(session, url)
        watcher = Watcher(session, url, pid, record)
        await watcher.idle_metrics()
        beats = asyncio.create_task(record.clock.listen())
        steps = asyncio.create_task(watcher.watch_steps())
        rng = random.Random(args.seed)
        end = watcher.start + 60 * args.minutes
        for level in _cycle(LEVELS):
            until = min(end, time.monotonic() + args.round_seconds)
            clients = [Client(session, endpoint, record, random.Random(rng.random())) for _ in range(level)]
            await asyncio.gather(*(_run(client, until) for client in clients))
            record.samples.append(await watcher.idle(args.idle_seconds))
            _say(record, level)
            if time.monotonic() >= end or steps.done():
                break
        beats.cancel()
        await _stopped(steps, record)
    return record


async def _stopped(watch: asyncio.Task[None], record: SoakRecord) -> None:
    """End the watching of the steps; if it ended by itself, stalls went unseen and the run has failed."""
    watch.cancel()
    (error,) = await asyncio.gather(watch, return_exceptions=True)
    if not isinstance(error, asyncio.CancelledError):
        record.fail(f"the watch over the steps ended: {type(error).__name__}: {error}")


async def _run(client: Client, until: float) -> None:
    while time.monotonic() < until:
        await client.act()


def _cycle(levels: Sequence[int]) -> Iterator[int]:
    while True:
        yield from levels


def _say(record: SoakRecord, level: int) -> None:
    sample = record.samples[-1]
    print(
        f"{sample.at:7.0f} s  concurrency {level:2}  anonymous {sample.anonymous} MiB  blocks {sample.blocks:g}  "
        f"requests {sum(record.answers.values())}  failed {record.answers['failed']}  "
        f"gaps: steps {record.step_gap:.2f} s, chunks {record.chunk_gap:.2f} s",
        file=sys.stderr,
        flush=True,
    )


async def find_endpoint(session: aiohttp.ClientSession, url: str) -> Endpoint:
    """The model that a server serves.

    Raises:
        RuntimeError: it does not say which, and how long its context is.
    """
    async with session.get(f"{url}/v1/models") as answer:
        text = await answer.text()
    try:
        model = json.loads(text)["data"][0]
        return Endpoint(url, str(model["id"]), int(model["max_model_len"]))
    except (ValueError, LookupError, TypeError) as error:
        raise RuntimeError(f"{url}: not an llmctl server: /v1/models: {type(error).__name__}: {error}") from error


@contextmanager
def running_server(args: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """(url, pid) of the server named by the arguments, or of one started for the time of the context.

    Raises:
        ServerError: the started one does not get ready, dies, or does not end cleanly.
    """
    if args.base_url:
        yield args.base_url.rstrip("/"), args.pid
        return
    limits = ["--kv-cache-memory", args.kv_cache_memory, "--max-model-len", str(args.max_model_len)]
    with serving(args.model, [*limits, *args.serve_args]) as server:
        yield server.url, server.pid


def report(record: SoakRecord, bounds: Bounds, warm: float, violations: Sequence[str]) -> dict[str, Any]:
    """The result as JSON data."""
    grown = growth(record.samples, warm)
    return {
        "verdict": "fail" if violations else "pass",
        "violations": list(violations),
        "bounds": asdict(bounds),
        "requests": dict(record.answers),
        "generated_tokens": record.samples[-1].tokens if record.samples else 0,
        "preemptions": record.samples[-1].preemptions if record.samples else 0,
        "warmup_tokens": max((s.tokens for s in record.samples if s.at < warm), default=0),
        "memory_growth_mib": None if grown is None else round(grown, 2),
        "peak_resident_mib": max((s.resident for s in record.samples if s.resident is not None), default=None),
        "longest_step_gap_seconds": round(record.step_gap, 3),
        "longest_chunk_gap_seconds": round(record.chunk_gap, 3),
        "longest_own_pause_seconds": round(record.clock.longest, 3),
        "errors": record.errors,
        "samples": [asdict(s) for s in record.samples],
    }


def print_report(result: Mapping[str, Any]) -> None:
    """The result for a person."""
    for name in (
        "requests", "generated_tokens", "preemptions", "memory_growth_mib", "peak_resident_mib",
        "longest_step_gap_seconds", "longest_chunk_gap_seconds", "longest_own_pause_seconds",
    ):  # fmt: skip
        print(f"{name}: {result[name]}")
    for line in result["violations"]:
        print(f"violation: {line}")
    print(f"verdict: {result['verdict']}")


def main() -> int:
    """Run the soak; the process's exit code."""
    args = _arguments()
    if args.hostile:
        from hostile.campaign import run

        return run(args)
    bounds = Bounds(GROWTH_MIB if args.growth_mib is None else args.growth_mib, args.stall_seconds, args.idle_seconds)
    warm = 60 * (args.warmup if args.warmup is not None else min(3.0, args.minutes / 4))
    try:
        with running_server(args) as (url, pid):
            record = asyncio.run(soak(url, pid, args))
    except (RuntimeError, TimeoutError, aiohttp.ClientError, psutil.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = verdict(record, bounds, warm, expect_memory=pid is not None)
    result = report(record, bounds, warm, found)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_report(result)
    return 1 if found else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="what to serve: an engine or anything llmctl serve takes")
    source.add_argument("--base-url", metavar="URL", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="with --base-url: its API process, to watch memory")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument(
        "--warmup", type=float, help="minutes that do not count (a quarter, at most 3; hostile: a third)"
    )
    parser.add_argument("--round-seconds", type=float, default=15.0, help="load between two idle moments")
    parser.add_argument("--growth-mib", type=float, help="allowed growth of memory (16; hostile, of each process: 64)")
    parser.add_argument("--stall-seconds", type=float, default=2.0, help="longest stall allowed (default: 2)")
    parser.add_argument("--idle-seconds", type=float, default=10.0, help="patience for the last requests to end")
    parser.add_argument("--kv-cache-memory", default="128MiB", help="of the started server (default: 128MiB)")
    parser.add_argument("--max-model-len", type=int, default=2048, help="of the started server (default: 2048)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hostile", action="store_true", help="attacks beside well-behaved clients; needs --model")
    parser.add_argument("--attack", action="append", metavar="NAME", help="with --hostile: only this; repeatable")
    parser.add_argument("--health-ms", type=float, default=50.0, help="with --hostile: /health's p99 (default: 50)")
    parser.add_argument("--log", metavar="FILE", help="with --hostile: what the server printed")
    parser.add_argument("serve_args", nargs="*", metavar="-- OPTION", help="more options of llmctl serve")
    args = parser.parse_args()
    if args.hostile and not args.model:
        parser.error("--hostile: needs --model, for it kills and ends the server")
    for name in ("round_seconds", "stall_seconds") if args.hostile else ("attack", "health_ms", "log"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')}: {'not' if args.hostile else 'only'} with --hostile")
    return args


if __name__ == "__main__":
    sys.exit(main())
