"""The endpoints ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmctl.serving.body import parse
from llmctl.serving.context import Model, context_of
from llmctl.serving.error_shapes import MESSAGES
from llmctl.serving.exchange import answer_chat, check_single, counted
from llmctl.serving.intake import Prompt
from llmctl.serving.messages_api.protocol import CountTokensRequest, MessagesRequest
from llmctl.serving.messages_api.translate import chat_request, notes, tokenize_request
from llmctl.serving.messages_api.writer import MessagesWriter
from llmctl.serving.openai_errors import json_response, request_id_of
from llmctl.serving.protocol import ChatCompletionRequest
from llmctl.serving.responses import UsageCount
from llmctl.serving.tools.message import MessageReader
from llmctl.serving.tools.support import ToolUse


async def messages(request: Request) -> Response:
    """Answer a conversation."""
    context = context_of(request)
    with counted(request, context) as seen:
        body = await parse(request, MessagesRequest, partial(check_single, context))

        def write(model: Model, prompt: Prompt, _: int, chat: ChatCompletionRequest, use: ToolUse) -> MessagesWriter:
            parser = use.parser(prompt.text)
            writer = MessagesWriter(
                model.name,
                body.max_tokens,
                UsageCount(len(prompt.token_ids)),
                None if parser is None else MessageReader(parser, use),
                use.support.row.id_length,
                request_id_of(request.scope),
            )
            writer.warn(model.intake.tools.warning(chat, use), *notes(body, model.intake.tools))
            return writer

        return await answer_chat(seen, chat_request(body), write)


async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of a conversation has."""
    context = context_of(request)
    intake = context.model().intake
    body = await parse(request, CountTokensRequest, intake.limits.check)
    context.check_name(body.model)
    ids = await intake.tokenize(tokenize_request(body), len(await request.body()))
    return json_response({"input_tokens": len(ids)}, headers=MESSAGES.headers(request_id_of(request.scope)))


ROUTES = (Route("/v1/messages", messages, methods=["POST"]),)
"""Of the endpoint that generates."""
