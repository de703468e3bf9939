"""The prediction that --shed goes by: its formula, what is ahead of whom, and that it admits when in doubt."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from scripted_worker import Server

from llmctl.engine.deadline import Deadline
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import DeadlineUnreachableError, NotReadyError
from llmctl.serving.generation import SequenceSpec
from llmctl.serving.metrics import NO_STATS
from llmctl.serving.openai_errors import error_response
from llmctl.serving.ttft_predictor import TtftPredictor, Waiting


def measured(*steps: tuple[int, float], fair: bool = True) -> TtftPredictor:
    """After steps of so many prompt tokens that took so long, beside three decodes each."""
    predictor, stats, busy = TtftPredictor(fair=fair), NO_STATS, 1.0
    predictor.step(stats, busy)
    for tokens, seconds in steps:
        busy += seconds
        stats = structs.replace(
            stats,
            num_steps=stats.num_steps + 1,
            last_step_tokens=tokens + 3,
            num_generated_tokens=stats.num_generated_tokens + 3,
        )
        predictor.step(stats, busy)
    return predictor


def test_own_prompt_and_those_ahead_at_the_measured_rate() -> None:
    predictor = measured((100, 0.1))
    assert predictor.predict(Waiting(0, "", 1.0, 50), 4, 0.0) == pytest.approx(0.05)
    predictor.waits("a", Waiting(0, "", 0.5, 200))
    predictor.waits("b", Waiting(0, "", 2.0, 1000))  # due later
    assert predictor.predict(Waiting(0, "", 1.0, 50), 4, 0.0) == pytest.approx(0.25)
    predictor.scheduled("a")
    assert predictor.predict(Waiting(0, "", 1.0, 50), 4, 0.0) == pytest.approx(0.25)
    predictor.begun("a", 0)
    assert predictor.predict(Waiting(0, "", 1.0, 50), 4, 0.0) == pytest.approx(0.05)


def test_a_seat_is_waited_for_by_the_finish_rate() -> None:
    predictor = measured((100, 0.1))
    for i in range(4):
        predictor.waits(str(i), Waiting(0, "", 0.0, 1))
        predictor.scheduled(str(i))
        predictor.begun(str(i), 0)
    arriving = Waiting(0, "", 1.0, 50)
    assert predictor.predict(arriving, 5, 2.0) == pytest.approx(0.05)
    assert predictor.predict(arriving, 4, 2.0) == pytest.approx(0.55)
    assert predictor.predict(arriving, 4, 0.0) == pytest.approx(0.05)  # nothing has finished yet
    predictor.waits("w", Waiting(0, "", 0.5, 1))
    assert predictor.predict(arriving, 4, 2.0) == pytest.approx(1.05)
    predictor.left("0")
    assert predictor.predict(arriving, 4, 2.0) == pytest.approx(0.55)
    important = Waiting(-1, "", 1.0, 50)
    assert predictor.predict(important, 4, 2.0) == pytest.approx(0.05)  # the others make room


def test_what_the_prefix_cache_has_takes_no_time() -> None:
    predictor = measured((100, 0.1))
    predictor.waits("a", Waiting(0, "", 0.0, 100))
    predictor.scheduled("a")
    predictor.begun("a", 75)
    assert predictor.predict(Waiting(0, "", 1.0, 100), 4, 0.0) == pytest.approx(0.025)


def test_large_steps_count_most_and_steps_without_prompts_not_at_all() -> None:
    predictor = measured(*[(1, 0.01)] * 50, (0, 5.0), (1000, 0.1))
    assert predictor.predict(Waiting(0, "", 1.0, 1000), 4, 0.0) == pytest.approx(0.1, rel=0.05)


def test_tokens_that_grammars_force_are_no_prompts() -> None:
    predictor, stats = measured((100, 0.1)), structs.replace(NO_STATS, num_steps=1, num_generated_tokens=3)
    for computed in (3, 18, 18):  # three sampled, and five forced after each
        stats = structs.replace(
            stats,
            num_steps=stats.num_steps + 1,
            last_step_tokens=computed,
            num_generated_tokens=stats.num_generated_tokens + 18,
            num_forced_tokens=stats.num_forced_tokens + 15,
        )
        predictor.step(stats, 9.0 + stats.num_steps)
    assert predictor.predict(Waiting(0, "", 1.0, 50), 4, 0.0) == pytest.approx(0.05)


def test_until_anything_is_measured_nothing_takes_time() -> None:
    predictor = TtftPredictor(fair=True)
    for i in range(100):
        predictor.waits(str(i), Waiting(0, "", 0.0, 1000))
    assert predictor.predict(Waiting(0, "", 1.0, 1000), 1, 0.0) == 0.0


def test_a_flood_of_another_tenant_counts_by_turns() -> None:
    predictor = TtftPredictor(fair=True)
    for i in range(50):
        predictor.waits(f"a{i}", Waiting(0, "a", float(i), 10))
    predictor.waits("b0", Waiting(0, "b", 60.0, 25))
    assert predictor.ahead(0, "a", 100.0) == (50 + 1, 500 + 25)
    assert predictor.ahead(0, "b", 100.0) == (1 + 2, 25 + 10 + 25)
    assert predictor.ahead(0, "c", 100.0) == (2, 35)


def test_a_dead_workers_requests_wait_again() -> None:
    predictor = measured((100, 0.1))
    for name in "ab":
        predictor.waits(name, Waiting(0, "", 0.0, 100))
    predictor.scheduled("a")
    predictor.worker_lost()
    assert predictor.ahead(0, "", 1.0) == (2, 200)
    predictor.step(structs.replace(NO_STATS, num_steps=1, last_step_tokens=5), 0.1)  # totals begin at zero
    assert predictor.predict(Waiting(0, "", 1.0, 100), 4, 0.0) == pytest.approx(0.3)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["waits", "waits", "scheduled", "begun", "left", "lost"]), st.integers(0, 5), st.integers(0, 99)
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.booleans())
def test_what_is_ahead_is_what_a_walk_over_all_finds(events: list[tuple[str, int, int]], fair: bool) -> None:
    predictor, known = TtftPredictor(fair=fair), list[Waiting]()
    waiting, computing = set[int](), set[int]()
    for event, kind, pick in events:
        if event == "waits":
            known.append(Waiting(kind % 2, "ab"[kind % 3 // 2], float(pick % 7), 1 + pick % 5))
            waiting.add(len(known) - 1)
            predictor.waits(str(len(known) - 1), known[-1])
        elif event == "lost":
            predictor.worker_lost()
            waiting, computing = waiting | computing, set()
        elif known:
            number = pick % len(known)
            if event == "scheduled":
                predictor.scheduled(str(number))
                computing |= waiting & {number}
            elif event == "begun":
                predictor.begun(str(number), 0)
                computing.discard(number)
            else:
                predictor.left(str(number))
                computing.discard(number)
            waiting.discard(number)
    queue = [known[number] for number in waiting]
    for priority, tenant, due in itertools.product((0, 1, 2), "abc", (0.0, 3.0, 9.0)):
        sooner = [w for w in queue if w.priority < priority]
        same = [w for w in queue if w.priority == priority]
        own = [w for w in same if (w.tenant == tenant or not fair) and w.due <= due]
        requests, tokens = len(sooner) + len(own), sum(w.tokens for w in sooner + own)
        for other in set("abc") - {tenant} if fair else ():
            line = sorted((w for w in same if w.tenant == other), key=lambda w: w.due)
            if line:
                requests += min(len(line), 1 + len(own))
        assert predictor.ahead(priority, tenant, due).requests == requests
        if not fair:
            assert predictor.ahead(priority, tenant, due).tokens == tokens
    assert predictor._computing == sum(known[number].tokens for number in computing)


# -- at the door --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Two seats."""
    return Server(tmp_path, monkeypatch, shed=True)


