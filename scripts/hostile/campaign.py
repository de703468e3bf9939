"""A hostile soak from its first minute to the server's end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import resource
import secrets
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
from served import Server, ServerError, client_session, serving

from hostile.arena import Arena, Attack
from hostile.attacks import ATTACKS
from hostile.connections import GET, stream_of
from hostile.honest import CASES, PATIENCE_SECONDS, Honest, exact_answers
from hostile.judgement import Spans, Tally
from hostile.levels import Peak, settled
from hostile.prober import probing
from hostile.verdict import Bounds, Found, reasons, report, show
from hostile.wire import Address, send

HONEST_CLIENTS = 3
QUIET_SECONDS = 5.0
GROWTH_MIB = 64.0
PLAY_SECONDS = 400.0
"""Beyond this an attack's answers do not come any more."""
FILES = 12_000
"""Open files that the largest burst needs, here and in the server."""
FDS_AT_REST = 60
END_SECONDS = 30.0
OPTIONS = ("--max-restarts", "1000", "--stall-timeout", "3", "--max-body", "32MiB", "--drain-timeout", "300")


class Campaign:
    """One soak of one server."""

    def __init__(self, server: Server, honest_key: str, key: str, seed: int) -> None:
        parts = urlsplit(server.url)
        self.server, self.found = server, Found()
        self.address = Address(str(parts.hostname), int(parts.port or 80))
        self.rng = random.Random(seed)
        self.kills, self.floods = Spans(), Spans()
        self._keys = honest_key, key
        self.honest = Honest(server, honest_key, self.found.honest, self.kills, self.floods)
        self._session_headers = {"Content-Type": "application/json", "Authorization": f"Bearer {honest_key}"}

    async def run(self, attacks: Sequence[Attack], minutes: float, warmup: float, patience: float) -> None:
        """Everything up to the moment before SIGTERM, and the drain; ``warmup``: minutes."""
        found = self.found
        peak = Peak(self.server)
        with probing(self.address.host, self.address.port) as prober:
            async with client_session(PATIENCE_SECONDS, self._session_headers) as session:
                await self.honest.learn(session)
                found.before = await exact_answers(session, self.server)
                began = time.monotonic()
                await asyncio.sleep(QUIET_SECONDS)
                found.quiet = began, time.monotonic()
                watch = asyncio.create_task(peak.watch())
                cycle = _cycle(attacks, self.rng)
                await self._siege(session, cycle, time.monotonic() + 60 * warmup, least=1)
                found.warm = await settled(self.server, patience, FDS_AT_REST)
                await self._siege(session, cycle, time.monotonic() + 60 * (minutes - warmup), least=1)
                watch.cancel()
                found.last = await settled(self.server, patience, found.warm.api_fds)
                found.after = await exact_answers(session, self.server)
                found.peak_mib, found.probes = peak.api_mib, prober.probes()
                await self._drain(session)

    async def _siege(self, session: aiohttp.ClientSession, cycle: Iterator[Attack], end: float, least: int) -> None:
        """Attacks, beside honest clients, until ``end``; at least ``least`` of them."""
        over = asyncio.Event()
        clients = [asyncio.create_task(self.honest.go_on(session, i, over.is_set)) for i in range(HONEST_CLIENTS)]
        while least > 0 or time.monotonic() < end:
            least -= 1
            await self._play(next(cycle))
        over.set()
        await asyncio.gather(*clients)

    async def _play(self, attack: Attack) -> None:
        tally = self.found.attacks.setdefault(attack.name, Tally())
        before, began = tally.faults, time.monotonic()
        if attack.fills_queue:
            self.floods.begin(began)
        try:
            await asyncio.wait_for(attack.play(self._arena(tally, attack.allowed)), PLAY_SECONDS)
        except TimeoutError:
            tally.fault(f"not over after {PLAY_SECONDS:g} s")
        finally:
            self.floods.end(time.monotonic())
        tally.spans.append((began, time.monotonic()))
        seconds, faults = tally.spans[-1][1] - began, tally.faults - before
        print(f"{attack.name}: {seconds:.1f} s, faults {faults}", file=sys.stderr, flush=True)
        for example in tally.examples[-faults:] if faults else ():
            print(f"  {example}", file=sys.stderr, flush=True)

    def _arena(self, tally: Tally, allowed: Collection[int] = ()) -> Arena:
        honest_key, key = self._keys
        rng = random.Random(self.rng.random())
        return Arena(self.server, self.address, key, honest_key, rng, tally, allowed, self.kills)

    async def _drain(self, session: aiohttp.ClientSession) -> None:
        """SIGTERM with honest streams under way, beside connections that will not end by themselves."""
        found = self.found
        processes = psutil.Process(self.server.pid).children(recursive=True)
        faults = self.found.honest.faults
        async with _held(self._arena(Tally())):
            streams = [asyncio.create_task(self.honest.one(session, item, lambda: False)) for item in CASES]
            await asyncio.sleep(0.5)
            self.server.terminate()
            await asyncio.gather(*streams)
            if self.found.honest.faults > faults:
                found.drain.append("streams under way at SIGTERM were not answered to their ends")
            api = psutil.Process(self.server.pid)
            gone = await asyncio.to_thread(psutil.wait_procs, [*processes, api], END_SECONDS)
        found.drain += [f"process {process.pid} is left {END_SECONDS:g} s after the last stream" for process in gone[1]]


