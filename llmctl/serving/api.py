"""The OpenAI endpoints that need the engine: ``/v1/completions``, ``/v1/chat/completions``, ``/v1/embeddings``."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmctl.serving.body import parse
from llmctl.serving.chat_answer import ChatAnswer
from llmctl.serving.completion_answer import CompletionAnswer
from llmctl.serving.context import context_of
from llmctl.serving.embedding_schema import EmbeddingRequest
from llmctl.serving.embeddings import answer_embeddings, check_inputs
from llmctl.serving.exchange import (
    answer_chat,
    answer_completion,
    check_generating,
    check_options,
    check_scalars,
    counted,
)
from llmctl.serving.final_message import settle_prefill
from llmctl.serving.protocol import ChatCompletionRequest, CompletionRequest


async def completions(request: Request) -> Response:
    """Continue a text."""
    context = context_of(request)
    with counted(request, context) as seen:
        scalars = partial(check_scalars, request, context)
        body = await parse(request, CompletionRequest, partial(check_generating, context), scalars)
        return await answer_completion(seen, body, CompletionAnswer)


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    context = context_of(request)
    with counted(request, context) as seen:
        scalars = partial(check_scalars, request, context)
        body = await parse(request, ChatCompletionRequest, partial(check_generating, context), scalars)
        settle_prefill(body, prefills=context.config.prefill_assistant)
        return await answer_chat(seen, body, ChatAnswer)


async def embeddings(request: Request) -> Response:
    """Texts as vectors."""
    context = context_of(request)
    with counted(request, context) as seen:
        options = partial(check_options, request, context)
        body = await parse(request, EmbeddingRequest, partial(check_inputs, context), options)
        return await answer_embeddings(seen, body)


ROUTES = (
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
)
"""Of the endpoints that generate."""
