"""The OpenAI endpoints that generate: ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response
from starlette.types import Receive

from llmctl.engine.deadline import Deadline
from llmctl.engine.output import TextOutput
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import LlmctlError, RequestError
from llmctl.serving.context import Model, ServerContext, context_of
from llmctl.serving.event_stream import EventStream, started
from llmctl.serving.generation import Generation, SequenceSpec
from llmctl.serving.intake import Prompt
from llmctl.serving.logprobs import chat_logprobs, completion_logprobs, echoed_positions, prompt_logprobs
from llmctl.serving.observation import Observation
from llmctl.serving.openai_errors import body_of, from_validation_error, json_response
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import ApiModel, ChatCompletionRequest, CompletionRequest, SamplingFields
from llmctl.serving.responses import (
    DONE_EVENT,
    Envelope,
    TextCount,
    UsageCount,
    event,
    usage_member,
)
from llmctl.serving.tenants import check_precedence, deadline_of, tenant_of
from llmctl.serving.tools.message import MessageReader
from llmctl.serving.tools.support import ToolUse

log = logging.getLogger("llmctl.serving")

Body = TypeVar("Body", bound=ApiModel)
Written = TypeVar("Written")
router = APIRouter()

MOST_FIELDS_SHOWN, MOST_NAME_SHOWN = 20, 80  # in the log, of those that a request has and no one knows
# What writing a log-probability takes, by the measure of ``TextWorkers``.
_BYTES_PER_LOGPROB = 4


async def parse(request: Request, model: type[Body], check: Callable[[Outline], None]) -> Body:
    """The request's body as ``model``. ``check`` is given its outline before, and may refuse it.

    Raises:
        RequestError: not JSON, wrong types, missing fields.
    """
    data = await request.body()
    outline = Outline(data)
    check(outline)
    return parsed(data, outline, model)


def parsed(data: bytes, outline: Outline, model: type[Body]) -> Body:
    """A body as ``model``.

    Raises:
        RequestError: not JSON, wrong types, missing fields.
    """
    try:
        body = model.model_validate_json(data)
    except ValidationError as error:
        raise from_validation_error(error) from None
    if outline.problem is not None:  # NaN and Infinity, which pydantic reads: nothing of this body has been counted
        raise RequestError(f"the request body is not valid JSON: {outline.problem}")
    if body.model_extra:
        shown = ", ".join(map(_shown, islice(body.model_extra, MOST_FIELDS_SHOWN)))
        log.debug("ignored %d unknown request fields: %s", len(body.model_extra), shown)
    return body


def _shown(name: str) -> str:
    """A client's word on one line of a log; whole or not at all, for a part of a key would not be found."""
    return name if len(name) <= MOST_NAME_SHOWN and name.isprintable() else f"[{len(name)} characters]"


