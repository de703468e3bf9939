"""The endpoints ``/generate``, ``/generate_stream``, ``POST /`` and ``/info``."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmctl import __version__
from llmctl.engine.sampling_params import MAX_SAMPLES, MAX_STOP_STRINGS
from llmctl.serving.body import parse
from llmctl.serving.context import Model, context_of
from llmctl.serving.exchange import answer_completion, check_single, counted
from llmctl.serving.intake import Prompt
from llmctl.serving.openai_errors import json_response
from llmctl.serving.protocol import CompletionRequest
from llmctl.serving.tgi_api.protocol import (
    CompatGenerateRequest,
    GenerateBody,
    GenerateRequest,
    GenerateStreamRequest,
)
from llmctl.serving.tgi_api.translate import (
    check_parameters,
    completion_request,
    parameters_of,
    wants_stream,
)
from llmctl.serving.tgi_api.writer import TgiWriter


async def generate(request: Request) -> Response:
    """Continue a text."""
    return await _generate(request, GenerateRequest)


async def generate_stream(request: Request) -> Response:
    """Continue a text, as a stream."""
    return await _generate(request, GenerateStreamRequest)


async def compat_generate(request: Request) -> Response:
    """Continue a text, as a stream if the request says so."""
    return await _generate(request, CompatGenerateRequest)


async def _generate(request: Request, kind: type[GenerateBody]) -> Response:
    context = context_of(request)
    with counted(request, context) as seen:
        body = await parse(request, kind, partial(check_single, context))
        given = parameters_of(body)
        stream = wants_stream(body)
        check_parameters(given, stream=stream)

        def write(model: Model, prompts: list[Prompt], _: int, __: CompletionRequest) -> TgiWriter:
            listed = isinstance(body, CompatGenerateRequest)
            return TgiWriter(model, prompts[0], given, body.inputs, listed=listed)

        prompt = await _prompt(request, body, given.truncate)
        return await answer_completion(seen, completion_request(prompt, given, stream=stream), write)


async def _prompt(request: Request, body: GenerateBody, truncate: int | None) -> str | list[int]:
    """The inputs, or the tokens that are left of them."""
    if truncate is None:
        return body.inputs
    return await context_of(request).model().intake.last_tokens(body.inputs, truncate)


async def info(request: Request) -> Response:
    """The served model and its limits."""
    context = context_of(request)
    facts = context.model().info
    return json_response(
        {
            "model_id": context.names[0],
            "model_sha": None,
            "model_dtype": facts.dtype,
            "model_device_type": facts.target,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": facts.max_num_seqs + context.config.max_num_queued_reqs,
            "max_best_of": MAX_SAMPLES,
            "max_stop_sequences": MAX_STOP_STRINGS,
            "max_input_tokens": facts.max_model_len - 1,
            "max_total_tokens": facts.max_model_len,
            "max_client_batch_size": 1,
            "router": "llmctl",
            "version": __version__,
            "sha": None,
            "docker_label": None,
        }
    )


ROUTES = (
    Route("/generate", generate, methods=["POST"]),
    Route("/generate_stream", generate_stream, methods=["POST"]),
    Route("/", compat_generate, methods=["POST"]),
)
"""Of the endpoints that generate."""
