"""The measurement: every contestant in turn, every workload through ``llmctl bench serve``, again in another order."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.bench.local_server import free_port
from llmctl.bench.workloads import LengthRange
from peers.contest import Contestant, Launch, PeerError, Setup, StartError
from peers.own import LLMCTL
from peers.processes import Busyness, CpuTimes, Running, busyness, serving

_IDLE_SAMPLE = 1.0
_TOTAL_INPUT = range(4700, 4901)
_PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Workload:
    """A closed loop of streaming requests of random words, each on its own connection.

    Attributes:
        title: as the table's heading says it.
        requests, concurrency: how many in all, and at once.
        input_len, output_len: tokens, as ``llmctl bench serve`` takes them.
        total_input: what the input lengths must add up to; None for any.
    """

    name: str
    title: str
    requests: int
    concurrency: int
    input_len: str
    output_len: int = 128
    total_input: range | None = None

    def seeds(self, count: int) -> list[int]:
        """The first seeds whose drawn lengths add up as wanted; each repeat has its own."""
        found: list[int] = []
        seed = 0
        while len(found) < count:
            seed += 1
            if self.total_input is None or self._total(seed) in self.total_input:
                found.append(seed)
        return found

    def _total(self, seed: int) -> int:
        """Input tokens that ``bench serve --seed`` asks for (see ``llmctl.bench.workloads.random_items``)."""
        rng = np.random.default_rng([seed, 1])
        return sum(LengthRange.parse(self.input_len, "input_len").draw(rng, self.requests))


WORKLOADS = {
    work.name: work
    for work in (
        Workload("single", "one stream, 128 tokens in, 128 out", 5, 1, "128"),
        Workload("c8", "32 requests, 32–256 in, 128 out, 8 at once", 32, 8, "32-256", total_input=_TOTAL_INPUT),
        Workload("c32", "32 requests, 32–256 in, 128 out, 32 at once", 32, 32, "32-256", total_input=_TOTAL_INPUT),
    )
}


@dataclass(frozen=True)
class Figures:
    """One workload on one server, once.

    Attributes:
        output_rate: output tokens a second over the wall time. decode_rate: 1 / median time per output token after
            the first. ttft, itl: medians, ms.
        server_seconds: processor time of the server, warm-up included. client_share: of one processor, taken by the
            load generator.
        idle_busy: share of the machine that was busy just before, the server idle. load_average: over a minute, then.
        others, stolen: shares of the machine that other processes and other virtual machines took meanwhile.
    """

    output_rate: float
    decode_rate: float
    ttft: float
    itl: float
    server_seconds: float
    client_share: float
    idle_busy: float
    load_average: float
    others: float
    stolen: float


@dataclass(frozen=True)
class Visit:
    """One start of one contestant: repeat number, its figures by workload, and what it said."""

    contestant: str
    repeat: int
    start_seconds: float
    peak_memory: int
    figures: Mapping[str, Figures]
    sample: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """As JSON data."""
        return asdict(self)


def rotation(names: Sequence[str], repeat: int) -> list[str]:
    """The order of a repeat: each starts one place later, every second one backwards, so neighbours change too."""
    shift = repeat % len(names)
    turned = [*names[shift:], *names[:shift]]
    return turned[::-1] if repeat % 2 else turned


@dataclass(frozen=True)
class Plan:
    """What is measured and how patient to be; ``tokenizer`` is the file that every prompt's length is counted with."""

    setup: Setup
    workloads: tuple[Workload, ...]
    repeats: int
    tokenizer: Path
    patience: float
    idle_limit: float
    idle_wait: float


def visits(
    plan: Plan, models: Mapping[str, Path], contestants: Mapping[str, Contestant], say: Callable[[str], None]
) -> Iterator[Visit | tuple[str, PeerError | OSError]]:
    """Measure; yields each visit as it ends, or a contestant's name and what went wrong with it.

    A contestant whose server ends while it starts is tried once more with its plainest options, and then left out.

    Args:
        models: at least one.
    """
    plain: set[str] = set()
    left_out: set[str] = set()
    for repeat in range(plan.repeats):
        for name in rotation(list(models), repeat):
            if name in left_out:
                continue
            say(f"repeat {repeat + 1}/{plan.repeats}: {name}")
            try:
                yield _visit_or_retry(plan, contestants[name], models[name], repeat, plain, say)
            except (PeerError, OSError) as error:  # OSError: a program of the contestant is not there
                if isinstance(error, StartError):
                    left_out.add(name)
                yield name, error


def _visit_or_retry(
    plan: Plan, contestant: Contestant, model: Path, repeat: int, plain: set[str], say: Callable[[str], None]
) -> Visit:
    """A visit; if the server ends while it starts, once more and from then on as plain as it can be (``plain``)."""
    if contestant.name not in plain:
        try:
            return visit(plan, contestant, contestant.launch, model, repeat, say)
        except StartError as error:
            say(f"  {error}; once more with its plainest options")
            plain.add(contestant.name)
    return visit(plan, contestant, contestant.plain or contestant.launch, model, repeat, say)