@contextlib.asynccontextmanager
async def _held(arena: Arena) -> AsyncIterator[None]:
    """Connections that say nothing, headers without an end, and streams that nobody reads."""
    writers = []
    for data in [b"", GET, arena.post("/v1/completions", b"{")[:-1], stream_of(arena, 100)] * 5:
        _, writer = await arena.address.connect(receive_bytes=2048)
        await send(writer, [data])
        writers.append(writer)
    try:
        yield
    finally:
        for writer in writers:
            writer.transport.abort()


def _cycle(attacks: Sequence[Attack], rng: random.Random) -> Iterator[Attack]:
    """All of them in a random order, the large ones first; and again in another order, and so on."""
    yield from sorted(rng.sample(attacks, len(attacks)), key=lambda attack: not attack.large)
    while True:
        yield from rng.sample(attacks, len(attacks))


def run(args: argparse.Namespace) -> int:
    """``scripts/soak.py --hostile``; the exit code."""
    names = [attack.name for attack in ATTACKS]
    if unknown := [name for name in args.attack or () if name not in names]:
        print(f"error: --attack {unknown[0]}: expected one of {', '.join(names)}", file=sys.stderr)
        return 2
    warmup = args.minutes / 3 if args.warmup is None else args.warmup
    attacks = [attack for attack in ATTACKS if not args.attack or attack.name in args.attack]
    _raise_files()
    honest_key, key = (secrets.token_hex(8) for _ in range(2))
    options = ["--kv-cache-memory", args.kv_cache_memory, "--max-model-len", str(args.max_model_len)]
    options += [*OPTIONS, "--api-key", f"{honest_key},{key}", *args.serve_args]
    bounds = Bounds(GROWTH_MIB if args.growth_mib is None else args.growth_mib, args.health_ms)
    campaign = None
    try:
        with serving(args.model, options, {"Authorization": f"Bearer {honest_key}"}) as server:
            campaign = Campaign(server, honest_key, key, args.seed)
            try:
                asyncio.run(campaign.run(attacks, args.minutes, warmup, args.idle_seconds))
            finally:
                campaign.found.log = server.said()
    except (ServerError, RuntimeError, OSError, aiohttp.ClientError, psutil.Error) as error:
        if campaign is None:
            print(f"error: {error}", file=sys.stderr)
            return 1
        campaign.found.drain.append(f"{type(error).__name__}: {error}")
    found = campaign.found
    if args.log:
        Path(args.log).write_text(found.log, encoding="utf-8")
    said = reasons(found, bounds)
    result = {"seed": args.seed, "minutes": args.minutes, **report(found, bounds, said)}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, {attack.name: attack.sends for attack in ATTACKS})
    return 1 if said else 0


def _raise_files() -> None:
    """As many open files as the bursts need, for this process and the server that it starts.

    Raises:
        SystemExit: the hard limit is below that.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES:
        sys.exit(f"error: open files: expected a hard limit of at least {FILES}, found {hard} (ulimit -Hn {FILES})")
    if soft != resource.RLIM_INFINITY and soft < FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
