"""``truncation: "auto"``: items are left out from the front of the input until the prompt fits the context.

What stays whatever happens: instructions, messages of the system's and the developer's, the last message of the user's,
and the last item. A call and its results go together.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmctl.errors import CapacityError, RequestError
from llmctl.serving.intake import Intake
from llmctl.serving.protocol import ChatCompletionRequest
from llmctl.serving.responses_api.protocol import FunctionCallItem, FunctionCallOutput, InputItem, ResponsesRequest
from llmctl.serving.responses_api.translate import chat_of
from llmctl.text.template_budget import TemplateLimitError


async def truncated(asked: ResponsesRequest, intake: Intake, body_bytes: int) -> ChatCompletionRequest:
    """The request to chats with the first items left out, as few as need be; with all that may go if that is too long.

    A prompt is made some ten times for hundreds of items. A shortened chat that the template refuses, as one that does
    not begin with the user's message, does not fit.

    Raises:
        RequestError: as ``chat_of``, or the template refuses the whole. QueueFullError.
    """
    whole = chat_of(asked, intake.tools.traits)
    if isinstance(asked.input, str) or await _fits(whole, intake, body_bytes, whole=True):
        return whole
    groups = _droppable(asked.input)
    made = _without(asked, groups, intake)
    least, most = 1, len(groups)
    while least < most:
        middle = (least + most) // 2
        tried = _without(asked, groups[:middle], intake)
        if await _fits(tried, intake, body_bytes):
            made, most = tried, middle
        else:
            least = middle + 1
    return made


async def _fits(body: ChatCompletionRequest, intake: Intake, body_bytes: int, *, whole: bool = False) -> bool:
    try:
        prompt = await intake.chat_prompt(body, body_bytes)
    except RequestError as error:
        too_long = isinstance(error, CapacityError) or isinstance(error.__cause__, TemplateLimitError)
        if whole and not too_long:
            raise
        return False
    return len(prompt.token_ids) + max(1, body.max_completion_tokens or 1) <= intake.max_model_len


def _droppable(items: Sequence[InputItem]) -> list[set[int]]:
    """Indices of items that may go, in the order in which they go; those of a group go together."""
    users = [i for i, item in enumerate(items) if _role(item) == "user"]
    kept = {*users[-1:], len(items) - 1, *(i for i, item in enumerate(items) if _role(item) in ("system", "developer"))}
    groups: list[set[int]] = []
    by_call: dict[str, set[int]] = {}
    for index, item in enumerate(items):
        if isinstance(item, FunctionCallItem | FunctionCallOutput) and item.call_id in by_call:
            by_call[item.call_id].add(index)
            continue
        groups.append(group := {index})
        if isinstance(item, FunctionCallItem):
            by_call[item.call_id] = group
    return [group for group in groups if not group & kept]


def _role(item: InputItem) -> str | None:
    return getattr(item, "role", None)


def _without(asked: ResponsesRequest, groups: Sequence[set[int]], intake: Intake) -> ChatCompletionRequest:
    gone = set().union(*groups)
    items = [item for index, item in enumerate(asked.input) if index not in gone]
    return chat_of(asked.model_copy(update={"input": items}), intake.tools.traits)
