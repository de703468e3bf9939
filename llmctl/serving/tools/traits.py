"""What a chat template does with tools, found out by rendering a conversation that has some; and with reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmctl.errors import RequestError
from llmctl.text.chat_template import ChatTemplate

_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_function",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}
_ASKED = [{"role": "user", "content": "Hello."}]
_TEXT = '{"probe_key": "probe_value"}'

EFFORT, THINKING = "reasoning_effort", "enable_thinking"
REASONING_VARIABLES = (EFFORT, THINKING)
"""What templates call how much the model reasons (gpt-oss), and whether it does (Qwen, GLM)."""


@dataclass(frozen=True)
class TemplateTraits:
    """Of one template.

    Attributes:
        shows_tools: the model gets to see a request's tools.
        string_arguments: calls in the history must have their arguments as JSON text; else as objects.
        reasoning_variables: those of ``REASONING_VARIABLES`` that it reads.
    """

    shows_tools: bool = False
    string_arguments: bool = False
    reasoning_variables: frozenset[str] = frozenset()

    @classmethod
    def of(cls, template: ChatTemplate) -> TemplateTraits:
        """The traits of a template. One that fails on a plain question shows nothing."""
        shown = _rendered(template, _ASKED, tools=[_TOOL])
        if shown is None:  # it may want a conversation of another form
            shown = "probe_function" if "tools" in template.source else ""
        as_object = _rendered(template, _history({"probe_key": "probe_value"}), tools=[_TOOL]) or ""
        as_text = _rendered(template, _history(_TEXT), tools=[_TOOL]) or ""
        understood = "probe_value" in as_object and "'probe_key'" not in as_object
        return cls(
            "probe_function" in shown,
            not understood and _TEXT in as_text,
            frozenset(name for name in REASONING_VARIABLES if name in template.source),
        )


def _history(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "probecall", "type": "function", "function": {"name": "probe_function", "arguments": arguments}}
    return [
        *_ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "probecall", "name": "probe_function", "content": "Done."},
    ]


def _rendered(template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str | None:
    try:
        return template.render(messages, tools=tools)
    except RequestError:
        return None
