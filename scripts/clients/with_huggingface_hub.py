"""huggingface_hub's InferenceClient: chats by OpenAI's API, texts by TGI's."""

from __future__ import annotations

import functools
from typing import Any

from huggingface_hub import InferenceClient
from scenarios import (
    FEW,
    FUNCTION,
    MANY,
    MESSAGES,
    NO_MODEL,
    SCHEMA,
    TEXT,
    THINKING,
    TOOL,
    Endpoint,
    called,
    expect,
    fits,
    likely,
    play,
    refused,
    repeats,
    said,
    streamed,
)

NAMED: Any = {"type": "function", "function": {"name": FUNCTION["name"]}}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


@functools.cache  # a stream ends with its client
def client(url: str, key: str) -> InferenceClient:
    return InferenceClient(url, token=key)


def ask(at: Endpoint, **options: Any) -> Any:
    fields = {"model": at.model, "messages": MESSAGES, "max_tokens": MANY, "temperature": 0, **options}
    return client(at.url, at.key).chat_completion(**fields)


def chat(at: Endpoint) -> None:
    answer = ask(at)
    said(answer.choices[0].message.content)
    expect(answer.usage.completion_tokens > 0, "usage")


def stream(at: Endpoint) -> None:
    streamed([c.choices[0].delta.content for c in ask(at, stream=True)], ask(at).choices[0].message.content)


def completions(at: Endpoint) -> None:
    """Through ``POST /``, as of a server of text-generation-inference."""
    server = client(at.root, at.key)
    whole = said(server.text_generation(TEXT, max_new_tokens=FEW))
    streamed(server.text_generation(TEXT, max_new_tokens=FEW, stream=True), whole)
    details = server.text_generation(TEXT, max_new_tokens=FEW, details=True).details
    expect(details.generated_tokens == FEW, f"{FEW} tokens, found {details.generated_tokens}")


def seed(at: Endpoint) -> None:
    repeats(lambda n: ask(at, seed=n, temperature=1, max_tokens=FEW).choices[0].message.content)


def json_schema(at: Endpoint) -> None:
    fits(ask(at, response_format=FORMAT).choices[0].message.content)


def tools(at: Endpoint) -> None:
    for choice in ("required", NAMED):
        call = ask(at, tools=[TOOL], tool_choice=choice).choices[0].message.tool_calls[0].function
        called(call.name, call.arguments)


def tools_stream(at: Endpoint) -> None:
    name, arguments = "", ""
    for chunk in ask(at, tools=[TOOL], tool_choice=NAMED, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    called(name, arguments)


def reasoning(at: Endpoint) -> None:
    message = ask(at, max_tokens=FEW, extra_body=THINKING).choices[0].message
    said(message["reasoning_content"])


def logprobs(at: Endpoint) -> None:
    answer = ask(at, logprobs=True, top_logprobs=2, max_tokens=FEW)
    likely([entry.logprob for entry in answer.choices[0].logprobs.content], answer.usage.completion_tokens)


def bad_model(at: Endpoint) -> None:
    refused(lambda: ask(Endpoint(at.root, at.key, NO_MODEL)), "404", NO_MODEL)


def wrong_key(at: Endpoint) -> None:
    refused(lambda: ask(at.with_wrong_key()), "401", "key")


if __name__ == "__main__":
    play(
        *(chat, stream, completions, seed, json_schema, tools, tools_stream, reasoning, logprobs, bad_model, wrong_key)
    )
