"""Calls that must be made: the answer as a grammar, whatever format the model would choose by itself.

It is a JSON array of ``{"name": …, "arguments": …}``, as vLLM has it, and is read by the format ``json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.serving.protocol import Tool
from llmctl.structured.spec import GrammarSpec, json_schema


def calls_grammar(tools: Sequence[Tool], param: str, *, single: bool) -> GrammarSpec:
    """The grammar of one or more calls of these tools; ``single``: of exactly one.

    Raises:
        RequestError: the schemas are too long.
    """
    definitions = {str(i): _relative(arguments_schema(tool), f"#/$defs/{i}") for i, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": f"#/$defs/{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    bounds = {"minItems": 1, "maxItems": 1} if single else {"minItems": 1}
    return json_schema({"$defs": definitions, "type": "array", "items": items, **bounds}, param)


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """What the arguments of a call are held to."""
    return {"type": "object", **(tool.function.parameters or {})}


def _relative(schema: Any, root: str) -> Any:
    """A schema whose references to its own root mean a part of another one."""
    if isinstance(schema, list):
        return [_relative(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _relative(value, root) for key, value in schema.items()}
    reference = made.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        made["$ref"] = root + reference[1:]
    return made
