"""LangChain's package for OpenAI."""

from __future__ import annotations

from typing import Any

from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from scenarios import (
    FEW,
    FUNCTION,
    MANY,
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

ANSWER_SCHEMA: Any = {"title": "answer", "description": "The answer.", **SCHEMA}


def where(at: Endpoint) -> dict[str, Any]:
    return {"base_url": at.url, "api_key": at.key, "model": at.model, "max_retries": 0}


def model(at: Endpoint, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(**{**where(at), "temperature": 0, "max_tokens": MANY, **options})


def chat(at: Endpoint) -> None:
    answer = model(at).invoke(QUESTION)
    said(answer.content)
    expect(answer.usage_metadata["output_tokens"] > 0, "usage")


def stream(at: Endpoint) -> None:
    streamed([chunk.content for chunk in model(at).stream(QUESTION)], model(at).invoke(QUESTION).content)


def completions(at: Endpoint) -> None:
    said(OpenAI(**where(at), max_tokens=FEW).invoke(TEXT))


def seed(at: Endpoint) -> None:
    repeats(lambda n: model(at, seed=n, temperature=1, max_tokens=FEW).invoke(QUESTION).content)


def json_schema(at: Endpoint) -> None:
    fits(model(at).with_structured_output(ANSWER_SCHEMA, method="json_schema", strict=True).invoke(QUESTION))


def tools(at: Endpoint) -> None:
    for choice in ("required", FUNCTION["name"]):
        bound = model(at).bind_tools([TOOL], tool_choice=choice, parallel_tool_calls=False)
        (call,) = bound.invoke(QUESTION).tool_calls
        called(call["name"], call["args"])


def tools_stream(at: Endpoint) -> None:
    first, *rest = model(at).bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False).stream(QUESTION)
    whole = sum(rest, first)
    (call,) = whole.tool_calls
    called(call["name"], call["args"])


def reasoning(at: Endpoint) -> None:
    """It passes over ``reasoning_content``, as its documentation says."""
    answer = model(at, max_tokens=FEW, extra_body=THINKING).invoke(QUESTION)
    expect(answer.usage_metadata["output_tokens"] > 0, "usage")
    expect(not answer.content, f"no content, found {answer.content!r}")


def logprobs(at: Endpoint) -> None:
    answer = model(at, logprobs=True, top_logprobs=2, max_tokens=FEW).invoke(QUESTION)
    entries = answer.response_metadata["logprobs"]["content"]
    likely([entry["logprob"] for entry in entries], answer.usage_metadata["output_tokens"])


def embeddings(at: Endpoint) -> None:
    """Texts as texts: by default it sends tokens of OpenAI's own tokenizer."""
    embedded(OpenAIEmbeddings(**where(at), check_embedding_ctx_length=False).embed_documents([QUESTION, TEXT]))


def responses(at: Endpoint) -> None:
    said(model(at, use_responses_api=True).invoke(QUESTION).text)
    (call,) = model(at, use_responses_api=True).bind_tools([TOOL], tool_choice="required").invoke(QUESTION).tool_calls
    called(call["name"], call["args"])


def bad_model(at: Endpoint) -> None:
    refused(lambda: model(Endpoint(at.root, at.key, NO_MODEL)).invoke(QUESTION), "NotFound", NO_MODEL)


def wrong_key(at: Endpoint) -> None:
    refused(lambda: model(at.with_wrong_key()).invoke(QUESTION), "AuthenticationError", "key")


if __name__ == "__main__":
    play(
        *(chat, stream, completions, seed, json_schema, tools, tools_stream, reasoning, logprobs, embeddings),
        *(responses, bad_model, wrong_key),
    )
