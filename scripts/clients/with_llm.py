"""Simon Willison's llm: its library, with the server named in ``extra-openai-models.yaml``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import llm
from scenarios import (
    FEW,
    MANY,
    NO_MODEL,
    QUESTION,
    SCHEMA,
    TEXT,
    Endpoint,
    expect,
    fits,
    play,
    refused,
    repeats,
    said,
    streamed,
)


def model(at: Endpoint, **options: Any) -> Any:
    """The model under an id of its own: llm reads its file anew when models are listed."""
    row = {"model_id": "tried", "model_name": at.model, "api_base": at.url, "supports_schema": True}
    row |= {"api_key_name": "tried", **options}
    folder = Path(os.environ["LLM_USER_PATH"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "extra-openai-models.yaml").write_text(json.dumps([row]))  # JSON is YAML
    (folder / "keys.json").write_text(json.dumps({"tried": at.key}))
    return llm.get_model("tried")


def ask(at: Endpoint, **options: Any) -> Any:
    return model(at).prompt(QUESTION, **{"temperature": 0, "max_tokens": MANY, "stream": False, **options})


def chat(at: Endpoint) -> None:
    answer = ask(at)
    said(answer.text())
    expect(answer.usage().output > 0, "usage")


def stream(at: Endpoint) -> None:
    streamed(ask(at, stream=True), ask(at).text())


def completions(at: Endpoint) -> None:
    said(model(at, completion=True).prompt(TEXT, max_tokens=FEW, stream=False).text())


def seed(at: Endpoint) -> None:
    repeats(lambda n: ask(at, seed=n, temperature=1, max_tokens=FEW).text())


def json_schema(at: Endpoint) -> None:
    fits(ask(at, schema=SCHEMA).text())


def logprobs(at: Endpoint) -> None:
    answer = model(at, completion=True).prompt(TEXT, max_tokens=FEW, logprobs=2)
    answer.text()
    entries = answer.response_json["logprobs"]
    expect(entries and all("top_logprobs" in entry for entry in entries), f"log-probabilities, found {entries!r}")


def bad_model(at: Endpoint) -> None:
    refused(lambda: ask(Endpoint(at.root, at.key, NO_MODEL)).text(), NO_MODEL)


def wrong_key(at: Endpoint) -> None:
    refused(lambda: ask(at.with_wrong_key()).text(), "key")


if __name__ == "__main__":
    play(chat, stream, completions, seed, json_schema, logprobs, bad_model, wrong_key)
