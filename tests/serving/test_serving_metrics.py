"""The server's own histogram against prometheus_client's, and the engine's totals as they are shown."""

from __future__ import annotations

import asyncio

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from llmctl.engine.llm_engine import EngineStats
from llmctl.engine.occupancy import StateSeconds
from llmctl.serving.engine_series import LABELS
from llmctl.serving.histogram import Histogram
from llmctl.serving.metrics import ServerMetrics

BOUNDS = (0.5, 1, 2.5)
VALUES = st.one_of(st.sampled_from([0.5, 1.0, 2.5]), st.floats(-1, 4, allow_nan=False))


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(VALUES, max_size=8))
def test_a_histogram_shows_what_prometheus_would(values: list[float]) -> None:
    theirs = prometheus_client.CollectorRegistry()
    reference = prometheus_client.Histogram("h", "text", LABELS, buckets=BOUNDS, registry=theirs).labels("m", "0")
    ours = prometheus_client.CollectorRegistry()
    histogram = Histogram("h", "text", BOUNDS, LABELS, ours).labels("m", "0")
    for value in values:
        reference.observe(value)
        histogram.observe(value)
    shown, expected = (samples(prometheus_client.generate_latest(r).decode()) for r in (ours, theirs))
    assert shown == expected


def test_a_page_is_one_for_all_who_wait_and_rests_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, now, begun = ServerMetrics("m"), [100.0], []
    sleep = asyncio.sleep

    async def pass_time(seconds: float) -> None:
        await sleep(0)
        now[0] += seconds

    def render() -> tuple[bytes, str]:
        begun.append(now[0])
        now[0] += 0.5
        return str(len(begun)).encode(), "text"

    monkeypatch.setattr("llmctl.serving.metrics.time.monotonic", lambda: now[0])
    monkeypatch.setattr("llmctl.serving.metrics.asyncio.sleep", pass_time)
    monkeypatch.setattr(metrics, "render", render)

    async def ask(readers: int) -> list[bytes]:
        return [page for page, _ in await asyncio.gather(*(metrics.page() for _ in range(readers)))]

    async def run() -> list[list[bytes]]:
        first = await ask(50)
        leaver = asyncio.ensure_future(metrics.page())
        await sleep(0)
        leaver.cancel()  # takes the page from nobody else
        return [first, await ask(50), await ask(1)]

    assert asyncio.run(run()) == [[b"1"] * 50, [b"2"] * 50, [b"3"]]
    assert begun == [100.0, 102.5, 105.0]


def test_the_engines_totals_are_shown_as_they_came_last() -> None:
    metrics = ServerMetrics("m")
    metrics.engine(EngineStats(1, 2, 0.5, 3, 40, 30, 7, 70, 60, 8, 1.25), 2.5)
    metrics.engine(EngineStats(2, 0, 0.75, 4, 50, 35, 8, 90, 70, 16, 1.5, num_forced_tokens=30), 3.0)
    text = metrics.render()[0].decode()
    shown = {name.removeprefix("llmctl:"): value for (name, _), value in samples(text).items()}
    expected = {
        "num_requests_running": 2,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0.75,
        "num_preemptions_total": 4,
        "prefix_cache_queries_total": 50,
        "prefix_cache_hits_total": 35,
        "generation_tokens_total": 70,
        "generation_tokens_forced_total": 30,
        "engine_steps_total": 8,
        "engine_busy_seconds_total": 3.0,
        "engine_compute_seconds_total": 1.5,
        "iteration_tokens_total_count": 2,
        "iteration_tokens_total_sum": 24,
    }
    assert {name: shown[name] for name in expected} == expected


def test_time_by_state_and_steps_by_execution_are_shown_by_label() -> None:
    metrics = ServerMetrics("m")
    seconds = StateSeconds(*(float(i) for i in range(1, 12)))
    metrics.engine(EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0.0, seconds, 5, 7), 0.0)
    shown = {
        (name.removeprefix("llmctl:"), dict(labels).get("state") or dict(labels).get("execution")): value
        for (name, labels), value in samples(metrics.render()[0].decode()).items()
    }
    states = (
        *("busy", "kv_full", "token_budget", "itl_target", "max_num_seqs", "deadline"),
        *("max_loras", "few_requests", "host", "api_process", "no_requests"),
    )
    expected = {("engine_seconds_total", state): i for i, state in enumerate(states, 1)}
    expected |= {("engine_steps_by_execution_total", "graph"): 5, ("engine_steps_by_execution_total", "eager"): 7}
    assert {key: shown.get(key) for key in expected} == expected
