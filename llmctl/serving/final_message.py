"""``continue_final_message``: where in a rendered chat the text of its last message ends."""

from __future__ import annotations

from typing import Any

from llmctl.errors import RequestError
from llmctl.serving.protocol import ChatRequest

_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Follows the text that is to be continued through the template; transformers' word. Its space shows whether the
template trims messages."""


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
            "continue_final_message: the chat template leaves the last message out", param="continue_final_message"
        )
    return text[:at] if text.startswith(_END_MARK, at) else text[:at].rstrip()
