"""``POST /v1/responses``."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmctl.serving.body import parse
from llmctl.serving.context import ServerContext, context_of
from llmctl.serving.exchange import answer_chat, check_single, counted
from llmctl.serving.outline import Outline
from llmctl.serving.responses_api.protocol import ResponsesRequest
from llmctl.serving.responses_api.translate import chat_of, own_names
from llmctl.serving.responses_api.truncation import truncated
from llmctl.serving.responses_api.writer import ResponseWriter


async def create_response(request: Request) -> Response:
    """Answer the input."""
    context = context_of(request)
    with counted(request, context) as seen:
        asked = await parse(request, ResponsesRequest, partial(_check_outline, context))
        with own_names():
            intake = context.model().intake
            if asked.truncation == "auto":
                body = await truncated(asked, intake, len(await request.body()))
            else:
                body = chat_of(asked, intake.tools.traits)
            return await answer_chat(seen, body, partial(ResponseWriter, asked))


def _check_outline(context: ServerContext, outline: Outline) -> None:
    check_single(context, outline)
    context.model().intake.limits.check_items("input", outline.count("input"), "items")


ROUTES = (Route("/v1/responses", create_response, methods=["POST"]),)
"""Of the endpoint that generates."""
