"""pydantic-ai: agents on OpenAI's two APIs and on Anthropic's."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, Embedder, NativeOutput, ToolOutput
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from scenarios import (
    FEW,
    MANY,
    NO_MODEL,
    QUESTION,
    TEXT,
    THINKING,
    Endpoint,
    embedded,
    expect,
    fits,
    play,
    refused,
    repeats,
    said,
    streamed,
)


class Answer(BaseModel):
    """The answer."""

    city: Literal["Paris", "Bonn", "Rome"]
    rivers: int = Field(ge=0, le=9)


def provider(at: Endpoint) -> OpenAIProvider:
    return OpenAIProvider(base_url=at.url, api_key=at.key)


def agent(at: Endpoint, output: Any = str, **settings: Any) -> Agent[None, Any]:
    model = OpenAIChatModel(at.model, provider=provider(at))
    used = {"temperature": 0, "max_tokens": MANY, **settings}
    return Agent(model, output_type=output, retries=0, model_settings=used)


def chat(at: Endpoint) -> None:
    result = agent(at).run_sync(QUESTION)
    said(result.output)
    expect(result.usage().output_tokens > 0, "usage")


def stream(at: Endpoint) -> None:
    async def pieces() -> list[str]:
        async with agent(at).run_stream(QUESTION) as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    streamed(asyncio.run(pieces()), agent(at).run_sync(QUESTION).output)


def seed(at: Endpoint) -> None:
    repeats(lambda n: agent(at, seed=n, temperature=1, max_tokens=FEW).run_sync(QUESTION).output)


def json_schema(at: Endpoint) -> None:
    fits(agent(at, NativeOutput(Answer, strict=True)).run_sync(QUESTION).output.model_dump())


def tools(at: Endpoint) -> None:
    fits(agent(at, ToolOutput(Answer)).run_sync(QUESTION).output.model_dump())


def tools_stream(at: Endpoint) -> None:
    async def last() -> Any:
        async with agent(at, ToolOutput(Answer)).run_stream(QUESTION) as result:
            return await result.get_output()

    fits(asyncio.run(last()).model_dump())


def reasoning(at: Endpoint) -> None:
    """An answer that is reasoning alone is asked again, and then refused: there is no output."""
    settings = {"max_tokens": FEW, "extra_body": THINKING}

    async def parts() -> list[str]:
        kinds: list[str] = []
        async with agent(at, **settings).iter(QUESTION) as run:
            async for node in run:
                if Agent.is_call_tools_node(node):
                    kinds += [part.part_kind for part in node.model_response.parts]
                    break
        return kinds

    expect("thinking" in asyncio.run(parts()), "a part of kind thinking")


def embeddings(at: Endpoint) -> None:
    model = OpenAIEmbeddingModel(at.model, provider=provider(at))
    embedded(asyncio.run(Embedder(model).embed_documents([QUESTION, TEXT])).embeddings)


ONE_CALL = {"max_tokens": MANY, "parallel_tool_calls": False}
"""A model that must call, and may call again, can go on to the end of its context."""


def responses(at: Endpoint) -> None:
    model = OpenAIResponsesModel(at.model, provider=provider(at))
    said(Agent(model, retries=0, model_settings={"max_tokens": MANY}).run_sync(QUESTION).output)
    fits(
        Agent(model, output_type=ToolOutput(Answer), retries=0, model_settings=ONE_CALL)
        .run_sync(QUESTION)
        .output.model_dump()
    )


def messages(at: Endpoint) -> None:
    model = AnthropicModel(at.model, provider=AnthropicProvider(base_url=at.root, api_key=at.key))
    said(Agent(model, retries=0, model_settings={"max_tokens": MANY}).run_sync(QUESTION).output)
    fits(
        Agent(model, output_type=ToolOutput(Answer), retries=0, model_settings=ONE_CALL)
        .run_sync(QUESTION)
        .output.model_dump()
    )


def bad_model(at: Endpoint) -> None:
    refused(lambda: agent(Endpoint(at.root, at.key, NO_MODEL)).run_sync(QUESTION), "404", NO_MODEL)


def wrong_key(at: Endpoint) -> None:
    refused(lambda: agent(at.with_wrong_key()).run_sync(QUESTION), "401", "key")


if __name__ == "__main__":
    play(
        *(chat, stream, seed, json_schema, tools, tools_stream, reasoning, embeddings, responses, messages),
        *(bad_model, wrong_key),
    )
