"""schemathesis against the real server: what its description allows is served, what it forbids is refused with 400.

Requests are made from the description of a server for the tiny model; that the server serves this very description is
tested in test_serve_openapi.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from documented_refusals import DOCUMENTED
from fixtures import ServerProcess
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CheckContext
from schemathesis.config import SchemathesisConfig

from llmctl.serving.openapi import describe

MODEL = "tiny-llama"
KEY = "a-key"
VOCABULARY = 384
MAX_MODEL_LEN = 512
MOST_TOKENS = 4
GENERATES = ("/", "/generate", "/generate_stream")
ID_LISTS = ("prompt", "input", "tokens", "stop_token_ids", "allowed_token_ids")


def loaded(*, with_keys: bool, examples: int, coverage: bool) -> Any:
    """The description, for so many random requests an operation; with ``coverage``, for every value at a bound too."""
    config = SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "generation": {"max-examples": examples, "deterministic": True, "database": "none"},
            "phases": {"coverage": {"enabled": coverage}},
            "checks": {
                # 404: another model's name. 405 and 415: requests that are wrong beside their bodies.
                "negative_data_rejection": {"expected-statuses": [400, 401, 404, 405, 415]},
                "positive_data_acceptance": {"enabled": False},  # only_documented_refusals is stricter
            },
        }
    )
    return schemathesis.openapi.from_dict(describe(MODEL, with_keys=with_keys), config=config)


def make_affordable(case: Any) -> None:
    """Make a request short, and for this model; a valid one also agree with itself. What is out of bounds stays."""
    if case.meta.generation.mode.is_positive:
        case.body = without_fractions(case.body)
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = MODEL
    for name in ID_LISTS:
        if name in body:
            body[name] = in_vocabulary(body[name])
    path = case.operation.path
    if "completions" in path or path == "/v1/messages":
        for name in [name for name in ("max_tokens", "max_completion_tokens") if name in body] or ["max_tokens"]:
            body[name] = fewer(body.get(name))
    if path in GENERATES and isinstance(parameters := body.setdefault("parameters", {}), dict):
        parameters["max_new_tokens"] = fewer(parameters.get("max_new_tokens"))
    if case.meta.generation.mode.is_positive:
        agree(body)


def without_fractions(value: Any) -> Any:
    """5 for 5.0, which JSON Schema takes for an integer and the server, as its description says, does not."""
    if isinstance(value, dict):
        return {name: without_fractions(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_fractions(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def in_vocabulary(value: Any) -> Any:
    """Token ids of the model for token ids of any."""
    if isinstance(value, list):
        return [in_vocabulary(item) for item in value]
    return value % VOCABULARY if type(value) is int and value >= VOCABULARY else value


def fewer(value: Any) -> Any:
    """A number of tokens that is quickly made for one that could be served; None would be all that fit."""
    return MOST_TOKENS if value is None or (type(value) is int and MOST_TOKENS < value < MAX_MODEL_LEN) else value


def agree(body: dict[str, Any]) -> None:
    """Mend what only two fields together make wrong, or few requests would reach the engine."""
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if body.get("best_of") is not None:
        body["best_of"] = body.get("n") or 1
    if body.get("min_tokens") is not None:
        body["min_tokens"] = min(body["min_tokens"], MOST_TOKENS)
    for message in body.get("messages", ()):
        if message.get("content") is None:
            message["content"] = "a"


def only_documented_refusals(_: CheckContext, response: Any, case: Any) -> None:
    """A valid request is served, or refused for a reason that the description gives in words."""
    if case.meta.generation.mode.is_positive and response.status_code == 400:
        error = response.json()["error"]
        message = error if isinstance(error, str) else error["message"]
        assert DOCUMENTED.search(message), message


def check(case: Any, server: ServerProcess, session: requests.Session, **options: Any) -> None:
    """Send a request, and hold the answer against all checks of schemathesis, and ours."""
    make_affordable(case)
    case.call_and_validate(
        base_url=server.url, session=session, additional_checks=[only_documented_refusals], timeout=60, **options
    )


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


some = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate)
)
few = loaded(with_keys=False, examples=6, coverage=False)
many = loaded(with_keys=False, examples=400, coverage=True)
keyed = loaded(with_keys=True, examples=100, coverage=True)


@few.parametrize()
@some
def test_the_server_does_as_it_says(case: Any, server: ServerProcess, session: requests.Session) -> None:
    check(case, server, session)


@pytest.mark.slow
@many.parametrize()
@some
def test_the_server_does_as_it_says_at_length(case: Any, server: ServerProcess, session: requests.Session) -> None:
    check(case, server, session)


@pytest.fixture(scope="module")
def server_with_keys(tiny_engine: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--model", str(tiny_engine), "--max-num-seqs", "128", "--api-key", KEY) as process:
        process.wait_ready()
        yield process


@pytest.mark.slow
@keyed.parametrize()
@some
def test_a_server_with_keys_does_as_it_says(
    case: Any, server_with_keys: ServerProcess, session: requests.Session
) -> None:
    """The checks themselves leave the key out and send wrong ones."""
    check(case, server_with_keys, session, headers={"Authorization": f"Bearer {KEY}"})
