"""The record that a request leaves, however it ends; the worker is played by the test."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from llmctl.engine.output import TextOutput
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import CapacityError, LlmctlError, QueueFullError, RequestError
from llmctl.serving.embedding_schema import EmbeddingRequest
from llmctl.serving.generation import Generation, RunningSequence, Samples
from llmctl.serving.intake import Prompt
from llmctl.serving.keys import KEY_SCOPE, ServerKeys
from llmctl.serving.observation import Observation
from llmctl.serving.protocol import CompletionRequest
from llmctl.serving.redaction import REDACTED, Redactor
from llmctl.serving.request_record import RequestRecord
from llmctl.serving.responses import TextCount, UsageCount

KEYS = ServerKeys("sk-first,sk-second")


class Observers:
    """Keeps what it is told."""

    def __init__(self, *, want_texts: bool = False) -> None:
        self.want_texts = want_texts
        self.told: list[RequestRecord] = []

    def __bool__(self) -> bool:
        return True

    def tell(self, record: RequestRecord) -> None:
        self.told.append(record)


class Case:
    """One request of the second key, and its record."""

    def __init__(self, *, want_texts: bool = False, id_: str = "mine", **headers: str) -> None:
        self.observers = Observers(want_texts=want_texts)
        scope = {
            "type": "http",
            "path": "/v1/completions",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "state": {"request_id": id_},
            "client": ("10.0.0.7", 1),
            KEY_SCOPE: KEYS.find(b"sk-second"),
        }
        context: Any = SimpleNamespace(observers=self.observers, redactor=Redactor(KEYS), keys=KEYS, names=("m",))
        self.seen = Observation(Request(scope), context)

    def run(self, *ends: FinishReason | None, stream: bool = False, n: int = 1) -> Generation:
        """As many sequences; those that end do so with three tokens."""
        seen = self.seen
        seen.body = CompletionRequest(prompt="x", stream=stream, n=n, priority=2)
        seen.prompts = [Prompt([5, 6], "hi sk-first"), Prompt([7])][: max(1, len(ends) // n)]
        seen.params = SamplingParams(max_tokens=9, temperature=0.5, top_p=0.25)
        seen.usage = TextCount(4) if self.observers.want_texts else UsageCount(4)
        generation = seen.generation = Generation(len(ends), lambda _: None)
        for index, end in enumerate(ends):
            made = RunningSequence(str(index), generation, index, 2, Samples(n, n), 9, None)
            generation.sequences.append(made)
            if end is not None:
                made.scheduled_at, made.first_token, made.last_token = (generation.arrival + s for s in (1, 3, 7))
                made.finish_reason, made.output_tokens = end, 3
                output = TextOutput("", f"text {index}", (1, 2, 3), None, end, None, 3, 1, None, None)
                seen.usage.count(index, output)
                generation.push(index, output)
        return generation

    def end(self, error: BaseException | None = None) -> RequestRecord:
        self.seen.end(error)
        (record,) = self.observers.told
        return record


def test_a_request_that_was_answered() -> None:
    case = Case()
    case.run(FinishReason.STOP, FinishReason.LENGTH, n=2)
    made = case.end()
    assert (made.status, made.error, made.finish_reasons) == (200, None, ("stop", "length"))
    assert (made.request_id, made.tenant, made.endpoint, made.model) == ("mine", "key 1", "/v1/completions", "m")
    assert (made.n, made.max_tokens, made.temperature, made.top_p, made.priority) == (2, 9, 0.5, 0.25, 2)
    assert (made.prompt_tokens, made.cached_tokens, made.output_tokens, made.stream) == (4, 1, 6, False)
    assert (made.prompts, made.outputs) == (None, None)
    moments = made.moments
    seconds = [moments.queue_seconds, moments.ttft_seconds, moments.e2e_seconds, made.itl_seconds]
    assert seconds == pytest.approx([1, 3, 7, 2])
    assert moments.arrival is not None
    assert moments.received <= moments.arrival <= moments.ended


def test_texts_are_there_when_they_are_wanted() -> None:
    case = Case(want_texts=True)
    case.run(FinishReason.STOP, FinishReason.STOP)
    made = case.end()
    assert made.prompts == ("hi sk-first", [7])  # redacted by who writes them: it takes its time
    assert made.outputs == ("text 0", "text 1")


def test_it_is_told_once() -> None:
    case = Case()
    case.run(FinishReason.STOP)
    case.seen.end()
    case.end(RequestError("late"))


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RequestError("x"), 400, "invalid_request_error"),
        (CapacityError("x"), 400, "context_length_exceeded"),
        (QueueFullError("x"), 429, "queue_full"),
        (KeyError("x"), 500, "internal_error"),
        (ClientDisconnect(), None, "client_disconnected"),
        (asyncio.CancelledError(), None, "cancelled"),
    ],
)
def test_a_request_that_was_refused(error: BaseException, status: int | None, said: str) -> None:
    made = Case().end(error)
    assert (made.status, made.error) == (status, said)
    assert (made.stream, made.n, made.prompt_tokens, made.finish_reasons) == (None, None, None, ())
    assert (made.moments.queue_seconds, made.moments.e2e_seconds) == (None, None)
    assert list(made.moments.phases()) == []


@pytest.mark.parametrize(("stream", "status"), [(True, 200), (False, None)])
def test_a_client_that_went_away(stream: bool, status: int | None) -> None:
    case = Case()
    case.run(FinishReason.STOP, None, stream=stream).abort()
    made = case.end()
    assert (made.status, made.error, made.finish_reasons) == (status, "client_disconnected", ("stop", "abort"))
    assert made.moments.last_token is None
    assert made.itl_seconds == pytest.approx(2)


def test_a_client_that_did_not_wait_for_its_embeddings() -> None:
    case = Case()
    generation = case.run(FinishReason.STOP, None)
    case.seen.body = EmbeddingRequest(input=["a", "b"], priority=7)
    generation.abort()
    made = case.end()
    assert (made.status, made.error, made.finish_reasons) == (None, "client_disconnected", ("stop", "abort"))
    assert (made.stream, made.n, made.priority) == (None, None, 7)


def test_a_stream_that_failed() -> None:
    case = Case()
    error = LlmctlError("the engine died")
    error.code = "engine_dead"
    case.run(None, stream=True).fail(error)
    made = case.end()
    assert (made.status, made.error, made.finish_reasons) == (200, "engine_dead", ("error",))
    assert [name for name, _, _ in made.moments.phases()] == ["queue"]


def test_no_key_is_in_a_record() -> None:
    case = Case(id_="x-sk-first/", traceparent="sk-first", tracestate="a=b,c=sk-second,d=e")
    case.run(FinishReason.STOP)
    made = case.end()
    assert made.request_id == f"x-{REDACTED}/"
    assert made.trace_context == {"traceparent": REDACTED, "tracestate": f"a=b,c={REDACTED},d=e"}


def test_a_trace_header_that_is_long_to_search_is_dropped() -> None:
    case = Case(traceparent="a" * 513, tracestate="a=b," * 128)
    case.run(FinishReason.STOP)
    assert case.end().trace_context == {"tracestate": "a=b," * 128}


@pytest.mark.parametrize("n", [0, -1, 129, 10**4000], ids=["0", "-1", "129", "huge"])
def test_a_number_of_samples_that_is_refused_is_not_told(n: int) -> None:
    case = Case()
    case.seen.body = CompletionRequest(prompt="x", n=n, priority=2)
    made = case.end(RequestError("n"))
    assert (made.n, made.priority, made.stream) == (None, 2, False)


def test_an_observer_that_fails_harms_no_request(caplog: pytest.LogCaptureFixture) -> None:
    case = Case()
    case.observers.tell = lambda _: 1 / 0  # type: ignore[assignment,method-assign]
    case.seen.end()
    assert "the record of a request is lost" in caplog.text
