"""openai's client for Python."""

from __future__ import annotations

from typing import Any

import openai
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

FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
NAMED: Any = {"type": "function", "function": {"name": FUNCTION["name"]}}
FLAT_TOOL: Any = {"type": "function", **FUNCTION, "strict": True}


def client(at: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=at.url, api_key=at.key, max_retries=0)


def fields(at: Endpoint, **options: Any) -> Any:
    return {"model": at.model, "messages": MESSAGES, "max_tokens": MANY, "temperature": 0, **options}


def ask(at: Endpoint, **options: Any) -> Any:
    return client(at).chat.completions.create(**fields(at, **options))


def chat(at: Endpoint) -> None:
    answer = ask(at)
    said(answer.choices[0].message.content)
    expect(answer.usage.completion_tokens > 0, "usage")


def stream(at: Endpoint) -> None:
    chunks = list(ask(at, stream=True, stream_options={"include_usage": True}))
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    streamed(pieces, ask(at).choices[0].message.content)
    expect(chunks[-1].usage.completion_tokens > 0, "usage in the last chunk")


def completions(at: Endpoint) -> None:
    answer = client(at).completions.create(model=at.model, prompt=TEXT, max_tokens=FEW)
    said(answer.choices[0].text)


def seed(at: Endpoint) -> None:
    repeats(lambda n: ask(at, seed=n, temperature=1, max_tokens=FEW).choices[0].message.content)


def json_schema(at: Endpoint) -> None:
    fits(ask(at, response_format=FORMAT).choices[0].message.content)


def tools(at: Endpoint) -> None:
    for choice in ("required", NAMED):
        call = ask(at, tools=[TOOL], tool_choice=choice).choices[0].message.tool_calls[0].function
        called(call.name, call.arguments)


def tools_stream(at: Endpoint) -> None:
    with client(at).chat.completions.stream(**fields(at, tools=[TOOL], tool_choice=NAMED)) as events:
        message = events.get_final_completion().choices[0].message
    call = message.tool_calls[0].function
    called(call.name, call.arguments)


def reasoning(at: Endpoint) -> None:
    message = ask(at, max_tokens=FEW, extra_body=THINKING).choices[0].message
    said(message.reasoning_content)
    chunks = list(ask(at, max_tokens=FEW, extra_body=THINKING, stream=True))
    streamed([getattr(c.choices[0].delta, "reasoning_content", None) for c in chunks], message.reasoning_content)


def logprobs(at: Endpoint) -> None:
    answer = ask(at, logprobs=True, top_logprobs=2, max_tokens=FEW)
    content = answer.choices[0].logprobs.content
    likely([entry.logprob for entry in content], answer.usage.completion_tokens)
    expect(all(len(entry.top_logprobs) == 2 for entry in content), "two most likely tokens in every place")


def embeddings(at: Endpoint) -> None:
    for form in ("float", "base64"):
        answer = client(at).embeddings.create(model=at.model, input=[QUESTION, TEXT], encoding_format=form)
        expect(len(answer.data) == 2, "two embeddings")
    embedded(entry.embedding for entry in client(at).embeddings.create(model=at.model, input=[QUESTION, TEXT]).data)


def responses(at: Endpoint) -> None:
    asked: Any = {"model": at.model, "input": QUESTION, "max_output_tokens": MANY, "temperature": 0}
    answer = client(at).responses.create(**asked)
    said(answer.output_text)
    with client(at).responses.stream(**asked) as events:
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        expect(events.get_final_response().status in ("completed", "incomplete"), "a status of the end")
    streamed(pieces, answer.output_text)
    text = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}}
    fits(client(at).responses.create(**asked, text=text).output_text)
    call = client(at).responses.create(**asked, tools=[FLAT_TOOL], tool_choice="required").output[0]
    called(call.name, call.arguments)


def bad_model(at: Endpoint) -> None:
    refused(lambda: ask(Endpoint(at.root, at.key, NO_MODEL)), "NotFoundError", NO_MODEL)


def wrong_key(at: Endpoint) -> None:
    refused(lambda: ask(at.with_wrong_key()), "AuthenticationError", "key")


if __name__ == "__main__":
    play(
        *(chat, stream, completions, seed, json_schema, tools, tools_stream, reasoning, logprobs, embeddings),
        *(responses, bad_model, wrong_key),
    )
