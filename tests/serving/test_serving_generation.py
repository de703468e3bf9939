"""Output on its way to a consumer: merged while nobody takes it, complete when it is done, errors where they belong."""

from __future__ import annotations

import asyncio

import pytest

from llmctl.engine.output import TextOutput
from llmctl.engine.request import FinishReason
from llmctl.errors import LlmctlError, QueueFullError
from llmctl.serving.generation import Generation


def output(text: str, *ids: int, end: FinishReason | None = None) -> TextOutput:
    return TextOutput("id", text, ids, None, end, None, 0, 0, None, None)


def generation(count: int = 1) -> tuple[Generation, list[Generation]]:
    cancelled: list[Generation] = []
    return Generation(count, cancelled.append), cancelled


def test_what_piles_up_comes_as_one() -> None:
    async def run() -> None:
        made, _ = generation(2)
        made.push(1, output("x", 9))
        made.push(0, output("a", 1))
        made.push(0, output("b", 2))
        stream = aiter(made)
        assert await anext(stream) == [(0, output("ab", 1, 2)), (1, output("x", 9))]
        made.push(0, output("c", 3, end=FinishReason.STOP))
        made.push(1, output("", end=FinishReason.LENGTH))
        assert [(i, o.text, o.finish_reason) for i, o in await anext(stream)] == [(0, "c", "stop"), (1, "", "length")]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert made.done

    asyncio.run(run())


def test_result_waits_for_all() -> None:
    async def run() -> None:
        made, _ = generation(2)
        task = asyncio.create_task(made.result())
        made.push(0, output("a", 1, end=FinishReason.STOP))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
        made.push(1, output("b", 2, end=FinishReason.STOP))
        assert [o.text for o in await task] == ["a", "b"]

    asyncio.run(run())


def test_a_refusal_is_raised_before_the_stream_begins() -> None:
    async def run() -> None:
        made, _ = generation()
        made.fail(QueueFullError("full"))
        with pytest.raises(QueueFullError):
            await made.started()
        with pytest.raises(QueueFullError):
            await made.result()

    asyncio.run(run())


def test_an_error_in_the_middle_comes_after_what_was_there() -> None:
    async def run() -> None:
        made, _ = generation()
        made.push(0, output("a", 1))
        made.fail(LlmctlError("dead"))
        stream = aiter(made)
        assert [(i, o.text) for i, o in await anext(stream)] == [(0, "a")]
        with pytest.raises(LlmctlError, match="dead"):
            await anext(stream)

    asyncio.run(run())


def test_abort_cancels_once_and_ends_the_stream() -> None:
    async def run() -> None:
        made, cancelled = generation()
        task = asyncio.create_task(anext(aiter(made), None))
        await asyncio.sleep(0)
        made.abort()
        made.abort()
        assert await task is None
        assert cancelled == [made]
        assert await made.result() == []

    asyncio.run(run())


def test_abort_after_the_end_cancels_nothing() -> None:
    made, cancelled = generation()
    made.push(0, output("a", 1, end=FinishReason.STOP))
    made.abort()
    assert cancelled == []


def test_a_consumer_slower_than_the_producer_loses_nothing() -> None:
    async def run() -> str:
        made, _ = generation()

        async def produce() -> None:
            for i in range(100):
                made.push(0, output(chr(65 + i % 26), i, end=FinishReason.LENGTH if i == 99 else None))
                if i % 7 == 0:
                    await asyncio.sleep(0)

        task = asyncio.create_task(produce())
        text = ""
        async for batch in made:
            text += "".join(o.text for _, o in batch)
            await asyncio.sleep(0.001)
        await task
        return text

    assert asyncio.run(run()) == "".join(chr(65 + i % 26) for i in range(100))
