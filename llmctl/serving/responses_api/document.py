"""What a response repeats of its request, as it is done: the same from its first event to its last."""

from __future__ import annotations

import time
from typing import Any

from llmctl.serving.context import Model
from llmctl.serving.responses_api.items import new_id
from llmctl.serving.responses_api.protocol import (
    AllowedTools,
    Format,
    FunctionChoice,
    FunctionTool,
    JsonSchemaText,
    ResponsesRequest,
)


def head(asked: ResponsesRequest, model: Model) -> dict[str, Any]:
    """The response before there is anything of it, with a fresh id, now."""
    reasoning = asked.reasoning
    sampled = {"temperature": 1.0, "top_p": 1.0} | dict(model.defaults.values)
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "model": model.name,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None if reasoning is None else reasoning.summary,
        },
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampled["temperature"] if asked.temperature is None else asked.temperature,
        "text": {"format": _format(asked.text.format if asked.text is not None else None), "verbosity": "medium"},
        "tool_choice": _tool_choice(asked),
        "tools": [_tool(tool) for tool in asked.tools or ()],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": sampled["top_p"] if asked.top_p is None else asked.top_p,
        "truncation": asked.truncation or "disabled",
        "usage": None,
        "user": asked.user,
    }


def _format(given: Format | None) -> dict[str, Any]:
    if not isinstance(given, JsonSchemaText):
        return {"type": "text" if given is None else given.type}
    return {
        "type": given.type,
        "name": given.name,
        "schema": given.schema_,
        "description": given.description,
        "strict": given.strict,
    }


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": tool.type,
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }


def _tool_choice(asked: ResponsesRequest) -> str | dict[str, Any]:
    choice = asked.tool_choice
    if isinstance(choice, AllowedTools):
        return {"type": choice.type, "mode": choice.mode, "tools": [_function_choice(tool) for tool in choice.tools]}
    return _function_choice(choice) if isinstance(choice, FunctionChoice) else choice or "auto"


def _function_choice(choice: FunctionChoice) -> dict[str, Any]:
    return {"type": choice.type, "name": choice.name}
