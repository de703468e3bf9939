"""The status line: its numbers, the cause that it names, and when it is logged."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import pytest
from msgspec import structs
from typer.main import get_command

from llmctl.cli.main import app
from llmctl.engine.llm_engine import EngineStats
from llmctl.engine.occupancy import StateSeconds
from llmctl.serving import status_line as module
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.status_line import ADVICE, log_status, status_line

IDLE = EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0)


def after(seconds: dict[str, float], **fields: Any) -> EngineStats:
    return structs.replace(IDLE, state_seconds=StateSeconds(**seconds), **fields)


def test_rates_are_those_of_the_time_between() -> None:
    before = after({"busy": 5.0}, num_generated_tokens=1000, num_scheduled_tokens=3000, num_steps=9)
    now = after(
        {"busy": 15.0},
        num_generated_tokens=1053,
        num_scheduled_tokens=7053,
        num_running=3,
        num_waiting=2,
        kv_cache_usage=0.876,
    )
    assert status_line(before, now, 10.0) == "prompt 400 tok/s, output 5.3 tok/s, running 3, waiting 2, KV 88%"


def test_a_device_without_full_steps_is_explained_from_a_fifth_of_the_time_on() -> None:
    before = after({"busy": 1.0, "kv_full": 50.0})
    assert ";" not in status_line(before, after({"busy": 9.0, "kv_full": 52.0}), 10.0)
    line = status_line(before, after({"busy": 8.0, "kv_full": 51.0, "host": 2.0}), 10.0)
    assert line.endswith("; host 20%: fewer log-probabilities cost less")
    line = status_line(before, after({"busy": 8.0, "kv_full": 53.0}), 9.0)
    assert line.endswith("; kv_full 30%: --kv-cache-memory or --kv-cache-dtype int8")


def test_a_host_that_launches_kernel_by_kernel_is_told_so() -> None:
    before = after({}, num_graph_steps=100)
    assert "without a CUDA graph" in status_line(
        before, after({"host": 1.0}, num_graph_steps=102, num_eager_steps=3), 1.0
    )
    assert "log-probabilities" in status_line(before, after({"host": 1.0}, num_graph_steps=103, num_eager_steps=3), 1.0)


def test_every_state_has_its_advice_in_a_short_line_with_flags_that_exist() -> None:
    assert set(ADVICE) == set(StateSeconds.__struct_fields__) - {"busy"}
    commands = get_command(app).commands  # type: ignore[attr-defined]
    flags = {flag for option in commands["serve"].params for flag in option.opts}
    big = {"num_generated_tokens": 10**6, "num_scheduled_tokens": 2 * 10**6, "num_running": 512, "num_waiting": 1024}
    for state, words in ADVICE.items():
        assert {word.strip(",") for word in words.split() if word.startswith("--")} <= flags
        line = status_line(IDLE, after({state: 10.0}, kv_cache_usage=1.0, **big), 10.0)
        assert f"; {state} 100%: {words}" in line
        assert len(line) <= 140


def test_it_is_logged_only_when_there_were_steps_of_one_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "STATUS_SECONDS", 0.001)
    looks = iter([0, 0, 4, 4, 6, 8, 12])
    done = asyncio.Event()

    class Metrics:
        restarts = 0

        @property
        def engine_stats(self) -> EngineStats:
            steps = next(looks, None)
            if steps is None:
                done.set()
                steps = 12
            self.restarts = int(steps > 6)
            return after({"busy": 1.0}, num_steps=steps)

    async def watch() -> None:
        task = asyncio.create_task(log_status(cast(ServerMetrics, Metrics())))
        await done.wait()
        task.cancel()

    with caplog.at_level(logging.INFO, "llmctl.serving"):
        asyncio.run(watch())
    assert len(caplog.records) == 3  # not from 6 to 8, which are another worker's
    assert all(record.levelno == logging.INFO for record in caplog.records)
