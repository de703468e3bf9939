"""Anthropic's client for Python: its Messages API, for chats, streams, tools."""

from __future__ import annotations

from typing import Any

import anthropic
from scenarios import (
    ARGUMENTS,
    FUNCTION,
    MANY,
    MESSAGES,
    NO_MODEL,
    Endpoint,
    called,
    expect,
    play,
    refused,
    said,
    streamed,
)

TOOL: Any = {"name": FUNCTION["name"], "description": FUNCTION["description"], "input_schema": ARGUMENTS}


def client(at: Endpoint) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=at.root, api_key=at.key, max_retries=0)


def fields(at: Endpoint, **options: Any) -> Any:
    return {"model": at.model, "messages": MESSAGES, "max_tokens": MANY, "extra_body": {"temperature": 0}, **options}


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def stream(at: Endpoint) -> None:
    with client(at).messages.stream(**fields(at)) as events:
        pieces = list(events.text_stream)
        final = events.get_final_message()
    streamed(pieces, text_of(final))
    expect(final.usage.output_tokens > 0, "usage")


def tools(at: Endpoint) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": TOOL["name"]}):
        message = client(at).messages.create(**fields(at, tools=[TOOL], tool_choice=choice))
        (call,) = (block for block in message.content if block.type == "tool_use")
        called(call.name, call.input)
        expect(message.stop_reason == "tool_use", f"stop_reason tool_use, found {message.stop_reason}")


def tools_stream(at: Endpoint) -> None:
    with client(at).messages.stream(**fields(at, tools=[TOOL], tool_choice={"type": "any"})) as events:
        final = events.get_final_message()
    (call,) = (block for block in final.content if block.type == "tool_use")
    called(call.name, call.input)


def messages(at: Endpoint) -> None:
    message = client(at).messages.create(**fields(at, system="Be brief."))
    said(text_of(message))
    expect(message.usage.input_tokens > 0 and message.usage.output_tokens > 0, "usage")
    count = client(at).messages.count_tokens(model=at.model, messages=MESSAGES, system="Be brief.")
    expect(count.input_tokens == message.usage.input_tokens, "the count of tokens that the answer's usage says")


def bad_model(at: Endpoint) -> None:
    wrong = Endpoint(at.root, at.key, NO_MODEL)
    refused(lambda: client(wrong).messages.create(**fields(wrong)), "NotFoundError", NO_MODEL)


def wrong_key(at: Endpoint) -> None:
    wrong = at.with_wrong_key()
    refused(lambda: client(wrong).messages.create(**fields(wrong)), "AuthenticationError", "key")


if __name__ == "__main__":
    play(stream, tools, tools_stream, messages, bad_model, wrong_key)
