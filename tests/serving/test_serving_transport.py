"""The socket between the processes, and the messages that cross it."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.engine.llm_engine import EngineStats, TokenOutput
from llmctl.engine.pooling import Pooling
from llmctl.engine.request import FinishReason, RequestTimes
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import TokenLogprobs, TokenScores
from llmctl.errors import CapacityError, ExitCode, ModelNotFoundError, QueueFullError
from llmctl.serving.api_channel import ApiChannel
from llmctl.serving.transport import WorkerChannel, socket_pair
from llmctl.serving.wire import (
    AddRequests,
    ErrorInfo,
    Refused,
    StepMessage,
    WireRequest,
    decode_command,
    decode_event,
    encode,
)

STATS = EngineStats(1, 2, 0.5, 3, 4, 5, 6, 7, 8, 9)


class Ends:
    """An open channel: both ends, and what the API process's end has received."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.news = asyncio.Event()

    async def __aenter__(self) -> Ends:
        ours, theirs = socket_pair()
        self.worker = WorkerChannel(theirs)
        self.api = await ApiChannel.open(ours, self._on_message)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.worker.close()
        self.api.close()

    def _on_message(self, message: bytes) -> None:
        self.got.append(message)
        self.news.set()

    async def wait_for(self, count: int) -> list[bytes]:
        while len(self.got) < count:
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), 10)
        return self.got


def test_messages_go_both_ways_and_keep_their_bounds() -> None:
    async def run() -> None:
        async with Ends() as ends:
            for message in (b"up", b"", b"x" * 70_000):
                ends.worker.send(message)
            assert await ends.wait_for(3) == [b"up", b"", b"x" * 70_000]
            assert ends.worker.receive(0) == []
            ends.api.send(b"down")
            ends.api.send(b"twice")
            assert ends.worker.receive(5000) == [b"down", b"twice"]

    asyncio.run(run())


def test_a_message_larger_than_the_buffers_waits_for_its_reader() -> None:
    big = bytes(range(256)) * 40_000

    async def run() -> None:
        async with Ends() as ends:
            sent = asyncio.create_task(asyncio.to_thread(ends.worker.send, big))
            assert await ends.wait_for(1) == [big]
            await sent
            ends.api.send(big)
            await asyncio.sleep(0)
            parts: list[bytes] = []
            while not parts:
                parts = await asyncio.to_thread(ends.worker.receive, 5000)
            assert parts == [big]

    asyncio.run(run())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=9), max_size=6), st.data())
def test_frames_survive_any_cut(messages: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(len(m).to_bytes(4, "little") + m for m in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    reader, writer = socket_pair()
    with reader, writer:
        channel = WorkerChannel(reader)
        got: list[bytes] = []
        for begin, end in pairwise([0, *cuts, len(stream)]):
            writer.sendall(stream[begin:end])
            got += channel.receive(0)
        assert got == messages


def test_the_end_is_seen_after_the_last_message() -> None:
    async def run() -> None:
        async with Ends() as ends:
            ends.worker.send(b"last words")
            ends.worker.close()
            await asyncio.wait_for(ends.api.ended(), 10)
            assert ends.got == [b"last words"]
            ends.api.send(b"nobody hears this")

    asyncio.run(run())


def test_the_worker_sees_that_the_api_process_is_gone() -> None:
    ours, theirs = socket_pair()
    channel = WorkerChannel(theirs)
    ours.close()
    with pytest.raises(EOFError):
        channel.receive(1000)
    with pytest.raises(BrokenPipeError):
        channel.send(b"hello?")
    channel.close()


def test_a_request_survives_the_wire() -> None:
    params = SamplingParams(
        temperature=0.5,
        logit_bias={3: -1.5},
        seed=2**64 - 1,
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        bad_words=((1,), (2, 3)),
        allowed_token_ids=(4,),
        max_tokens=9,
        logprobs=2,
    )
    command = AddRequests([WireRequest("id", [1, 2, 3], params, -4, "salt", 12.5, pooling=Pooling.MEAN)])
    assert decode_command(encode(command)) == command


def test_a_step_survives_the_wire() -> None:
    scores = TokenScores(
        np.array([-1.5, -0.25], np.float32),
        np.array([1, 70000], np.int32),
        np.array([[5, 6], [7, 128255]], np.int32),
        np.array([[-1.5, -3.0], [-0.125, -np.inf]], np.float32),
    )
    output = TokenOutput(
        "id",
        (5, 6),
        (TokenLogprobs(-0.5, 1, (5, 7), (-0.5, -2.0)), TokenLogprobs(-9.0, 3)),
        FinishReason.STOP,
        6,
        4,
        scores,
        RequestTimes(1.0, 2.0, 3.0, 4.0),
        embedding=np.array([0.5, -np.inf], np.float32),
    )
    refused = [Refused(["x"], ErrorInfo.of(QueueFullError("full")))]
    event = decode_event(encode(StepMessage([output, TokenOutput("other")], STATS, 1.5, refused)))
    assert isinstance(event, StepMessage)
    got = event.outputs[0]
    np.testing.assert_array_equal(got.embedding, output.embedding, strict=True)
    assert got.prompt_scores is not None
    for name in TokenScores.__struct_fields__:
        np.testing.assert_array_equal(getattr(got.prompt_scores, name), getattr(scores, name), strict=True)
    for name in (
        "request_id",
        "new_token_ids",
        "logprobs",
        "finish_reason",
        "stop_reason",
        "num_cached_tokens",
        "times",
    ):
        assert getattr(got, name) == getattr(output, name), name
    assert (event.outputs[1], event.stats, event.busy_seconds, event.refused) == (
        TokenOutput("other"),
        STATS,
        1.5,
        refused,
    )


@pytest.mark.parametrize(
    "error",
    [CapacityError("too long", fix="shorten", param="prompt"), QueueFullError("full"), ModelNotFoundError("no such")],
)
def test_an_error_keeps_its_face(error: CapacityError | QueueFullError | ModelNotFoundError) -> None:
    again = ErrorInfo.of(error).error()
    for name in ("message", "fix", "param", "http_status", "type", "code", "exit_code"):
        assert getattr(again, name) == getattr(error, name), name
    assert isinstance(again.exit_code, ExitCode)
