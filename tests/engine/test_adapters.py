"""Adapters in the engine: whatever comes in whatever order, every request yields what it yields alone with its own, in
as many slots as there are; nobody waits for ever; what is read stays within its bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_runtime import AdapterRuntime, Reader
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from llmctl.engine.adapter_cache import AdapterCache
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import LoraLimits
from llmctl.errors import LlmctlError, ModelNotFoundError

NAMES = "abcde"


class Served:
    """An engine, its adapters, and what has come of requests."""

    def __init__(self, limits: LoraLimits, config: SchedulerConfig = SchedulerConfig(), **sizes: Any) -> None:
        self.reader = Reader()
        self.runtime = AdapterRuntime(limits.slots, **sizes)
        self.cache = AdapterCache(limits, self.runtime, self.reader.read, self.reader)
        self.engine = LLMEngine(self.runtime, config, adapters=self.cache, clock=lambda: 0.0)
        self.failed: dict[str, LlmctlError] = {}
        self.engine.on_failed = self.failed.__setitem__
        self.got: dict[str, list[int]] = {}
        self.done: list[str] = []
        for name in NAMES:
            self.cache.know(name, Path("/adapters") / name)

    def add(self, name: str, adapter: str | None, prompt: list[int], tokens: int = 3, **fields: Any) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        self.engine.add_request(Request(name, prompt, params, adapter_id=adapter, **fields))
        self.got[name] = []

    def read(self, *adapters: str) -> None:
        """Have them in memory."""
        for adapter in adapters:
            self.cache.ready(adapter)
            self.reader.work()
            list(self.cache.take())

    def step(self) -> None:
        for read in self.cache.take():
            if read.error is not None:
                self.engine.fail_adapter(read.adapter_id, read.error)
        for output in self.engine.step():
            self.got[output.request_id] += output.new_token_ids
            if output.finish_reason is not None:
                self.done.append(output.request_id)
        self.engine.scheduler.check()

    def run(self, most: int = 200) -> None:
        """Until nothing is left."""
        for _ in range(most):
            if not self.engine.has_unfinished():
                return
            self.reader.work()
            self.step()
        raise AssertionError("requests that never end")


def alone(adapter: str | None, prompt: list[int], tokens: int) -> list[int]:
    served = Served(LoraLimits(1, 8, 1))
    served.add("alone", adapter, prompt, tokens)
    served.run()
    return served.got["alone"]


class AdapterMachine(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(1, 3),
        cached=st.integers(0, 2),
        seats=st.integers(1, 5),
        blocks=st.integers(6, 12),
        policy=st.sampled_from(["fcfs", "priority", "fair"]),
        in_flight=st.integers(1, 2),
    )
    def start(self, slots: int, cached: int, seats: int, blocks: int, policy: str, in_flight: int) -> None:
        config = SchedulerConfig(seats, 12, policy=policy)
        limits = LoraLimits(slots, 8, slots + cached)
        self.served = Served(limits, config, num_blocks=blocks, steps_in_flight=in_flight)
        self.asked: dict[str, tuple[str | None, list[int], int]] = {}
        self.count = 0

    @rule(
        adapter=st.sampled_from([None, *NAMES]),
        head=st.integers(0, 1),
        length=st.integers(1, 9),
        tokens=st.integers(1, 6),
        priority=st.integers(0, 1),
        tenant=st.sampled_from(["", "t"]),
    )
    def add(self, adapter: str | None, head: int, length: int, tokens: int, priority: int, tenant: str) -> None:
        """Prompts share prefixes: with another adapter their keys and values are not the same."""
        if adapter is not None and adapter not in self.served.cache:
            return
        self.count += 1
        name, prompt = f"r{self.count}", [10 + head + i for i in range(length)]
        self.served.add(name, adapter, prompt, tokens, priority=priority, tenant=tenant)
        self.asked[name] = adapter, prompt, tokens

    @rule(times=st.integers(1, 4), read=st.integers(0, 2))
    def step(self, times: int, read: int) -> None:
        for _ in range(times):
            self.served.reader.work(read)
            self.served.step()
            assert len(self.served.cache) <= self.served.cache.limits.cached

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        if name in self.served.engine.scheduler.requests:
            self.served.engine.abort([name])
            del self.asked[name]

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        self.served.cache.forget(name)

    @rule(name=st.sampled_from(NAMES))
    def load(self, name: str) -> None:
        self.served.cache.know(name, Path("/adapters") / name)

    def teardown(self) -> None:
        if not hasattr(self, "served"):
            return
        self.served.run()
        for name, (adapter, prompt, tokens) in self.asked.items():
            assert self.served.got[name] == alone(adapter, prompt, tokens), name
        assert self.served.failed == {}


TestAdapters = AdapterMachine.TestCase
TestAdapters.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


class TestAdaptersAtLength(AdapterMachine.TestCase):
    settings = settings(
        max_examples=800, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
    )


TestAdaptersAtLength = pytest.mark.slow(TestAdaptersAtLength)  # type: ignore[misc]


def test_one_that_is_there_is_not_put_again_and_the_one_admitted_longest_ago_goes() -> None:
    served = Served(LoraLimits(2, 8, 2))
    for i, adapter in enumerate("abacb"):
        served.add(str(i), adapter, [1, 2])
        served.run()
    assert served.runtime.puts == [(0, "a"), (1, "b"), (1, "c"), (0, "b")]


def test_others_pass_what_waits_for_a_slot_or_for_its_adapter_to_be_read() -> None:
    served = Served(LoraLimits(1, 8, 1))
    served.add("first", "a", [1], 3)
    served.run()
    served.add("long", "a", [1], 8)
    served.step()
    served.add("other", "b", [1], 1)
    served.add("base", None, [1], 1)
    for _ in range(3):
        served.step()
    assert served.done == ["first", "base"]
    served.run()
    assert served.done == ["first", "base", "long", "other"]


def test_whoever_waits_for_a_slot_has_it_when_the_running_ones_end_whatever_comes_after() -> None:
    """Requests for the adapter that is there keep coming: without a rule the other one would never run."""
    served = Served(LoraLimits(1, 8, 2), SchedulerConfig(max_num_seqs=2))
    served.read("a", "b")
    served.add("a0", "a", [1], 4)
    served.step()
    served.add("b", "b", [1], 1)
    for i in range(1, 12):
        served.add(f"a{i}", "a", [1], 4)
        served.step()
    assert served.done[:2] == ["a0", "b"]


def turns_beside_a_long_prompt_of_a() -> Served:
    """Of 300 tokens, 8 in a step; ``b`` is in memory, and must wait for the slot."""
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=8, itl_target=None, enable_prefix_caching=False)
    served = Served(LoraLimits(1, 8, 2), config, num_blocks=200, max_model_len=400, seconds_a_token=1.0)
    served.read("a", "b")
    served.add("long", "a", [1] * 300, 1)
    for _ in range(3):
        served.step()
    return served


def test_whoever_waits_for_a_slot_is_not_passed_in_turns_by_those_that_are_to_make_room() -> None:
    served = turns_beside_a_long_prompt_of_a()
    served.add("b", "b", [1] * 20, 1)
    served.add("base", None, [1] * 250, 1)  # the next that could enter; in turns shorter ones pass it
    for i in range(12):
        served.add(f"a{i}", "a", [1], 4)
        served.step()
    served.run()
    assert next(name for name in served.done if name not in ("long", "base")) == "b"


def test_in_turns_others_pass_a_short_one_that_waits_for_a_slot() -> None:
    served = turns_beside_a_long_prompt_of_a()
    served.add("base", None, [1] * 250, 1)
    served.add("b", "b", [1], 1)
    served.add("short", None, [1], 1)
    served.run()
    assert served.done[:2] == ["short", "long"]


def test_an_adapter_is_asked_for_once_a_pass_however_many_of_its_requests_wait() -> None:
    served = Served(LoraLimits(1, 8, 2))
    served.read("a", "b")
    served.add("a", "a", [1], 8)
    served.step()
    slots, asked = served.engine.scheduler.adapters, []
    assert slots is not None
    admits = slots.admits
    slots.admits = lambda *given: (asked.append(given[0]), admits(*given))[1]  # type: ignore[method-assign]
    for i in range(20):
        served.add(f"b{i}", "b", [1])
    served.step()
    assert asked == ["b", "b"]  # the next one's own, and those of a pass behind it


def test_who_runs_has_a_token_in_every_step_while_adapters_are_read_and_put_beside_it() -> None:
    """Two slots for five adapters, one that is read between the steps: none of that is waited for by the others."""
    served = Served(LoraLimits(2, 8, 2), SchedulerConfig(max_num_seqs=4), num_blocks=200, max_model_len=400)
    served.read("a")
    served.add("base", None, [1], 80)
    served.add("long", "a", [1], 80)
    served.step()
    for i in range(60):
        served.add(f"r{i}", NAMES[1 + i % 4], [1], 1)
        served.reader.work(i % 2)
        before = [len(served.got[name]) for name in ("base", "long")]
        served.step()
        assert [len(served.got[name]) for name in ("base", "long")] == [count + 1 for count in before]
    assert len({adapter for _, adapter in served.runtime.puts}) == 5
    served.run()


def test_as_many_make_room_as_adapters_wait() -> None:
    served = Served(LoraLimits(3, 8, 5), SchedulerConfig(max_num_seqs=3))
    served.read(*NAMES)
    for adapter in "abc":
        served.add(f"{adapter}0", adapter, [1], 4)
    served.step()
    served.step()
    for name, adapter in (("d", "d"), ("e", "e"), ("a1", "a"), ("b1", "b"), ("c1", "c")):
        served.add(name, adapter, [1], 1)
    served.run()
    assert set(served.done[:3]) == {"a0", "b0", "c0"}
    assert set(served.done[3:6]) == {"d", "e", "a1"}


def test_one_that_cannot_be_read_again_fails_its_requests_alone() -> None:
    served = Served(LoraLimits(1, 8, 1))
    served.reader.broken.add("b")
    served.add("b", "b", [1])
    served.add("a", "a", [1])
    served.run()
    assert served.done == ["a"]
    assert served.failed["b"].message == "adapter /adapters/b: cannot be read: ValueError: broken"
    assert served.failed["b"].http_status == 503


def test_one_whose_files_are_gone_is_not_found() -> None:
    served = Served(LoraLimits(1, 8, 1))
    served.reader.gone.add("b")
    served.add("b", "b", [1])
    served.run()
    assert served.failed["b"].message == "adapter /adapters/b: its files are gone since it was loaded"
    assert served.failed["b"].http_status == 404


def test_files_that_have_changed_are_not_served_under_the_old_name() -> None:
    served = Served(LoraLimits(1, 8, 1))
    served.cache.know("a", Path("/adapters/other"))
    served.add("a", "a", [1])
    served.run()
    assert "its files have changed since it was loaded" in str(served.failed["a"])
    assert served.failed["a"].http_status == 503


def test_what_is_not_loaded_is_refused_and_what_waits_for_it_is_served() -> None:
    served = Served(LoraLimits(1, 8, 1))
    served.add("before", "a", [1])
    served.cache.forget("a")
    with pytest.raises(ModelNotFoundError, match="not loaded any more"):
        served.add("after", "a", [1])
    served.run()
    assert served.done == ["before"]
    assert len(served.cache) == 1
    list(served.cache.take())
    assert len(served.cache) == 0


def test_no_more_is_read_than_is_taken() -> None:
    """Whatever is asked for at once, during a long step: what has been read would lie in memory."""
    served = Served(LoraLimits(1, 8, 2))
    for name in NAMES:
        served.cache.load(name, Path("/adapters") / name)
    taken = []
    while len(taken) < len(NAMES):
        assert len(served.reader.waiting) == 1
        served.reader.work()
        taken += [read.adapter_id for read in served.cache.take()]
    assert taken == list(NAMES)
    assert len(served.cache) == 2


def test_an_engine_that_waits_for_a_file_says_so() -> None:
    served = Served(LoraLimits(1, 8, 1))
    assert not served.engine.awaits_adapters()
    served.add("a", "a", [1])
    served.step()
    assert served.engine.awaits_adapters()
    served.reader.work()
    list(served.cache.take())
    assert not served.engine.awaits_adapters()
    served.run()


def test_a_request_for_an_adapter_of_a_runtime_without_any_is_refused() -> None:
    engine = LLMEngine(AdapterRuntime(1), SchedulerConfig())
    with pytest.raises(ModelNotFoundError):
        engine.add_request(Request("a", [1], adapter_id="a"))
