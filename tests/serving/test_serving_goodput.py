"""What becomes of a deadline: held against what the bench's --goodput says of the same client; and in /metrics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_worker import Server

from llmctl.bench.metrics import RequestRecord, meets_goodput
from llmctl.engine.deadline import Deadline
from llmctl.errors import DeadlineMissedError, LlmctlError, NotReadyError, QueueFullError
from llmctl.serving.goodput import outcome

LIMIT = st.one_of(st.none(), st.integers(1, 50))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), LIMIT, LIMIT)
def test_met_is_what_the_bench_calls_good(gaps: list[int], ttft: int | None, itl: int | None) -> None:
    """Ticks of 1/64 s, which add up exactly."""
    tick = 1 / 64
    times = [sum(gaps[: i + 1]) * tick for i in range(len(gaps))]
    record = RequestRecord(0, 1, len(gaps), chunk_times=times)
    limits = {name: 1000 * ms * tick for name, ms in (("ttft", ttft), ("tpot", itl)) if ms is not None}
    deadline = Deadline(*(None if ms is None else ms * tick for ms in (ttft, itl)))
    found = outcome(deadline, record.ttft, record.tpot or 0.0)
    assert (found == "met") is meets_goodput(record, limits)
    if ttft is not None and record.ttft > ttft * tick:
        assert found == "ttft_missed"


def test_what_never_came_is_missed_whatever_the_deadline() -> None:
    for deadline in (Deadline(1.0), Deadline(None, 1.0)):
        assert outcome(deadline, math.inf, math.inf) == "ttft_missed"
        assert outcome(deadline, 0.5, math.inf) == "itl_missed"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ((0.5, 0.1, 0.3), "met"),  # 0.2 in the mean
        ((0.5,), "met"),
        ((0.5, 0.1, 0.5), "itl_missed"),
        ((1.5, 0.1, 0.1), "ttft_missed"),
        ((1.5, 0.1, 0.9), "ttft_missed"),
    ],
)
def test_requests_are_counted_at_their_end(server: Server, gaps: tuple[float, ...], expected: str) -> None:
    generation = server.generate(Deadline(1.0, 0.25))
    for gap in gaps[:-1]:
        server.step(generation, gap)
    assert server.counts() == {}
    server.step(generation, gaps[-1], last=True)
    assert server.counts() == {expected: 1.0}


def test_without_a_deadline_nothing_is_counted(server: Server) -> None:
    generation = server.generate(Deadline())
    server.step(generation, 100.0, last=True)
    server.client.fail_all(NotReadyError("x"))
    assert server.counts() == {}


def test_what_fails_missed_and_what_its_client_left_is_not_counted(server: Server) -> None:
    begun, waiting, left = (server.generate(Deadline(1.0)) for _ in range(3))
    server.step(begun, 0.1)
    left.abort()
    server.client.fail_all(NotReadyError("the engine died"))
    assert server.counts() == {"itl_missed": 1.0, "ttft_missed": 1.0}
    assert waiting.done


def test_what_missed_in_the_queue_is_shed_by_the_sequence_and_says_when_to_come_again(server: Server) -> None:
    generation = server.generate(Deadline(1.0), samples=2)
    server.refuse(generation, DeadlineMissedError("late", param="deadline"))
    assert server.counts() == {"shed": 2.0}
    error = generation._error
    assert isinstance(error, LlmctlError)
    assert (error.http_status, error.code, error.retry_after) == (429, "deadline_missed", 1)


def test_a_full_queue_is_no_deadlines_fault(server: Server) -> None:
    generation = server.generate(Deadline(1.0))
    server.refuse(generation, QueueFullError("full"))
    assert server.counts() == {}
    assert isinstance(generation._error, LlmctlError)
    assert generation._error.retry_after == 1
