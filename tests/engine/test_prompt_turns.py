"""Turns of shorter prompts beside a long one: nobody waits for all of it, and it does not wait for all of them."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import pytest
from fake_runtime import FakeRuntime, expected_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from timed_runtime import Machine, TimedRuntime, cpu, gpu

from llmctl.engine.deadline import Deadline
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.prompt_turns import goes_on
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step_cost import StepLoad

LONG = 8000


def request(name: str, prompt: int, tokens: int, **fields: Any) -> Request:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return Request(name, [(len(name) * 7 + i) % 40 for i in range(prompt)], params, **fields)


def engine_of(runtime: Any, *, turns: bool = True, **config: Any) -> LLMEngine:
    config = {"itl_target": None, "enable_prefix_caching": False, "policy": "fair", **config}
    engine = LLMEngine(runtime, SchedulerConfig(**config))
    if not turns:
        engine.scheduler._turns = None
    return engine


class Run:
    """Steps of an engine: ``began`` and ``answered`` are the simulated seconds of requests by name."""

    def __init__(self, machine: Machine, *, depth: int = 1, **config: Any) -> None:
        self.runtime = TimedRuntime(machine, steps_in_flight=depth)
        self.engine = engine_of(self.runtime, **config)
        self.began: dict[str, float] = {}
        self.answered: dict[str, float] = {}
        self.ended: set[str] = set()
        self.now, self.counted = 0.0, 0

    def add(self, *requests: Request) -> None:
        self.engine.add_requests(requests)
        self.began |= {r.request_id: self.now for r in requests}

    def step(self) -> None:
        outputs = self.engine.step()
        self.now += sum(self.runtime.seconds[self.counted :])
        self.counted = len(self.runtime.seconds)
        for output in outputs:
            self.answered.setdefault(output.request_id, self.now)
            if output.finish_reason is not None:
                self.ended.add(output.request_id)

    def waits(self, kind: str) -> list[float]:
        """From their arrival to the first token, of the answered ones whose names begin so."""
        return sorted(at - self.began[name] for name, at in self.answered.items() if name.startswith(kind))


def warm(run: Run, chats: int) -> None:
    """The cost of both kinds of steps is known."""
    run.add(*(request(f"warm{i}", 64, 6000 if i < chats else 60, tenant=f"warm{i}") for i in range(4)))
    for _ in range(80):
        run.step()
    run.add(request("prompt", 1500, 1, tenant="warm"))
    while "prompt" not in run.ended:
        run.step()


def long_beside_shorts(machine: Machine, *, chats: int, **config: Any) -> Run:
    """Two long prompts beside four chats' short turns, one after the other, until both have answered; ``chats``: others
    that decode all the time."""
    run = Run(machine, **config)
    warm(run, chats)
    run.add(*(request(f"long{i}", LONG, 1, tenant=f"long{i}") for i in range(2)))
    run.step()
    turns = dict.fromkeys(range(4), 0)
    while not {"long0", "long1"} <= run.ended:
        for chat, turn in turns.items():
            if not turn or f"short{chat}.{turn - 1}" in run.ended:
                run.add(request(f"short{chat}.{turn}", 64, 32, tenant=str(chat)))
                turns[chat] += 1
        run.step()
    return run


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chats", [0, 4])
def test_short_prompts_do_not_wait_for_long_ones_which_take_little_longer(chats: int, depth: int) -> None:
    on, off = (long_beside_shorts(cpu, chats=chats, depth=depth, turns=turns) for turns in (True, False))
    assert len(on.waits("short")) > 20
    assert on.waits("short")[-1] < 0.25 * off.waits("long")[0] < 0.25 * min(off.waits("short"), default=math.inf)
    assert all(a <= 1.3 * b for a, b in zip(on.waits("long"), off.waits("long"), strict=True))
    loads = [x for x in on.runtime.loads if x.decode_rows >= 4 and x.prefill_rows]
    slowdown = sorted(cpu(x) / cpu(StepLoad(x.decode_rows, x.decode_context)) for x in loads)
    assert slowdown[int(0.95 * len(slowdown))] <= 6.0


@pytest.mark.parametrize("machine", [cpu, gpu])
@pytest.mark.parametrize("chats", [0, 4])
def test_a_flood_of_short_prompts_does_not_keep_a_long_one_waiting(machine: Machine, chats: int) -> None:
    waits = []
    for shorts in (0, 400):
        run = Run(machine)
        warm(run, chats)
        run.add(request("long", LONG, 1))
        run.step()
        for number in range(shorts):
            run.add(request(f"short{number}", 16, 16, tenant=str(number)))
        while "long" not in run.ended:
            run.step()
        waits += run.waits("long")
    assert waits[1] <= 1.45 * waits[0]  # the last turn's are in until they end


def fake(blocks: int = 200, **config: Any) -> LLMEngine:
    """Whose runtime notices a block that is not its own, with a second a token."""
    runtime = FakeRuntime(blocks, 4, 400, steps_in_flight=config.pop("depth", 1), seconds_a_token=1.0)
    engine = engine_of(runtime, **{"max_num_batched_tokens": 16, **config})
    runtime.wipe_allocated(engine.scheduler.pool)
    return engine


def who(engine: LLMEngine, times: int = 1) -> list[str]:
    """In the last step scheduled."""
    for _ in range(times):
        engine.step()
        engine.scheduler.check()
    assert isinstance(engine.runtime, FakeRuntime)
    return [piece.request_id for piece in engine.runtime.plans[-1].slices]


def finish(engine: LLMEngine, *requests: Request) -> None:
    """Everybody yields what it yields alone."""
    while engine.has_unfinished():
        who(engine)
    for each in requests:
        assert each.output_token_ids == expected_tokens(each, each.seed, engine.limits, frozenset())


@pytest.mark.parametrize("depth", [1, 2])
def test_a_short_prompt_enters_beside_a_long_one_and_both_yield_what_they_yield_alone(depth: int) -> None:
    engine = fake(depth=depth)
    long, short = request("long", 300, 4), request("short", 5, 4)
    engine.add_request(long)
    who(engine, 3)
    engine.add_request(short)
    assert who(engine) == ["short", "long"]
    finish(engine, long, short)
    assert short.times.finished < long.times.first_token  # type: ignore[operator]


def test_the_order_of_the_queue_holds_where_no_prompt_is_paced() -> None:
    engine = fake(itl_target=0.0)
    engine.add_request(request("long", 300, 1))
    who(engine, 3)
    engine.add_request(request("short", 5, 1))
    assert who(engine, 10) == ["long"]


def test_a_long_prompt_is_passed_by_a_short_one_and_enters_when_the_first_is_done() -> None:
    engine = fake()
    longs = [request("long", 200, 2), request("other", 200, 2)]
    engine.add_requests(longs)
    who(engine, 3)
    short = request("short", 5, 2)
    engine.add_request(short)
    assert who(engine) == ["short", "long"]
    finish(engine, short, *longs)
    assert short.times.finished < longs[0].times.first_token < longs[1].times.first_token  # type: ignore[operator]


@pytest.mark.parametrize(
    ("prompt", "passes"),
    [(36, True), (37, False)],  # of the long one 184 tokens are left
)
def test_shorter_is_what_turns_compute_before_the_first_is_done(prompt: int, passes: bool) -> None:
    engine = fake(max_num_batched_tokens=8)
    engine.add_request(request("long", 200, 1))
    who(engine, 2)
    engine.add_request(request("short", prompt, 1))
    assert ("short" in who(engine)) is passes


@pytest.mark.parametrize(("priority", "enters"), [(0, True), (1, False), (-1, True)])
def test_nobody_goes_first_who_is_less_important(priority: int, enters: bool) -> None:
    engine = fake()
    engine.add_request(request("long", 300, 1))
    who(engine, 3)
    engine.add_request(request("short", 5, 1, priority=priority))
    assert ("short" in who(engine)) is enters


@pytest.mark.parametrize(("blocks", "enters"), [(77, True), (76, False)])
def test_who_enters_leaves_the_blocks_that_the_long_prompt_will_need(blocks: int, enters: bool) -> None:
    """75 for 300 tokens, 2 for 5."""
    engine = fake(blocks)
    long, short = request("long", 300, 0), request("short", 5, 1)
    engine.add_request(long)
    who(engine, 3)
    engine.add_request(short)
    assert ("short" in who(engine)) is enters
    finish(engine, long, short)
    assert engine.stats().num_preemptions == 0


@pytest.mark.parametrize(("waiting", "passes"), [(296, True), (300, False)])
def test_who_passes_leaves_the_blocks_that_the_next_finds_when_the_long_prompt_is_done(
    waiting: int, passes: bool
) -> None:
    engine = fake(76)
    engine.add_requests([request("long", 280, 0), request("next", waiting, 1)])
    who(engine, 3)
    engine.add_request(request("short", 5, 30))
    assert ("short" in who(engine)) is passes


def test_nobody_passes_who_was_preempted() -> None:
    """Two grow until one falls; a long prompt then stands before the short one."""
    engine = fake(60)
    first, second = request("first", 100, 120), request("second", 100, 120)
    engine.add_requests([first, second])
    while not engine.stats().num_preemptions:
        who(engine)
    assert engine.scheduler.waiting.peek() is second
    engine.add_request(request("short", 4, 1))
    assert engine.scheduler.waiting.first_short(lambda _: True) is None


@pytest.mark.parametrize(
    ("seats", "itl", "enters"),
    [(3, None, True), (2, None, False), (3, 1.6, False)],  # two rows take 1.9 s
)
def test_a_seat_is_needed_and_an_itl_deadline_kept(seats: int, itl: float | None, enters: bool) -> None:
    engine = fake(max_num_seqs=seats)
    engine.add_requests([request("decodes", 4, 200, deadline=Deadline(None, itl)), request("long", 200, 1)])
    who(engine, 4)
    short = request("short", 5, 1)
    engine.add_request(short)
    who(engine, 5)
    assert (short.times.first_scheduled is not None) is enters


@pytest.mark.parametrize("earlier", [False, True])
def test_of_prompts_in_progress_the_shortest_goes_on_first(earlier: bool) -> None:
    """Whichever comes first in order."""
    engine = fake(max_num_batched_tokens=8)
    engine.add_request(request("long", 380, 1, arrival_time=1.0))
    who(engine, 2)
    engine.add_request(request("middle", 40, 1, arrival_time=3.0))
    assert who(engine) == ["middle"]
    engine.add_request(request("short", 10, 1, arrival_time=2.0 if earlier else 4.0))
    turns = [names for names in (who(engine) for _ in range(60)) if names[0] != "long"]
    assert turns[0] == ["short"]
    assert turns[1][:2] == ["short", "middle"]


def test_who_decodes_behind_the_first_makes_no_turn() -> None:
    engine = fake()
    engine.scheduler._turns.due = lambda _: True  # type: ignore[method-assign, union-attr]
    engine.add_request(request("long", 300, 1))
    who(engine, 3)
    engine.add_request(request("short", 5, 20))
    assert who(engine) == ["short", "long"]
    assert who(engine) == ["long", "short"]


@pytest.mark.parametrize(("forced", "prompt"), [(0, True), (3, True), (4, False)])
def test_what_a_grammar_forced_is_no_prompt(forced: int, prompt: bool) -> None:
    one = request("one", 5, 1)
    one.num_forced = forced
    assert goes_on(one, request("long", 300, 1)) is prompt


@pytest.mark.parametrize("priority", [0, 1])
def test_a_longer_prompt_behind_the_first_does_not_go_on_in_turns(priority: int) -> None:
    """It was the first until a shorter one came that is before it in order."""
    engine = fake(max_num_batched_tokens=8)
    engine.add_request(request("longest", 380, 1, priority=priority, arrival_time=2.0))
    who(engine, 2)
    engine.add_request(request("long", 70, 1, arrival_time=1.0))
    assert who(engine) == ["long"]
    assert [r.request_id for r in engine.scheduler.running] == ["long", "longest"]
    engine.add_request(request("short", 5, 1, arrival_time=3.0))
    while "short" not in (names := who(engine)):
        assert names == ["long"]
    assert names == ["short", "long"]


def test_a_turn_takes_blocks_from_nobody() -> None:
    """Rows that decode have taken what was free when they entered: prompts go on within the blocks they have."""
    engine = fake(72, max_num_batched_tokens=8)
    decodes = [request("d" * n, 4, 100) for n in (1, 2, 3)]
    long, short = request("long", 200, 1), request("short", 20, 1)
    engine.add_requests([*decodes, long])
    due = True
    engine.scheduler._turns.due = lambda _: due  # type: ignore[method-assign, union-attr]
    who(engine, 15)
    engine.add_request(short)
    assert who(engine)[-1] == "short"
    due = False
    while engine.scheduler.pool.num_free:
        who(engine)
    due = True
    assert [r.num_computed_tokens for r in (short, long)] == [5, 160]
    assert who(engine) == ["d", "dd", "ddd", "short"]
    assert [r.num_computed_tokens for r in (short, long)] == [8, 160]
    assert engine.stats().num_preemptions == 0
    due = False
    finish(engine, *decodes, long, short)


def test_what_waits_does_not_enlarge_the_chunks_of_a_long_prompt_but_in_turns() -> None:
    """As rows that are to join it would, in a burst of short prompts alone."""
    sizes = []
    for turns in (True, False):
        run = Run(cpu, turns=turns)
        warm(run, 4)
        run.add(request("long", LONG, 1))
        for _ in range(20):
            run.step()
        run.add(*(request(f"longer{i}", 400, 1) for i in range(60)))
        if turns:
            run.engine.scheduler._turns.due = lambda _: False  # type: ignore[method-assign, union-attr]
        for _ in range(10):
            run.step()
        sizes.append(run.runtime.loads[-1].prefill_rows)
    assert sizes[0] < 0.5 * sizes[1]


WORK = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 1]),  # priority
        st.sampled_from(["a", "a", "b"]),  # tenant
        st.sampled_from([2, 5, 9, 20, 60, 100]),  # prompt
        st.integers(0, 12),  # tokens
        st.integers(0, 5),  # steps until the next
    ),
    min_size=4,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(WORK, st.integers(28, 60), st.integers(2, 6), st.integers(1, 12), st.integers(1, 2), st.booleans())
def test_whatever_comes_all_yield_what_they_yield_alone(
    work: Any, blocks: int, seats: int, budget: int, depth: int, caching: bool
) -> None:
    """A step in two is a turn, where anybody is shorter: more than there ever are."""
    engine = fake(blocks, max_num_seqs=seats, max_num_batched_tokens=budget, depth=depth, enable_prefix_caching=caching)
    steps = count()
    engine.scheduler._turns.due = lambda _: next(steps) % 2 == 1  # type: ignore[method-assign, union-attr]
    made = []
    for number, (priority, tenant, prompt, tokens, times) in enumerate(work):
        made.append(request("r" * (1 + number), prompt, tokens, priority=priority, tenant=tenant))
        engine.add_request(made[-1])
        for _ in range(times):
            engine.step()
            engine.scheduler.check()
    bound = 5 * sum(r.max_length + 2 for r in made) + 5
    while engine.has_unfinished():
        assert bound, "a request starves"
        bound -= 1
        engine.step()
        engine.scheduler.check()
    for each in made:
        assert each.output_token_ids == expected_tokens(each, each.seed, engine.limits, frozenset())