def visit(
    plan: Plan,
    contestant: Contestant,
    launch_of: Callable[[Setup, Path, int], Launch],
    model: Path,
    repeat: int,
    say: Callable[[str], None],
) -> Visit:
    """Start a contestant, run every workload on it, stop it.

    Raises:
        StartError: it ends before it is ready.
        PeerError: it does not start, or does not answer every request in full.
    """
    port = free_port()
    launch = launch_of(plan.setup, model, port)
    log = plan.setup.work / f"{contestant.name}.log"
    with serving(launch, port, plan.setup.cores, log, plan.patience) as server:
        sample = ask(server.url)
        figures = {}
        for work in plan.workloads:
            seed = work.seeds(plan.repeats)[repeat]
            figures[work.name] = run_workload(plan, server, work, seed)
            say(f"  {work.name}: {_line(figures[work.name])}")
        peak = server.peak_memory()
        started = server.start_seconds
    return Visit(contestant.name, repeat, started, peak, figures, sample, launch.argv, launch.environment)


def _line(figures: Figures) -> str:
    return (
        f"{figures.output_rate:.1f} tok/s, TTFT {figures.ttft:.0f} ms, ITL {figures.itl:.1f} ms; "
        f"others took {figures.others:.0%} of the machine"
    )


def ask(url: str) -> str:
    """A few greedy tokens, to show that the server runs the model.

    Raises:
        PeerError: no text comes.
    """
    try:
        name = _json(f"{url}/v1/models", None)["data"][0]["id"]
        body = {"model": name, "prompt": _PROMPT, "max_tokens": 12, "temperature": 0}
        text = str(_json(f"{url}/v1/completions", body)["choices"][0]["text"])
    except (OSError, ValueError, LookupError) as error:
        raise PeerError(f"no answer to a completion: {type(error).__name__}: {error}") from error
    if not text.strip():
        raise PeerError("a completion came back empty")
    return text


def _json(url: str, body: Mapping[str, object] | None) -> dict[str, Any]:
    data = json.dumps(body).encode() if body else None
    call = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as answer:
        loaded: dict[str, Any] = json.loads(answer.read())
    return loaded


def bench_command(plan: Plan, url: str, work: Workload, seed: int, output: Path) -> list[str]:
    """The load generator's command line; its warm-up requests are as many as run at once."""
    return [
        *(*LLMCTL, "bench", "serve", "--base-url", url, "--dataset-name", "random", "--tokenizer", str(plan.tokenizer)),
        *("--input-len", work.input_len, "--output-len", str(work.output_len), "--ignore-eos", "--seed", str(seed)),
        *("--num-prompts", str(work.requests), "--max-concurrency", str(work.concurrency)),
        *("--num-warmups", str(work.concurrency), "--save-result", "--result-filename", str(output)),
    ]


def run_workload(plan: Plan, server: Running, work: Workload, seed: int) -> Figures:
    """One run of one workload, with how busy the machine was.

    Raises:
        PeerError: a request failed or its output was short.
    """
    idle = _idle_share(plan)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "bench.json"
        command = bench_command(plan, server.url, work, seed, output)
        before, served, loaded = CpuTimes.now(), server.cpu_seconds(), _children_seconds()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        served, loaded = server.cpu_seconds() - served, _children_seconds() - loaded
        busy = busyness(before, CpuTimes.now(), served + loaded, os.cpu_count() or 1)
        if done.returncode or not output.exists():
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise PeerError(f"{work.name}: the bench ended with code {done.returncode}: {' '.join(reason)[:300]}")
        result = json.loads(output.read_text(encoding="utf-8"))
    return figures_from(result, work, idle, load, busy, served)


def _children_seconds() -> float:
    """Processor time of the children that have ended; between two readings those are load generators."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime


def _idle_share(plan: Plan) -> float:
    """Share of the machine that is busy while the server idles; waits, but not for ever, until that is little."""
    deadline = time.perf_counter() + plan.idle_wait
    while True:
        before = CpuTimes.now()
        time.sleep(_IDLE_SAMPLE)
        share = busyness(before, CpuTimes.now(), 0.0, os.cpu_count() or 1).others
        if share <= plan.idle_limit or time.perf_counter() > deadline:
            return share


def figures_from(
    result: Mapping[str, Any], work: Workload, idle: float, load: float, busy: Busyness, served: float
) -> Figures:
    """The figures of a ``bench serve`` result.

    Raises:
        PeerError: not every request gave all its tokens.
    """
    asked, got = work.requests * work.output_len, result["total_output_tokens"]
    if result["failed"] or got != asked:
        raise PeerError(f"{work.name}: expected {asked} tokens, found {got} ({result['failed']} requests failed)")

    return Figures(
        output_rate=float(result["output_throughput"]),
        decode_rate=1000 / float(result["median_tpot_ms"]),
        ttft=float(result["median_ttft_ms"]),
        itl=float(result["median_itl_ms"]),
        server_seconds=served,
        client_share=float(result["client"]["cpu_share_of_one_core"]),
        idle_busy=idle,
        load_average=load,
        others=busy.others,
        stolen=busy.stolen,
    )
