"""The one keyword that llguidance takes and cannot keep: a count of properties whose names the model may repeat.

An object in the making may repeat a name that the schema does not spell out, and a parser counts it once. So
``minProperties`` holds only where names are spelt out: these come once each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_ONE = (
    "additionalProperties", "items", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def counts_repeated_keys(schema: dict[str, Any]) -> bool:
    """Whether a ``minProperties`` anywhere in a JSON schema could be met by repeating a name."""
    return any(_counts_repeated_keys(found) for found in _subschemas(schema))


def _counts_repeated_keys(schema: dict[str, Any]) -> bool:
    least = schema.get("minProperties", 0)
    required = schema.get("required", [])
    if not isinstance(least, int | float) or not isinstance(required, list):
        return False  # the compiler refuses it
    spelt_out = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    return not spelt_out and least > max(1, len(set(map(str, required))))


def _subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and all schemas in it; a value of ``const``, ``enum`` or ``default`` is none."""
    waiting: list[Any] = [schema]
    while waiting:
        found = waiting.pop()
        if not isinstance(found, dict):
            continue
        yield found
        waiting += [found[name] for name in _ONE if name in found]
        for name in _LISTS:
            if isinstance(found.get(name), list):
                waiting += found[name]
        for name in _MAPS:
            if isinstance(found.get(name), dict):
                waiting += found[name].values()
