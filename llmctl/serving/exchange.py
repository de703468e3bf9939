"""From a parsed request to its response, whatever API it speaks: checks, prompt, sequences, and the answer's writer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llmctl.engine.deadline import Deadline
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import LlmctlError, RequestError
from llmctl.serving.answer import Writer
from llmctl.serving.context import Model, ServerContext
from llmctl.serving.event_stream import EventStream, started
from llmctl.serving.generation import Generation, SequenceSpec
from llmctl.serving.intake import Prompt
from llmctl.serving.observation import Observation
from llmctl.serving.openai_errors import error_response, request_id_of
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import ChatCompletionRequest, CompletionRequest, RequestFields, SamplingFields
from llmctl.serving.responses import TextCount
from llmctl.serving.sampling_fields import check_sampling
from llmctl.serving.tenants import check_precedence, deadline_of, tenant_of
from llmctl.serving.tools.support import ToolUse

WriteChat = Callable[[Model, Prompt, int, ChatCompletionRequest, ToolUse], Writer]
WriteCompletion = Callable[[Model, list[Prompt], int, CompletionRequest], Writer]


@contextlib.contextmanager
def counted(request: Request, context: ServerContext) -> Iterator[Observation]:
    """Observe a request, and count a refusal under its reason."""
    seen = Observation(request, context)
    try:
        yield seen
    except BaseException as error:
        _end(seen, error)
        raise


def _end(seen: Observation, error: BaseException) -> None:
    if isinstance(error, LlmctlError):
        seen.context.metrics.rejected(error.code or "invalid_request")
    seen.end(error)


class RoomGate:
    """Refuses POSTs to ``paths`` while the engine takes none, or its queue has no room for one, before a body is read.

    The endpoints check again, by what the body asks for. This is for bursts: with thousands of connections at once,
    each answer is waited for by all that came after it, ``/health`` among them.
    """

    def __init__(self, app: ASGIApp, context: ServerContext, paths: frozenset[str]) -> None:
        self._app = app
        self._context = context
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._paths:
            try:
                self._context.model()
                self._context.client.check_room(1)
            except LlmctlError as error:
                _end(Observation(Request(scope, receive), self._context), error)
                await error_response(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_outline(
    context: ServerContext,
    outline: Outline,
    sequences: Callable[[Outline], int] = Outline.sequences,
    param: str = "n",
) -> None:
    """Refuse by its outline a request that cannot be served now, or ever.

    Args:
        sequences: how many it asks for. param: the field to blame for too many.

    Raises:
        NotReadyError, QueueFullError, ModelNotFoundError, RequestError.
    """
    model = context.model()
    context.client.check_room(sequences(outline), param)
    context.check_name(outline.text("model"))
    model.intake.limits.check(outline)


def check_generating(context: ServerContext, outline: Outline) -> None:
    """The same of completions and chats.

    Raises:
        NotReadyError, QueueFullError, ModelNotFoundError, RequestError.
    """
    check_outline(context, outline)
    check_sampling(outline)


def check_single(context: ServerContext, outline: Outline) -> None:
    """The same of a request whose API knows neither lists of prompts nor ``n``, and maybe no names of models."""
    model = context.model()
    context.client.check_room(1)
    model.intake.limits.check(outline)


def check_scalars(request: Request, context: ServerContext, body: CompletionRequest | ChatCompletionRequest) -> None:
    """Refuse a completion or a chat by those of its fields that are single values, whatever the others are.

    Raises:
        LlmctlError.
    """
    check_options(request, context, body)
    context.model().intake.check_scalars(body)


def check_options(request: Request, context: ServerContext, body: RequestFields) -> Deadline:
    """The request's deadline, with the server's in what it leaves out.

    Raises:
        LlmctlError: what can be refused before the prompt is looked at.
    """
    context.check_name(body.model)
    if isinstance(body, SamplingFields) and body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: only with stream", param="stream_options")
    check_precedence(request, body, context.config, context.keys)
    return deadline_of(body, context.deadline)


async def answer_completion(seen: Observation, body: CompletionRequest, write: WriteCompletion) -> Response:
    """The response to a completion request.

    Args:
        write: makes its writer of the model, the prompts, the samples of each, and the body.

    Raises:
        LlmctlError: refused.
    """
    context = seen.context
    seen.body, model = body, context.model(body.model)
    deadline = check_options(seen.request, context, body)
    seen.model = model.name
    context.client.check_room(model.intake.num_sequences(body))
    params = await model.intake.completion_params(body)
    seen.prompts = prompts = await model.intake.completion_prompts(body)
    params = model.intake.fit_completion(params, body, prompts)
    answer = write(model, prompts, params.n, body)
    return await _respond(seen, body, _sequences(model, prompts, params, body, deadline), answer)


async def answer_chat(seen: Observation, body: ChatCompletionRequest, write: WriteChat) -> Response:
    """The response to a chat request.

    Args:
        write: makes its writer of the model, the prompt, its samples, the body, and what it asks for of tools.

    Raises:
        LlmctlError: refused.
    """
    context = seen.context
    seen.body, model = body, context.model(body.model)
    deadline = check_options(seen.request, context, body)
    seen.model = model.name
    context.client.check_room(model.intake.num_sequences(body))
    use = model.intake.tools.use(body)
    params = await model.intake.chat_params(body, use)
    prompt = await model.intake.chat_prompt(body, len(await seen.request.body()))
    seen.prompts = [prompt]
    params = model.intake.fit_chat(params, body, prompt, use)
    answer = write(model, prompt, params.n, body, use)
    return await _respond(seen, body, _sequences(model, [prompt], params, body, deadline), answer)


def _sequences(
    model: Model, prompts: list[Prompt], params: SamplingParams, body: SamplingFields, deadline: Deadline
) -> list[SequenceSpec]:
    samples = params.samples()
    return [
        SequenceSpec(
            prompt.token_ids, sample, body.priority or 0, body.cache_salt, params.n, deadline, adapter=model.adapter
        )
        for prompt in prompts
        for sample in samples
    ]


async def _abort_on_disconnect(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.abort()


@contextlib.contextmanager
def submitted(
    seen: Observation, body: RequestFields, specs: list[SequenceSpec]
) -> Iterator[tuple[Generation, asyncio.Task[None]]]:
    """The sequences of a request in the engine, and what drops them when the client goes, to be cancelled by who is
    done with them; an error drops them, too.

    Raises:
        LlmctlError: refused.
    """
    request, context = seen.request, seen.context
    generation = seen.generation = context.client.generate(specs, tenant_of(request, body, context.keys))
    generation.request_id = request_id_of(request.scope)
    watcher = asyncio.create_task(_abort_on_disconnect(request.receive, generation))
    try:
        yield generation, watcher
    except BaseException:
        watcher.cancel()
        generation.abort()
        raise


async def _respond(seen: Observation, body: SamplingFields, specs: list[SequenceSpec], answer: Writer) -> Response:
    context = seen.context
    if context.observers.want_texts:
        answer.usage = TextCount(answer.usage.prompt_tokens)
    seen.usage, seen.params = answer.usage, specs[0].params
    with submitted(seen, body, specs) as (generation, watcher):
        if body.stream:
            # The status line waits until the engine does not refuse the request any more, so that a refusal has its own
            # status; but not for long, or a proxy takes the silence for a dead server.
            seconds = context.config.sse_keepalive
            keep_alive = None if await started(generation, seconds) else seconds
            return EventStream(answer.stream(generation), generation, watcher, seen.end, keep_alive, answer.headers)
        outputs = await generation.result()
    watcher.cancel()
    response = await answer.response(outputs)
    seen.end()
    return response
