"""Tools for models whose chat template knows none: a system message that lists them, calls and results as plain text.

The format asked for is that of the row ``hermes``, which most models have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.text.output_parser.json_text import dump

ROW = "hermes"
_PROMPT = """\
You can call these functions, given as JSON inside <tools></tools>:
<tools>
{tools}
</tools>
To call one, write its name and arguments as JSON inside <tool_call></tool_call>, once for each call:
<tool_call>
{{"name": "<function name>", "arguments": {{<arguments>}}}}
</tool_call>
What a function returns comes inside <tool_response></tool_response>. Without need of a function, just answer."""


def with_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Messages that any template takes which knows the roles system, user and assistant."""
    made = [_plain(message) for message in messages]
    if not tools:
        return made
    prompt = _PROMPT.format(tools="\n".join(dump(tool) for tool in tools))
    if made and made[0]["role"] == "system":
        return [{**made[0], "content": f"{made[0]['content']}\n\n{prompt}"}, *made[1:]]
    return [{"role": "system", "content": prompt}, *made]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = [f"<tool_call>\n{dump(_named(call['function']))}\n</tool_call>" for call in calls]
    return {"role": message["role"], "content": "\n".join([*filter(None, [message["content"]]), *written])}


def _named(function: dict[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function["arguments"]}
