"""Answers that go on with a chat's last message: which do, and where in a rendered chat that message's text ends."""

from __future__ import annotations

from typing import Any

from llmctl.errors import RequestError
from llmctl.serving.protocol import ChatRequest
from llmctl.serving.tools.history import joined

_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Follows the text that is to be continued through the template; transformers' word. Its space shows whether the
template trims messages."""


def settle_prefill(body: ChatRequest, *, prefills: bool) -> None:
    """Set ``continue_final_message`` of a chat that ends with a text of the assistant's and does not say whether that
    is to be continued.

    Args:
        prefills: it is (llama.cpp's ``--prefill-assistant``); else a new message is asked for.
    """
    last = body.messages[-1]
    said = {"continue_final_message", "add_generation_prompt"} & body.model_fields_set
    if not prefills or said or last.role != "assistant" or last.tool_calls or last.function_call is not None:
        return
    if isinstance(last.content, list):
        body.continue_final_message = any(part.text or part.refusal for part in last.content)
    else:
        body.continue_final_message = bool(last.content)


def continued_text(body: ChatRequest) -> str | None:
    """The text of a chat's last message, if the answer goes on with it.

    Raises:
        RequestError: content that is not text.
    """
    if not body.continue_final_message:
        return None
    return joined(body.messages[-1].content or "", f"messages[{len(body.messages) - 1}].content")


def mark_end(message: dict[str, Any], body: ChatRequest) -> None:
    """Mark the end of the text of a chat's last message, before it is rendered.

    Raises:
        RequestError: there is no text, or a prompt for another message is asked for too.
    """
    if body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        raise RequestError(
            "continue_final_message: a prompt for a new message is asked for too",
            fix="set add_generation_prompt to false",
            param="continue_final_message",
        )
    if not message["content"]:
        raise RequestError("continue_final_message: the last message is empty", param="continue_final_message")
    message["content"] += _END_MARK


def up_to_mark(text: str) -> str:
    """A rendered chat up to the end of its last message's text, trimmed if the template trims.

    Raises:
        RequestError: the template left that message out.
    """
    at = text.rfind(_END_MARK.rstrip())
    if at < 0:
        raise RequestError(
            "continue_final_message: the chat template leaves the last message out",
            fix="set continue_final_message to false for a new message",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(_END_MARK, at) else text[:at].rstrip()
