"""Requests that wait cost a step nothing: neither in the engine, nor on the wire, nor in the API process."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import pytest
from bytecodes import Bytecodes
from engine.fake_runtime import FakeRuntime
from small_tokenizers import byte_level

from llmctl.config import ServeConfig
from llmctl.engine.llm_engine import EngineStats, LLMEngine, TokenOutput
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.serving.api_channel import ApiChannel
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.engine_loop import EngineLoop
from llmctl.serving.generation import SequenceSpec
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.transport import WorkerChannel
from llmctl.serving.wire import Shutdown, StepMessage, encode
from llmctl.structured.compiler import GrammarCompiler

TURNS = 12
MANY = 200
PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


class Channel:
    """The worker's channel: no commands for TURNS turns, then the end. Keeps what was sent, and the work at each turn's
    beginning."""

    def __init__(self, work: Bytecodes) -> None:
        self.work, self.at, self.sent = work, list[int](), list[bytes]()

    def receive(self, _: int) -> list[bytes]:
        self.at.append(self.work.count)
        return [encode(Shutdown())] if len(self.at) > TURNS else []

    def wake(self) -> None: ...

    def send(self, message: bytes) -> None:
        self.sent.append(message)


def turns(running: int, waiting: int, *, seats: int, blocks: int) -> tuple[list[int], list[int]]:
    """Bytecodes of each turn of the worker's loop, and bytes of each message, with so many requests in the engine."""
    served = {"policy": "fair", "itl_target": None}  # as a server does
    config = SchedulerConfig(max_num_seqs=seats, max_num_queued_reqs=MANY, **served)  # type: ignore[arg-type]
    engine = LLMEngine(FakeRuntime(blocks), config)
    engine.add_requests([Request(f"r{i}", [i, 1, 2], PARAMS) for i in range(running)])
    for _ in range(3):
        engine.step()
    engine.add_requests(
        [Request(f"w{i}", [7] * 60, SamplingParams(max_tokens=4), tenant=str(i)) for i in range(waiting)]
    )
    engine.step()
    with Bytecodes() as work:
        channel = Channel(work)
        EngineLoop(engine, cast(WorkerChannel, channel), GrammarCompiler(byte_level(), 40, ())).run()
    assert (engine.stats().num_generated_tokens, len(channel.sent)) == (running * (TURNS + 5), TURNS + 1)
    return [b - a for a, b in pairwise(channel.at)], [len(message) for message in channel.sent]


@pytest.mark.parametrize(("seats", "blocks"), [(4, 200), (64, 20)])
def test_a_turn_of_the_worker_is_the_same_however_many_wait(seats: int, blocks: int) -> None:
    """Whether they wait for a seat or for blocks."""
    few, many = turns(4, 1, seats=seats, blocks=blocks), turns(4, MANY, seats=seats, blocks=blocks)
    assert min(few[0]) > 500
    assert few[0] == many[0]
    assert all(0 <= b - a <= 2 for a, b in zip(few[1], many[1], strict=True))  # the number itself


def test_with_every_seat_taken_a_queue_adds_nothing_to_a_turn() -> None:
    for running in (2, 16):
        (none, _), (one, _) = (turns(running, n, seats=running, blocks=400) for n in (0, 1))
        assert all(0 <= b - a <= 20 for a, b in zip(none, one, strict=True))  # a look at the seats


def test_a_door_that_many_wait_behind_opens_as_easily() -> None:
    """Looking whether a request's id is in use asks for that id only."""
    hashed = 0

    class Name(str):
        __slots__ = ()

        def __hash__(self) -> int:
            nonlocal hashed
            hashed += 1
            return super().__hash__()

    engine = LLMEngine(FakeRuntime(), SchedulerConfig(max_num_queued_reqs=MANY + 1))
    counts = []
    for i in range(MANY):
        before = hashed
        engine.add_request(Request(Name(i), [1], PARAMS))
        counts.append(hashed - before)
    assert len(set(counts[1:])) == 1


def test_the_api_process_takes_in_a_step_however_many_wait() -> None:
    class Discard:
        def send(self, _: bytes) -> None:
            pass

    def work(waiting: int) -> list[int]:
        client = AsyncEngineClient(ServeConfig(), ServerMetrics("m"), stall_timeout=60)
        client.worker.tokenizer, client.worker._channel = byte_level(), cast(ApiChannel, Discard())
        client.admit()
        spec = SequenceSpec([5, 6], PARAMS)
        streams = [client.generate([spec]) for _ in range(4 + waiting)][:4]
        counts = []
        for number in range(TURNS):
            outputs = [TokenOutput(s.sequences[0].request_id, (40,)) for s in streams]
            stats = EngineStats(4, waiting, 0.5, 0, 0, 0, number, number * 4, number * 4, 4)
            message = encode(StepMessage(outputs, stats, number / 100))
            with Bytecodes() as bytecodes:
                client.worker._on_message(message)
            counts.append(bytecodes.count)
        assert all(s._pending for s in streams)
        return counts

    work(0)  # what is made once is made
    assert work(0) == work(MANY)
