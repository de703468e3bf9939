"""The HTTP app: all endpoints, the gates in front of them, errors in their paths' shapes. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmctl import __version__
from llmctl.errors import RequestError
from llmctl.serving import adapters_api, api, live
from llmctl.serving.addresses import Addresses, parse_origins
from llmctl.serving.body import build_models, parse, parse_outlined
from llmctl.serving.context import ServerContext, context_of
from llmctl.serving.exchange import RoomGate
from llmctl.serving.final_message import settle_prefill
from llmctl.serving.http_metrics import HttpMetrics
from llmctl.serving.lifecycle import EngineState
from llmctl.serving.messages_api import api as messages_api
from llmctl.serving.middleware import ApiKeyGate, BodyGate
from llmctl.serving.openai_errors import RETRY_SOON, install_handlers, json_response
from llmctl.serving.outline import Outline
from llmctl.serving.page import Page
from llmctl.serving.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from llmctl.serving.responses_api import endpoint as responses_api
from llmctl.serving.tgi_api import api as tgi_api

GENERATING = (*api.ROUTES, *responses_api.ROUTES, *messages_api.ROUTES, *tgi_api.ROUTES)
"""Routes of the endpoints that the engine serves."""


def create_app(context: ServerContext) -> Starlette:
    """The app of one server."""
    config = context.config
    gets: dict[str, Callable[..., Any]] = {
        "/health": health,
        "/ready": ready,
        "/version": version,
        "/info": tgi_api.info,
        "/tokenizer_info": tokenizer_info,
        "/metrics": metrics,
        "/v1/models": models,
        "/v1/models/{name:path}": model,
        "/requests": live.requests,
        "/engine": live.engine,
        "/openapi.json": description,
    }
    other_posts = {
        "/tokenize": tokenize,
        "/detokenize": detokenize,
        "/v1/messages/count_tokens": messages_api.count_tokens,
        "/v1/load_lora_adapter": adapters_api.load,
        "/v1/unload_lora_adapter": adapters_api.unload,
    }
    page = Page() if config.ui else None
    routes = [
        *GENERATING,
        *(Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()),  # and HEAD
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in other_posts.items()),
        *(() if page is None else page.routes),
    ]
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    app.state.context = context
    install_handlers(app)
    posts = frozenset(route.path for route in routes if "POST" in (route.methods or ()))
    generating = frozenset(route.path for route in GENERATING)
    app.add_middleware(RoomGate, context=context, paths=generating)
    app.add_middleware(BodyGate, max_bytes=context.max_body_bytes, paths=posts)
    app.add_middleware(ApiKeyGate, keys=context.keys, public=frozenset() if page is None else page.paths)
    if config.allowed_origins is not None:  # before the keys: a browser asks what it may without one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=parse_origins(config.allowed_origins),
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    app.add_middleware(HttpMetrics, series=context.metrics.http, routes=routes)
    app.add_middleware(Addresses, root_path=config.root_path)
    return app


async def description(request: Request) -> Response:
    """What the API is. Made when it is first asked for, in a thread: it takes a third as long as a start."""
    context = context_of(request)
    async with context.describing:
        if context.description is None:
            await build_models()
            context.description = await asyncio.to_thread(_describe, context)
    return Response(context.description, media_type="application/json")


def _describe(context: ServerContext) -> bytes:
    from llmctl.serving.openapi import describe  # every answer's model

    document = describe(context.names[0], with_keys=bool(context.keys), root_path=context.config.root_path)
    return msgspec.json.encode(document)


async def health(request: Request) -> Response:
    """Liveness: 200 from the first moment, 503 with the reason once the engine is dead."""
    client = context_of(request).client
    state = client.worker.state
    if state is EngineState.DEAD:
        return json_response({"status": "dead", "reason": client.why_not_ready()}, 503, RETRY_SOON)
    return json_response({"status": "ok", "engine": state.value})


async def ready(request: Request) -> Response:
    """Readiness: 200 when a request would be served now, else 503 with the reason."""
    reason = context_of(request).client.why_not_ready()
    if reason is None:
        return json_response({"status": "ready"})
    return json_response({"status": reason.partition(":")[0], "reason": reason}, 503, RETRY_SOON)


async def version(_: Request) -> Response:
    """The version of llmctl."""
    return json_response({"version": __version__})


async def metrics(request: Request) -> Response:
    """Prometheus exposition."""
    text, content_type = await context_of(request).metrics.page()
    return Response(text, headers={"Content-Type": content_type})


def _model_body(context: ServerContext, name: str) -> dict[str, object]:
    adapter = context.client.adapters.find(name)
    body: dict[str, object] = {
        "id": name,
        "object": "model",
        "created": context.created if adapter is None else adapter.created,
        "owned_by": "llmctl",
        "root": context.config.model if adapter is None else str(adapter.path),
        "parent": None if adapter is None else adapter.parent or context.names[0],
    }
    if context.loaded is not None:
        body["max_model_len"] = context.loaded.info.max_model_len
    return body


async def models(request: Request) -> Response:
    """The served model, under each of its names, and its adapters."""
    context = context_of(request)
    names = [*context.names, *(adapter.name for adapter in context.client.adapters)]
    return json_response({"object": "list", "data": [_model_body(context, name) for name in names]})


async def model(request: Request) -> Response:
    """The served model by one of its names, or an adapter."""
    context, name = context_of(request), request.path_params["name"]
    context.check_name(name)
    return json_response(_model_body(context, name))


async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of a chat as its template renders it."""
    context = context_of(request)
    intake = context.model().intake
    data = await request.body()
    outline = Outline(data, TokenizeRequest, TokenizeChatRequest)
    _check_outline(context, outline)
    chat = outline.has("messages")
    if chat and outline.has("prompt"):
        raise RequestError("expected either a prompt or messages, found both", param="messages")
    body: TokenizeRequest | TokenizeChatRequest
    if chat:
        body = await parse_outlined(request, data, outline, TokenizeChatRequest)
        settle_prefill(body, prefills=context.config.prefill_assistant)
    else:
        body = await parse_outlined(request, data, outline, TokenizeRequest)
    context.check_name(body.model)
    ids = await intake.tokenize(body, len(data))
    answer: dict[str, object] = {"count": len(ids), "max_model_len": intake.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = await intake.token_texts(ids)
    return json_response(answer)


def _check_outline(context: ServerContext, outline: Outline) -> None:
    context.check_name(outline.text("model"))
    context.model().intake.limits.check(outline)


async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's configuration, with the chat template that is served."""
    return json_response(context_of(request).model().intake.tokenizer_info())


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    context = context_of(request)
    intake = context.model().intake
    body = await parse(request, DetokenizeRequest, partial(_check_outline, context))
    context.check_name(body.model)
    return json_response({"prompt": await intake.detokenize(body)})
