"""What every Python client is asked, how its answers are judged, and how that is said: JSON lines on stdout.

Runs in the environments of the clients, so it needs the standard library alone. ``scenarios.mjs`` is its like.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

QUESTION = "What is the capital of France?"
TEXT = "Once upon a time"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
CITIES = ["Paris", "Bonn", "Rome"]
_CITY = {"type": "string", "enum": CITIES}
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": _CITY, "rivers": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "rivers"],
    "additionalProperties": False,
}
ARGUMENTS: Any = {
    "type": "object",
    "properties": {"city": _CITY},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION: Any = {"name": "get_weather", "description": "The weather in a city.", "parameters": ARGUMENTS}
TOOL: Any = {"type": "function", "function": FUNCTION}
THINKING: Any = {"chat_template_kwargs": {"enable_thinking": True}}
"""The template that the server is started with opens the model's reasoning then."""
NO_MODEL, NO_KEY = "no-such-model", "no-such-key"
MANY, FEW = 64, 8
"""Tokens: where an answer must be whole, and where it need not."""


@dataclass(frozen=True)
class Endpoint:
    """What is tried. root: without ``/v1``."""

    root: str
    key: str
    model: str

    @property
    def url(self) -> str:
        """As OpenAI's clients take it."""
        return self.root + "/v1"

    def with_wrong_key(self) -> Endpoint:
        """The same, with a key that the server does not know."""
        return Endpoint(self.root, NO_KEY, self.model)


def tokenizer() -> str:
    """Folder of the model's tokenizer, for clients that count tokens themselves."""
    return os.environ["TRIAL_TOKENIZER"]


def play(*scenarios: Callable[[Endpoint], None]) -> None:
    """Every scenario, by its function's name; a failure of one is said, and ends none of the others."""
    print(json.dumps({"scenarios": [scenario.__name__ for scenario in scenarios]}), flush=True)
    for scenario in scenarios:
        name = scenario.__name__
        root = os.environ["TRIAL_URL"].replace("{scenario}", name)
        reason = None
        try:
            scenario(Endpoint(root, os.environ["TRIAL_KEY"], os.environ["TRIAL_MODEL"]))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        print("\n" + json.dumps({"scenario": name, "reason": reason}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # some clients leave threads behind that would not end


def expect(holds: object, what: str) -> None:
    """Raises AssertionError with ``what`` was expected unless it holds."""
    if not holds:
        raise AssertionError(f"expected {what}")


def said(text: object) -> str:
    """A text that is not empty."""
    expect(isinstance(text, str) and text.strip(), f"text, found {text!r}")
    return str(text)


def streamed(pieces: Iterable[str | None], whole: str) -> None:
    """Greedy: the pieces are the whole, and are several."""
    found = [piece for piece in pieces if piece]
    expect(len(found) > 1, f"several pieces, found {len(found)}")
    expect("".join(found) == whole, f"the pieces of {whole!r}, found {found!r}")


def repeats(sample: Callable[[int], object]) -> None:
    """Samples of one seed are equal, and of ten others not all the same."""
    first = said(sample(7))
    expect(sample(7) == first, "the same text again from the same seed")
    expect(any(sample(seed) != first for seed in range(100, 110)), "another text from another seed")


def fits(value: Any) -> None:
    """What ``SCHEMA`` says, as a dict or as JSON."""
    found = json.loads(value) if isinstance(value, str) else value
    expect(isinstance(found, dict) and set(found) == {"city", "rivers"}, f"the schema's members, found {found!r}")
    expect(found["city"] in CITIES and found["rivers"] in range(10), f"what the schema says, found {found!r}")


def called(name: object, arguments: Any) -> None:
    """A call of ``FUNCTION``."""
    expect(name == FUNCTION["name"], f"a call of {FUNCTION['name']}, found {name!r}")
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    expect(isinstance(found, dict) and found.get("city") in CITIES, f"a city, found {arguments!r}")


def likely(logprobs: Iterable[float], count: int) -> None:
    """Of so many tokens."""
    found = list(logprobs)
    expect(len(found) == count, f"{count} log-probabilities, found {len(found)}")
    expect(all(value <= 0 for value in found), f"log-probabilities of at most 0, found {found}")


def embedded(vectors: Iterable[Iterable[float]]) -> None:
    """Of two different texts."""
    one, other = (list(vector) for vector in vectors)
    expect(len(one) == len(other) > 0 and one != other, f"two different vectors, found {one[:3]}, {other[:3]}")


def refused(ask: Callable[[], object], *words: str) -> None:
    """An error whose text says these words."""
    try:
        found = ask()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        missing = [word for word in words if word.lower() not in text.lower()]
        expect(not missing, f"an error that says {' and '.join(missing)}, found {text}")
    else:
        raise AssertionError(f"expected an error, found {found!r}")