async def _abort_on_disconnect(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.abort()


def _sequences(
    prompts: list[Prompt], params: SamplingParams, body: SamplingFields, deadline: Deadline
) -> list[SequenceSpec]:
    samples = params.samples()
    return [
        SequenceSpec(prompt.token_ids, sample, body.priority or 0, body.cache_salt, params.n, deadline)
        for prompt in prompts
        for sample in samples
    ]


class Answer:
    """One kind of response: how a finished delta becomes a choice, and how a running one becomes events."""

    def __init__(self, model: Model, envelope: Envelope, usage: UsageCount, samples: int, body: SamplingFields) -> None:
        self.tokenizer = model.intake.tokenizer
        self.prompt_logprobs = body.prompt_logprobs
        self.scores_prompts = body.prompt_logprobs is not None
        self.as_ids = bool(body.return_tokens_as_token_ids)
        self._workers = model.intake.workers
        self.envelope = envelope
        self.usage = usage
        self.samples = samples
        self.headers: dict[str, str] = {}
        options = body.stream_options
        self.include_usage = options is not None and options.include_usage
        self.continuous_usage = options is not None and options.continuous_usage_stats

    def choice(self, index: int, output: TextOutput) -> dict[str, Any]:
        """A choice of the whole response."""
        raise NotImplementedError

    def events(self, index: int, output: TextOutput) -> bytes:
        """The events of one delta of a stream."""
        raise NotImplementedError

    def usage_body(self) -> dict[str, Any]:
        """OpenAI's ``usage`` so far."""
        return self.usage.body(self.samples)

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """One event with one choice."""
        if not self.include_usage:
            return self.envelope.chunk(choice)
        return self.envelope.chunk(choice, usage_member(self.usage_body() if self.continuous_usage else None))

    async def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        """All events, to ``[DONE]``; an error after the beginning is an event of its own."""
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
            if self.include_usage:
                yield event(self.envelope.body([], usage=self.usage_body()))
        except LlmctlError as error:
            yield event(body_of(error))
        yield DONE_EVENT

    def _events(self, batch: list[tuple[int, TextOutput]]) -> bytes:
        return b"".join([self.events(index, output) for index, output in batch])

    async def response(self, outputs: list[TextOutput]) -> Response:
        """The response that is not streamed."""
        return await self._written(outputs, lambda: json_response(self.whole(outputs), headers=self.headers))

    def whole(self, outputs: list[TextOutput]) -> dict[str, Any]:
        """The document of a response that is not streamed."""
        for index, output in enumerate(outputs):
            self.usage.count(index, output)
        choices = [self.choice(index, output) for index, output in enumerate(outputs)]
        return self.envelope.body(choices, usage=self.usage_body())

    async def _written(self, outputs: list[TextOutput], write: Callable[[], Written]) -> Written:
        """What ``write`` makes of outputs; in a thread if that is much."""
        scores = [output.prompt_scores for output in outputs if output.prompt_scores is not None]
        size = sum(len(s) * (1 + s.top_ids.shape[1]) for s in scores) * _BYTES_PER_LOGPROB
        return await self._workers.finish(size, write)


class CompletionAnswer(Answer):
    """``text_completion``."""

    def __init__(self, model: Model, prompts: list[Prompt], samples: int, body: CompletionRequest) -> None:
        usage = UsageCount(sum(len(p.token_ids) for p in prompts))
        super().__init__(model, Envelope.new("cmpl", "text_completion", model.name), usage, samples, body)
        self._prompts = prompts
        self._echo = bool(body.echo)
        self._logprobs = body.logprobs
        self.scores_prompts |= self._echo and body.logprobs is not None
        self._begun: set[int] = set()

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index // self.samples]

    def choice(self, index: int, output: TextOutput) -> dict[str, Any]:
        choice = self._choice(index, output, echoes=self._echo)
        if self.prompt_logprobs is not None and output.prompt_scores is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self.tokenizer, self._prompt(index), output.prompt_scores, self.prompt_logprobs
            )
        return choice

    def events(self, index: int, output: TextOutput) -> bytes:
        choice = self._choice(index, output, echoes=self._echo and index not in self._begun)
        self._begun.add(index)
        if not choice["text"] and choice["finish_reason"] is None and choice["logprobs"] is None:
            return b""
        return self.chunk(choice)

    def _choice(self, index: int, output: TextOutput, *, echoes: bool) -> dict[str, Any]:
        """What output adds to a choice; with its prompt if it ``echoes``."""
        return {
            "index": index,
            "text": (self._prompt(index).text or "") + output.text if echoes else output.text,
            "logprobs": self._logprobs_of(index, output, echoes),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _logprobs_of(self, index: int, output: TextOutput, echoes: bool) -> dict[str, list[Any]] | None:
        scores = output.prompt_scores if echoes else None
        if self._logprobs is None or (scores is None and output.logprobs is None):
            return None
        prompt = self._prompt(index)
        start = len(prompt.text or "") if self._echo else 0
        body = completion_logprobs(output.logprobs or (), self.as_ids, start)
        if scores is None:
            return body
        before = completion_logprobs(echoed_positions(self.tokenizer, prompt, scores, self._logprobs), self.as_ids)
        return {name: before[name] + body[name] for name in body}


class ChatAnswer(Answer):
    """``chat.completion`` and ``chat.completion.chunk``."""

    def __init__(self, model: Model, prompt: Prompt, samples: int, body: ChatCompletionRequest, use: ToolUse) -> None:
        """Each choice has a reader where there is something to take apart."""
        object_ = "chat.completion.chunk" if body.stream else "chat.completion"
        usage = UsageCount(len(prompt.token_ids))
        super().__init__(model, Envelope.new("chatcmpl", object_, model.name), usage, samples, body)
        self._prompt = prompt
        self._begun: set[int] = set()
        if (warning := model.intake.tools.warning(body, use)) is not None:
            self.headers["X-Llmctl-Warning"] = warning
        parsers = [use.parser(prompt.text) for _ in range(samples)]
        self._readers = [MessageReader(parser, use) for parser in parsers if parser is not None]

    def choice(self, index: int, output: TextOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        reason: str | None = output.finish_reason
        if self._readers:
            message = self._readers[index].message(output)
            reason = self._readers[index].finish_reason(reason)
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(output.logprobs, self.as_ids),
            "finish_reason": reason,
            "stop_reason": output.stop_reason,
        }

    def events(self, index: int, output: TextOutput) -> bytes:
        data = b""
        if index not in self._begun:
            self._begun.add(index)
            data += self._delta(index, {"role": "assistant", "content": None if self._readers else ""})
        logprobs = chat_logprobs(output.logprobs, self.as_ids)
        reason: str | None = output.finish_reason
        if self._readers:
            deltas = list(self._readers[index].deltas(output))
            reason = self._readers[index].finish_reason(reason)
        else:
            deltas = [{"content": output.text}] if output.text else []
        if not deltas and logprobs is not None and output.token_ids:
            deltas = [{} if self._readers else {"content": ""}]
        if not deltas and output.finish_reason is not None:
            deltas = [{}]
        for delta in deltas:
            # The end comes with the last of them: a chunk of its own would count as a token for who times tokens by
            # chunks.
            last = delta is deltas[-1]
            data += self._delta(index, delta, logprobs, reason if last else None, output.stop_reason)
            logprobs = None
        return data

    def whole(self, outputs: list[TextOutput]) -> dict[str, Any]:
        body = super().whole(outputs)
        scores = outputs[0].prompt_scores if outputs else None
        if self.prompt_logprobs is not None and scores is not None:
            body["prompt_logprobs"] = prompt_logprobs(self.tokenizer, self._prompt, scores, self.prompt_logprobs)
        return body

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if finish_reason is not None:
            choice["stop_reason"] = stop_reason
        return self.chunk(choice)


def _check_outline(context: ServerContext, outline: Outline) -> None:
    context.client.check_room(outline.sequences())
    context.model().intake.check_outline(outline)


def _check_options(request: Request, context: ServerContext, body: SamplingFields) -> Deadline:
    """Refuse what can be refused before the prompt is looked at; the request's deadline."""
    context.check_name(body.model)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: only with stream", param="stream_options")
    check_precedence(request, body, context.config, context.keys)
    return deadline_of(body, context.deadline)


async def _respond(seen: Observation, body: SamplingFields, specs: list[SequenceSpec], answer: Answer) -> Response:
    request, context = seen.request, seen.context
    if context.observers.want_texts:
        answer.usage = TextCount(answer.usage.prompt_tokens)
    seen.usage, seen.params = answer.usage, specs[0].params
    generation = seen.generation = context.client.generate(specs, tenant_of(request, body, context.keys))
    watcher = asyncio.create_task(_abort_on_disconnect(request.receive, generation))
    try:
        if body.stream:
            # The status line waits for the first output, so that a refusal by the scheduler has its own status; but
            # not for long, or a proxy takes the silence for a dead server.
            seconds = context.config.sse_keepalive
            keep_alive = None if await started(generation, seconds) else seconds
            return EventStream(answer.stream(generation), generation, watcher, seen.end, keep_alive, answer.headers)
        outputs = await generation.result()
    except BaseException:
        watcher.cancel()
        generation.abort()
        raise
    watcher.cancel()
    response = await answer.response(outputs)
    seen.end()
    return response


@contextlib.contextmanager
def _counted(request: Request, context: ServerContext) -> Iterator[Observation]:
    """Observe a request, and count a refusal under its reason."""
    seen = Observation(request, context)
    try:
        yield seen
    except BaseException as error:
        if isinstance(error, LlmctlError):
            context.metrics.rejected(error.code or "invalid_request")
        seen.end(error)
        raise


@router.post("/v1/completions", response_model=None)
async def completions(request: Request) -> Response:
    """Continue a text."""
    context = context_of(request)
    with _counted(request, context) as seen:
        model = context.model()
        seen.body = body = await parse(request, CompletionRequest, lambda outline: _check_outline(context, outline))
        deadline = _check_options(request, context, body)
        context.client.check_room(model.intake.num_sequences(body))
        params = await model.intake.completion_params(body)
        seen.prompts = prompts = await model.intake.completion_prompts(body)
        params = model.intake.fit_completion(params, body, prompts)
        answer = CompletionAnswer(model, prompts, params.n, body)
        return await _respond(seen, body, _sequences(prompts, params, body, deadline), answer)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    context = context_of(request)
    with _counted(request, context) as seen:
        model = context.model()
        seen.body = body = await parse(request, ChatCompletionRequest, lambda outline: _check_outline(context, outline))
        deadline = _check_options(request, context, body)
        context.client.check_room(model.intake.num_sequences(body))
        use = model.intake.tools.use(body)
        params = await model.intake.chat_params(body, use)
        prompt = await model.intake.chat_prompt(body, len(await request.body()))
        seen.prompts = [prompt]
        params = model.intake.fit_chat(params, body, prompt)
        answer = ChatAnswer(model, prompt, params.n, body, use)
        return await _respond(seen, body, _sequences([prompt], params, body, deadline), answer)
