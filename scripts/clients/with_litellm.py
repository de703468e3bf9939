"""litellm, as a client of an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
from scenarios import (
    FEW,
    FUNCTION,
    MANY,
    MESSAGES,
    NO_MODEL,
    QUESTION,
    SCHEMA,
    TEXT,
    THINKING,
    TOOL,
    Endpoint,
    called,
    embedded,
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
litellm.telemetry = False
litellm.suppress_debug_info = True


def where(at: Endpoint, provider: str = "hosted_vllm", root: str | None = None) -> dict[str, Any]:
    return {"model": f"{provider}/{at.model}", "api_base": root or at.url, "api_key": at.key, "num_retries": 0}


def ask(at: Endpoint, **options: Any) -> Any:
    return litellm.completion(**where(at), **{"messages": MESSAGES, "max_tokens": MANY, "temperature": 0, **options})


def chat(at: Endpoint) -> None:
    answer = ask(at)
    said(answer.choices[0].message.content)
    expect(answer.usage.completion_tokens > 0, "usage")


def stream(at: Endpoint) -> None:
    chunks = list(ask(at, stream=True, stream_options={"include_usage": True}))
    streamed([c.choices[0].delta.content for c in chunks if c.choices], ask(at).choices[0].message.content)


def completions(at: Endpoint) -> None:
    said(litellm.text_completion(**where(at), prompt=TEXT, max_tokens=FEW).choices[0].text)


def seed(at: Endpoint) -> None:
    repeats(lambda n: ask(at, seed=n, temperature=1, max_tokens=FEW).choices[0].message.content)


def json_schema(at: Endpoint) -> None:
    fits(ask(at, response_format=FORMAT).choices[0].message.content)


def tools(at: Endpoint) -> None:
    for choice in ("required", NAMED):
        call = ask(at, tools=[TOOL], tool_choice=choice).choices[0].message.tool_calls[0].function
        called(call.name, call.arguments)


def tools_stream(at: Endpoint) -> None:
    chunks = list(ask(at, tools=[TOOL], tool_choice=NAMED, stream=True))
    call = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0].function
    called(call.name, call.arguments)


def reasoning(at: Endpoint) -> None:
    message = ask(at, max_tokens=FEW, extra_body=THINKING).choices[0].message
    said(message.reasoning_content)
    chunks = list(ask(at, max_tokens=FEW, extra_body=THINKING, stream=True))
    streamed([getattr(c.choices[0].delta, "reasoning_content", None) for c in chunks], message.reasoning_content)


def logprobs(at: Endpoint) -> None:
    answer = ask(at, logprobs=True, top_logprobs=2, max_tokens=FEW)
    likely([entry.logprob for entry in answer.choices[0].logprobs.content], answer.usage.completion_tokens)


def embeddings(at: Endpoint) -> None:
    answer = litellm.embedding(**where(at), input=[QUESTION, TEXT])
    embedded(entry["embedding"] for entry in answer.data)


def responses(at: Endpoint) -> None:
    answer = litellm.responses(**where(at, "openai"), input=QUESTION, max_output_tokens=MANY)
    said(answer.output[0].content[0].text)


def messages(at: Endpoint) -> None:
    asked = where(at, "anthropic", at.root)
    answer = asyncio.run(litellm.anthropic.messages.acreate(**asked, messages=MESSAGES, max_tokens=MANY))
    said(answer["content"][0]["text"])


def bad_model(at: Endpoint) -> None:
    refused(lambda: ask(Endpoint(at.root, at.key, NO_MODEL)), "NotFoundError", NO_MODEL)


def wrong_key(at: Endpoint) -> None:
    refused(lambda: ask(at.with_wrong_key()), "AuthenticationError", "key")


if __name__ == "__main__":
    play(
        *(chat, stream, completions, seed, json_schema, tools, tools_stream, reasoning, logprobs, embeddings),
        *(responses, messages, bad_model, wrong_key),
    )
