"""OpenAI's Agents SDK, on Chat Completions and on Responses, its default."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel, Field
from scenarios import FEW, MANY, NO_MODEL, QUESTION, THINKING, Endpoint, called, fits, play, refused, said, streamed

set_tracing_disabled(True)


class Answer(BaseModel):
    """The answer."""

    city: Literal["Paris", "Bonn", "Rome"]
    rivers: int = Field(ge=0, le=9)


LONG = 512  # tokens; the demo model does not come to an end in fewer


@function_tool
def get_weather(city: Literal["Paris", "Bonn", "Rome"]) -> str:
    """The weather in a city."""
    called("get_weather", {"city": city})
    return f"sunny in {city}"


def agent(
    at: Endpoint, model: Any = OpenAIChatCompletionsModel, tools: Any = (), output: Any = None, **settings: Any
) -> Any:
    made = openai.AsyncOpenAI(base_url=at.url, api_key=at.key, max_retries=0)
    return Agent(
        name="clerk",
        model=model(at.model, openai_client=made),
        model_settings=ModelSettings(**{"temperature": 0, "max_tokens": MANY, **settings}),
        tools=list(tools),
        output_type=output,
        tool_use_behavior="stop_on_first_tool",
    )


def ask(*given: Any, **options: Any) -> Any:
    return Runner.run_sync(agent(*given, **options), QUESTION, max_turns=1).final_output


def events_of(made: Any) -> tuple[list[Any], Any]:
    async def events() -> tuple[list[Any], Any]:
        result = Runner.run_streamed(made, QUESTION, max_turns=1)
        return [event async for event in result.stream_events()], result.final_output

    return asyncio.run(events())


def chat(at: Endpoint) -> None:
    said(ask(at))


def stream(at: Endpoint) -> None:
    events, final = events_of(agent(at))
    raw = [event.data for event in events if event.type == "raw_response_event"]
    streamed([event.delta for event in raw if event.type == "response.output_text.delta"], final)


def json_schema(at: Endpoint) -> None:
    fits(ask(at, output=Answer).model_dump())


def tools(at: Endpoint) -> None:
    found = ask(at, tools=[get_weather], tool_choice="required")
    said(found)


def tools_stream(at: Endpoint) -> None:
    said(events_of(agent(at, tools=[get_weather], tool_choice="required"))[1])


def reasoning(at: Endpoint) -> None:
    made = agent(at, max_tokens=FEW, extra_body=THINKING)
    kinds = [item.type for item in Runner.run_sync(made, QUESTION, max_turns=1).new_items]
    said(" ".join(kinds))


def responses(at: Endpoint) -> None:
    """An answer that is cut short is an error to this client: one call, and room for the rest."""
    said(ask(at, OpenAIResponsesModel, max_tokens=LONG))
    said(ask(at, OpenAIResponsesModel, tools=[get_weather], tool_choice="required", parallel_tool_calls=False))
    fits(ask(at, OpenAIResponsesModel, output=Answer).model_dump())


def bad_model(at: Endpoint) -> None:
    refused(lambda: ask(Endpoint(at.root, at.key, NO_MODEL)), "404", NO_MODEL)


def wrong_key(at: Endpoint) -> None:
    refused(lambda: ask(at.with_wrong_key()), "401", "key")


if __name__ == "__main__":
    play(chat, stream, json_schema, tools, tools_stream, reasoning, responses, bad_model, wrong_key)
