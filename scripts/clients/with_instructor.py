"""instructor: pydantic models out of chats, by a schema or by a tool."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field
from scenarios import FEW, MANY, MESSAGES, NO_MODEL, Endpoint, expect, fits, play, refused, repeats, said


class Answer(BaseModel):
    """The answer."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Bonn", "Rome"]
    rivers: int = Field(ge=0, le=9)


def client(at: Endpoint, mode: instructor.Mode) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=at.url, api_key=at.key, max_retries=0), mode=mode)


def ask(at: Endpoint, mode: instructor.Mode, model: Any = Answer, **options: Any) -> Any:
    fields = {"model": at.model, "messages": MESSAGES, "max_tokens": MANY, "temperature": 0, **options}
    return client(at, mode).chat.completions.create(response_model=model, max_retries=0, **fields)


def chat(at: Endpoint) -> None:
    said(ask(at, instructor.Mode.JSON_SCHEMA, None).choices[0].message.content)


def seed(at: Endpoint) -> None:
    mode = instructor.Mode.JSON_SCHEMA
    repeats(lambda n: ask(at, mode, None, seed=n, temperature=1, max_tokens=FEW).choices[0].message.content)


def json_schema(at: Endpoint) -> None:
    fits(ask(at, instructor.Mode.JSON_SCHEMA).model_dump())


def tools(at: Endpoint) -> None:
    fits(ask(at, instructor.Mode.TOOLS).model_dump())


def tools_stream(at: Endpoint) -> None:
    found = list(ask(at, instructor.Mode.TOOLS, instructor.Partial[Answer], stream=True))
    expect(len(found) > 1, "several partial answers")
    fits(found[-1].model_dump())


def responses(at: Endpoint) -> None:
    made = client(at, instructor.Mode.RESPONSES_TOOLS)
    answer = made.responses.create(
        model=at.model, input=MESSAGES, max_output_tokens=MANY, response_model=Answer, max_retries=0
    )
    fits(answer.model_dump())


def bad_model(at: Endpoint) -> None:
    refused(lambda: ask(Endpoint(at.root, at.key, NO_MODEL), instructor.Mode.TOOLS), NO_MODEL)


def wrong_key(at: Endpoint) -> None:
    refused(lambda: ask(at.with_wrong_key(), instructor.Mode.TOOLS), "key")


if __name__ == "__main__":
    play(chat, seed, json_schema, tools, tools_stream, responses, bad_model, wrong_key)
