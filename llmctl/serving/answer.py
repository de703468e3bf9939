"""What a response is written by: one class a kind of response, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

from starlette.responses import Response

from llmctl.engine.output import TextOutput
from llmctl.errors import LlmctlError
from llmctl.serving.context import Model
from llmctl.serving.generation import Generation
from llmctl.serving.openai_errors import body_of, json_response
from llmctl.serving.protocol import SamplingFields
from llmctl.serving.responses import DONE_EVENT, Envelope, UsageCount, event, usage_member
from llmctl.serving.text_workers import TextWorkers

Written = TypeVar("Written")

# What writing a log-probability takes, by the measure of ``TextWorkers``.
_BYTES_PER_LOGPROB = 4


class Writer:
    """What every kind of response is written by: how finished outputs become a document, and running ones events.

    Args:
        workers: write what takes long; for responses with scores of prompts.

    Attributes:
        usage: its tokens so far. headers: beside those that every response has.
        scores_prompts: outputs have log-probabilities of prompts.
    """

    scores_prompts = False

    def __init__(self, usage: UsageCount, workers: TextWorkers | None = None) -> None:
        self.usage = usage
        self.headers: dict[str, str] = {}
        self._workers = workers

    def warn(self, *said: str | None) -> None:
        """Tell the client, in a header, of what was asked for and not done; None: nothing."""
        if told := "; ".join(filter(None, said)):
            self.headers["X-Llmctl-Warning"] = told

    def document(self, outputs: list[TextOutput]) -> Any:
        """The document of all outputs, which are counted; of fewer than were asked for once the client has gone."""
        raise NotImplementedError

    def events(self, index: int, output: TextOutput) -> bytes:
        """The events of one delta of a stream, which is counted."""
        raise NotImplementedError

    def end(self) -> bytes:
        """The events after the last delta."""
        return b""

    def failure(self, error: LlmctlError) -> bytes:
        """The events that end a stream in an error."""
        raise NotImplementedError

    async def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        """All events; an error after the beginning is an event of its own."""
        try:
            async for batch in generation:
                for index, output in batch:
                    self.usage.count(index, output)
                if self.scores_prompts:
                    data = await self._written([output for _, output in batch], partial(self._events, batch))
                else:
                    data = self._events(batch)
                if data:
                    yield data
            last = self.end()
        except LlmctlError as error:
            last = self.failure(error)
        if last:
            yield last

    def _events(self, batch: list[tuple[int, TextOutput]]) -> bytes:
        return b"".join([self.events(index, output) for index, output in batch])

    async def response(self, outputs: list[TextOutput]) -> Response:
        """The response that is not streamed."""
        return await self._written(outputs, lambda: json_response(self.whole(outputs), headers=self.headers))

    def whole(self, outputs: list[TextOutput]) -> Any:
        """The document of a response that is not streamed."""
        for index, output in enumerate(outputs):
            self.usage.count(index, output)
        return self.document(outputs)

    async def _written(self, outputs: list[TextOutput], write: Callable[[], Written]) -> Written:
        """What ``write`` makes of outputs; in a thread if that is much."""
        scores = [output.prompt_scores for output in outputs if output.prompt_scores is not None]
        if self._workers is None or not scores:
            return write()
        size = sum(len(s) * (1 + s.top_ids.shape[1]) for s in scores) * _BYTES_PER_LOGPROB
        return await self._workers.finish(size, write)


class Answer(Writer):
    """OpenAI's choices: how a finished delta becomes one, and how a running one becomes events."""

    def __init__(self, model: Model, envelope: Envelope, usage: UsageCount, samples: int, body: SamplingFields) -> None:
        super().__init__(usage, model.intake.workers)
        self.tokenizer = model.intake.tokenizer
        self.prompt_logprobs = body.prompt_logprobs
        self.scores_prompts = body.prompt_logprobs is not None
        self.as_ids = bool(body.return_tokens_as_token_ids)
        self.envelope = envelope
        self.samples = samples
        options = body.stream_options
        self.include_usage = options is not None and options.include_usage
        self.continuous_usage = options is not None and options.continuous_usage_stats

    def choice(self, index: int, output: TextOutput) -> dict[str, Any]:
        """A choice of the whole response."""
        raise NotImplementedError

    def usage_body(self) -> dict[str, Any]:
        """OpenAI's ``usage`` so far."""
        return self.usage.body(self.samples)

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """One event with one choice."""
        if not self.include_usage:
            return self.envelope.chunk(choice)
        return self.envelope.chunk(choice, usage_member(self.usage_body() if self.continuous_usage else None))

    def end(self) -> bytes:
        """The usage, if it is asked for, and ``[DONE]``."""
        usage = event(self.envelope.body([], usage=self.usage_body())) if self.include_usage else b""
        return usage + DONE_EVENT

    def failure(self, error: LlmctlError) -> bytes:
        """The error, and ``[DONE]``."""
        return event(body_of(error)) + DONE_EVENT

    def document(self, outputs: list[TextOutput]) -> dict[str, Any]:
        """The choices in their envelope."""
        choices = [self.choice(index, output) for index, output in enumerate(outputs)]
        return self.envelope.body(choices, usage=self.usage_body())
