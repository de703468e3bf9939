"""State machine over the whole engine: whatever is added, aborted, preempted or shared, blocks are conserved,
everything ends within a bounded number of steps, and every request yields the tokens it yields alone."""

from __future__ import annotations

from typing import Any

from fake_runtime import FakeRuntime, expected_tokens
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmctl.engine.deadline import Deadline
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import FinishReason, Request, fan_out
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.errors import CapacityError, QueueFullError

EOS = frozenset({0, 1})
VOCAB = 40

PARAMS = st.builds(
    lambda max_tokens, min_tokens, **fields: SamplingParams(
        max_tokens=max_tokens, min_tokens=min_tokens if max_tokens is None else min(min_tokens, max_tokens), **fields
    ),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.sampled_from([None, 0, 12345]),
    max_tokens=st.one_of(st.none(), st.integers(0, 20)),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (2, 3, 4), tuple(range(2, 36))]),
    bad_words=st.sampled_from([(), (), ((5,),), ((6, 7),)]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    logit_bias=st.sampled_from([None, {8: 1.0}]),
    min_tokens=st.integers(0, 4),
    n=st.sampled_from([1, 1, 2]),
    prompt_logprobs=st.sampled_from([None, None, 0]),
)
# Prompts from two "system prompts" and a short tail, so that prefixes are shared, in part and to the block's edge.
PROMPTS = st.builds(
    lambda head, length, tail: [10 + head + i % 7 for i in range(length)] + tail,
    st.integers(0, 1),
    st.integers(0, 14),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(3, 14),
        block_size=st.integers(1, 5),
        budget=st.integers(1, 24),
        seats=st.integers(1, 6),
        caching=st.booleans(),
        chunking=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority", "fair"]),
        in_flight=st.integers(1, 2),
        itl_target=st.sampled_from([0.0, None, 0.005]),
        shed=st.booleans(),
        windows=st.sampled_from([(0,), (0,), (0, 3), (0, 0, 5, 5, 5), (6,), (9, 1)]),
    )
    def start(
        self, blocks: int, block_size: int, budget: int, seats: int, caching: bool, chunking: bool, policy: str,
        in_flight: int, itl_target: float | None, shed: bool, windows: tuple[int, ...],
    ) -> None:  # fmt: skip
        blocks *= len(windows)
        runtime = FakeRuntime(
            blocks, block_size, 30, VOCAB, steps_in_flight=in_flight, seconds_a_token=0.001, windows=windows
        )
        self.config = SchedulerConfig(seats, budget, caching, chunking, policy, 8, itl_target, shed)
        self.now = 0.0
        self.engine = LLMEngine(runtime, self.config, EOS, seed=3, clock=lambda: self.now)
        self.engine.on_shed = self.on_shed
        scheduler = self.engine.scheduler
        self.make_way = scheduler._make_way
        scheduler._make_way = self.making_way  # type: ignore[method-assign]
        self.made_way_for: Request | None = None
        runtime.wipe_allocated(scheduler.pool)
        self.admit = scheduler._schedule_waiting
        scheduler._schedule_waiting = self.schedule_waiting  # type: ignore[method-assign]
        self.requests: dict[str, Request] = {}
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason] = {}
        self.count = 0

    @rule(
        prompt=PROMPTS,
        params=PARAMS,
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "s"]),
        tenant=st.sampled_from(["", "a", "b"]),
        deadline=st.builds(Deadline, st.sampled_from([None, 3.0, 10.0]), st.sampled_from([None, 0.002, 0.006])),
    )
    def add(
        self, prompt: list[int], params: SamplingParams, priority: int, salt: str | None, tenant: str,
        deadline: Deadline,
    ) -> None:  # fmt: skip
        if self.config.policy == "fcfs":
            deadline = Deadline()
        name = f"r{self.count}"
        self.count += 1
        facts = {"priority": priority, "cache_salt": salt, "tenant": tenant, "deadline": deadline}
        requests = fan_out(Request(name, prompt, params, **facts))  # type: ignore[arg-type]
        longest = self.engine.scheduler.max_length
        output = max(1, params.min_tokens) if params.max_tokens is None else params.max_tokens
        fits = len(prompt) + output <= longest and (
            self.config.enable_chunked_prefill or len(prompt) <= self.config.max_num_batched_tokens
        )
        room = self.engine.stats().num_waiting + params.n <= 8
        try:
            self.engine.add_requests(requests)
        except CapacityError:
            assert not fits
        except QueueFullError:
            assert fits
            assert not room
        else:
            assert fits
            assert room
            for request in requests:
                self.requests[request.request_id] = request
                self.got[request.request_id] = []

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.step_once()

    def step_once(self) -> None:
        self.now += 1.0
        for output in self.engine.step():
            assert output.request_id not in self.ended
            self.got[output.request_id] += output.new_token_ids
            if output.finish_reason is not None:
                self.end(output.request_id, output.finish_reason)
        self.consistent()

    def making_way(self) -> None:
        """Whoever makes room is of a larger priority value, and does it for one that is in the step."""
        running = list(self.engine.scheduler.running)
        self.make_way()
        gone = running[len(self.engine.scheduler.running) :]
        if gone:
            self.made_way_for = self.engine.scheduler.waiting.peek()
            assert all(r.priority > self.made_way_for.priority for r in gone)

    def on_shed(self, requests: list[Request]) -> None:
        for request in requests:
            assert self.config.shed
            assert request.times.first_scheduled is None
            assert request.deadline.ttft is not None
            assert self.now > request.times.arrival + request.deadline.ttft
            self.ended[request.request_id] = FinishReason.ABORT

    def schedule_waiting(self, step: Any) -> None:
        """Waiting requests are looked at only when running ones hold blocks for all that they can compute: none is
        spoken for."""
        scheduler = self.engine.scheduler
        assert step.budget
        for r in scheduler.running:
            fed = r.num_in_flight if r.num_tokens + 1 < r.max_length else 0
            assert len(r.tables[0]) == scheduler.pool.blocks_for(r.num_tokens + max(0, fed - (r in step.sampled)))
        self.admit(step)
        assert self.made_way_for is None or self.made_way_for in step.requests
        self.made_way_for = None

    @precondition(lambda self: self.engine.has_unfinished())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine.scheduler.requests)))
        (output,) = self.engine.abort([name])
        self.ended[name] = output.finish_reason or FinishReason.STOP
        expected = self.expected(name)
        assert self.got[name] == expected[: len(self.got[name])]
        assert output.finish_reason is FinishReason.ABORT

    @rule()
    def drain(self) -> None:
        """The first in order gains a token every step, so this many steps (twice over, in flight) suffice."""
        left = [self.requests[name] for name in self.engine.scheduler.requests]
        bound = 3 * sum(r.max_length + 2 for r in left) + 5
        while self.engine.has_unfinished():
            assert bound, "a request starves"
            bound -= 1
            self.step_once()

    def expected(self, name: str) -> list[int]:
        request = self.requests[name]
        return expected_tokens(request, request.seed, self.engine.limits, EOS, self.engine.scheduler.max_length)

    def end(self, name: str, reason: FinishReason) -> None:
        self.ended[name] = reason
        request, tokens = self.requests[name], self.got[name]
        assert tokens == self.expected(name)
        full = request.num_prompt_tokens + len(tokens) == request.max_length
        stopping = bool(tokens) and (
            tokens[-1] in request.params.stop_token_ids or (tokens[-1] in EOS and not request.params.ignore_eos)
        )
        assert reason is (FinishReason.STOP if stopping else FinishReason.LENGTH)
        assert full or stopping

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "engine"):
            return
        assert self.made_way_for is None
        self.engine.scheduler.check()
        stats = self.engine.stats()
        assert stats.num_running <= self.config.max_num_seqs
        assert stats.last_step_tokens <= self.config.max_num_batched_tokens
        assert 0 <= stats.kv_cache_usage <= 1
        if not self.engine.has_unfinished():
            assert stats.kv_cache_usage == 0

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.drain()
            assert set(self.ended) == set(self.requests)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=80, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