def spec(ttft: float | None, prompt: int = 10) -> SequenceSpec:
    return SequenceSpec([5] * prompt, SamplingParams(), deadline=Deadline(ttft))


def test_the_door_refuses_what_cannot_be_in_time(server: Server) -> None:
    running = [server.client.generate([spec(5.0)]) for _ in range(4)]
    for generation in running[:2]:
        server.client.on_scheduled([s.request_id for s in generation.sequences])
    for generation in running[:2]:
        server.step(generation, 1.0)
    server.step(running[0], 2.0, last=True)  # one in 4 s, with one running and two ahead
    with pytest.raises(DeadlineUnreachableError, match="after 8000 ms, the TTFT deadline is 2500 ms") as caught:
        server.client.generate([spec(2.5), spec(2.5)])
    assert error_response(caught.value, {"path": "/v1/completions"}).headers["Retry-After"] == "6"
    assert (caught.value.http_status, caught.value.code) == (429, "deadline_unreachable")
    assert server.counts() == {"met": 1.0, "shed": 2.0}
    assert len(server.client._running) == 3
    server.client.generate([spec(8.5)])
    server.client.generate([spec(None)])


def test_the_door_knows_what_prompts_cost_and_which_are_to_be_computed(server: Server) -> None:
    first = server.client.generate([spec(None)])
    server.client.on_scheduled([s.request_id for s in first.sequences])
    server.step(first, 0.1)
    server.step(first, 0.1, prompt_tokens=100)
    with pytest.raises(DeadlineUnreachableError, match="after 10 ms, the TTFT deadline is 5 ms"):
        server.client.generate([spec(0.005)])
    server.client.generate([spec(0.015)])  # that of the first is computed
    with pytest.raises(DeadlineUnreachableError, match="after 20 ms"):
        server.client.generate([spec(0.015)])


def test_where_nobody_is_ahead_the_door_refuses_nobody(server: Server) -> None:
    """A prediction from a step in which the machine slept would else refuse everybody, and never be measured again."""
    first = server.client.generate([spec(None)])
    server.client.on_scheduled([s.request_id for s in first.sequences])
    server.step(first, 0.1)
    server.step(first, 60.0, prompt_tokens=10, last=True)
    (second,) = server.client.generate([spec(1.0)]).sequences
    with pytest.raises(DeadlineUnreachableError):
        server.client.generate([spec(1.0)])
    assert server.client._running == {second.request_id: second}


def test_what_outlives_its_worker_is_ahead_again(server: Server) -> None:
    generation = server.client.generate([spec(9.0)])
    server.client.on_scheduled([s.request_id for s in generation.sequences])
    predictor = server.client._predictor
    assert predictor is not None
    assert predictor.ahead(0, "", server.now + 60) == (0, 0)
    server.client.on_worker_lost(NotReadyError("it died"), "failed")
    assert predictor.ahead(0, "", server.now + 60) == (1, 10)


def test_the_account_is_empty_when_everything_has_ended(server: Server) -> None:
    finishing, failing, leaving = (server.client.generate([spec(9.0)]) for _ in range(3))
    server.client.on_scheduled([s.request_id for s in finishing.sequences])
    server.step(finishing, 0.1, last=True)
    leaving.abort()
    server.client.fail_all(DeadlineUnreachableError("x"))
    assert failing.done
    predictor = server.client._predictor
    assert predictor is not None
    assert (predictor._waiting, predictor._lines, predictor._running, predictor._computing) == ({}, {}, {}, 0)


def test_without_shed_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path, monkeypatch)
    assert server.client._predictor is None
    for _ in range(50):
        server.client.generate([spec(1e-6)])
