"""Fixtures of the bench's tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import hypothesis
import pytest
from click.testing import Result
from fake_openai_server import FakeServer, Reply, serve
from played_loads import Played
from typer.testing import CliRunner

from llmctl.bench import sweep_measure
from llmctl.bench.client import LoadRun, Target
from llmctl.bench.metrics import RequestRecord
from llmctl.bench.serve import RepeatRun
from llmctl.bench.serve_plan import Plan
from llmctl.bench.workloads import WorkItem
from llmctl.cli.main import app

# The machine may be busy: no example is failed for its duration.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of many tests has objects by the million: to look at them all before each load took half of the suite's
    time for bench."""
    monkeypatch.setattr("llmctl.bench.client.quiet_collector", nullcontext)


@pytest.fixture
def start() -> Iterator[Callable[..., FakeServer]]:
    """Start a scripted server: ``start(Reply(...), ...)``."""
    with ExitStack() as stack:

        def begin(*script: Reply, **more: Any) -> FakeServer:
            return stack.enter_context(serve(FakeServer(script=list(script) or [Reply()], **more)))

        yield begin


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run ``llmctl bench ARGS`` in this process."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    # Sampling how busy the machine is takes 0.3 s a run; test_environment checks it for real.
    monkeypatch.setattr("psutil.cpu_percent", lambda **_: 0.0)

    def run(*args: str) -> Result:
        result = CliRunner().invoke(app, ["bench", *args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "Traceback" not in result.stderr
        return result

    return run


@pytest.fixture
def bench_serve(bench: Callable[..., Result]) -> Callable[..., tuple[int, dict[str, Any], Result]]:
    """``bench serve --json`` against a fake server with a small workload: exit code, document, raw result."""

    def run(fake: FakeServer, *args: str) -> tuple[int, dict[str, Any], Result]:
        small = ("--num-prompts", "6", "--input-len", "4-9", "--output-len", "5", "--max-concurrency", "3")
        result = bench("serve", "--base-url", fake.url, *small, "--num-warmups", "0", "--json", *args)
        return result.exit_code, json.loads(result.stdout) if result.stdout.strip() else {}, result

    return run


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Loads are made up, not sent: TTFT is 10 ms up to 6 at once, or a second, else 100 ms. Their prompts."""
    prompts = Played()

    def run_once(plan: Plan, _: Target, items: Sequence[WorkItem], *__: Any) -> RepeatRun:
        config = plan.config
        load = config.max_concurrency or config.request_rate
        prompts.loads += 1
        times = prompts.slower * (1 + prompts.noise * (prompts.loads % 3))
        ttft, gap = (0.01 if load <= 6 else 0.1) * times, 0.01 * times
        prompts.extend(item.prompt for item in items)
        chunks = [ttft, ttft + gap, ttft + 2 * gap]
        records = [RequestRecord(i, 4, 3, 0.0, 0.0, chunks[-1], list(chunks)) for i in range(len(items))]
        return RepeatRun(LoadRun(records, chunks[-1], 0.0, 0.0), "20260101-000000", None)

    monkeypatch.setattr(sweep_measure, "run_once", run_once)
    return prompts
