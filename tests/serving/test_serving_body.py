"""Validators of bodies are made after the start, and all of them can be."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import llmctl.serving.operations  # noqa: F401  (imports all)
from llmctl.serving import body
from llmctl.serving.operations import OPERATIONS
from llmctl.serving.protocol import ApiModel, ChatCompletionRequest


def test_all_can_be_made() -> None:
    """A mistake in one would be seen at its first request."""
    asyncio.run(body.build_models())
    found = set(body.models())
    assert found >= {model for operation in OPERATIONS for model in operation.bodies}
    assert ChatCompletionRequest in found
    assert all(model.__pydantic_complete__ for model in found)


def test_none_is_made_by_an_import() -> None:
    code = (
        "import llmctl.serving.app\n"
        "from llmctl.serving.body import models\n"
        "print(*(model.__name__ for model in models() if model.__pydantic_complete__))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.split() == []


def test_the_event_loop_is_not_held_long() -> None:
    class First(ApiModel):
        pass

    class Second(ApiModel):
        pass

    turns: list[int] = []

    async def run() -> None:
        building = asyncio.create_task(body.build_models())
        while not building.done():
            turns.append(sum(model.__pydantic_complete__ for model in (First, Second)))
            await asyncio.sleep(0)

    asyncio.run(run())
    assert {0, 1} <= set(turns)  # others had their turn between one and the next
    assert Second.__pydantic_complete__
