"""Write ``docs/api.md``, the reference of the HTTP API, out of the server's own description: ``make docs``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from md_table import markdown_table

from llmctl.serving.openapi import describe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
_MODEL = "MODEL"
_HEAD = """\
# API reference

Made by `make docs` of what a server answers at `/openapi.json`; a running server's own has the name of its model in its
examples. What other servers' clients find under which path is in [clients.md](clients.md), keys and bounds are in
[serving.md](serving.md)."""
_BOUNDS = (
    ("minimum", "≥ {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "≤ {}"),
    ("exclusiveMaximum", "< {}"),
    ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"),
    ("minItems", "at least {} items"),
    ("maxItems", "at most {} items"),
)
_UNBOUNDED = 1e300
"""A bound beyond this one is that of the number's type."""


def page() -> str:
    """The whole page."""
    document = describe(_MODEL, with_keys=True)
    operations = [(path, method, o) for path, item in document["paths"].items() for method, o in item.items()]
    parts = [_HEAD, "## Endpoints", *_endpoints(document, operations), "## Rules that no schema says"]
    parts += [document["info"]["description"].strip(), "## Statuses", _statuses(document)]
    parts += ["## Requests and answers"]
    for path, method, operation in operations:
        parts += _operation(path, method, operation)
    parts += ["## Schemas"]
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts += _schema(name, schema)
    return "\n\n".join(parts) + "\n"


def _endpoints(document: Mapping[str, Any], operations: list[tuple[str, str, Any]]) -> Iterator[str]:
    for tag in document["tags"]:
        rows = [
            (f"[`{method.upper()} {path}`](#{_anchor(method, path)})", operation["summary"])
            for path, method, operation in operations
            if operation["tags"] == [tag["name"]]
        ]
        yield f"**{tag['name'].capitalize()}.** {tag['description']}"
        yield markdown_table(("", "what it does"), rows)


def _anchor(method: str, path: str) -> str:
    """What a heading `METHOD /path` is linked by: letters, digits, hyphens and underscores of it."""
    return re.sub(r"[^\w\- ]", "", f"{method} {path}".lower()).replace(" ", "-")


def _statuses(document: Mapping[str, Any]) -> str:
    """One row a status; other APIs' paths have their own shapes of the same errors."""
    rows = {}
    for item in document["paths"].values():
        for operation in item.values():
            for status, response in operation["responses"].items():
                found = _resolved(document, response)
                headers = ", ".join(f"`{name}`" for name in found.get("headers", {}) if "Request-Id" not in name)
                if status != "200":
                    rows.setdefault(status, (status, found["description"], headers))
    return markdown_table(("status", "meaning", "headers"), [rows[status] for status in sorted(rows)])


def _resolved(document: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Any = node
    while "$ref" in found:
        place: Any = document
        for part in found["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        found = place
    return dict(found)


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {method.upper()} {path}"
    lines = [f"{operation['summary']}."]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if body:
        lines.append(f"Body: {_type(body['schema'])}.")
    answer = operation["responses"]["200"]["content"]
    for kind, content in answer.items():
        what = _type(content["schema"]) if "schema" in content else _event(content["itemSchema"])
        lines.append(f"Answer, `{kind}`: {what}.")
    others = sorted(status for status in operation["responses"] if status != "200")
    lines.append(f"Else {', '.join(others)}.")
    yield " ".join(lines)
    for example in list(body.get("examples", {}).values())[:1]:
        body_text = json.dumps(example["value"], ensure_ascii=False)
        yield f"```json\n{body_text}\n```"


def _event(schema: Mapping[str, Any]) -> str:
    data = schema["properties"]["data"]
    models = [s["contentSchema"] for s in data.get("anyOf", [data]) if "contentSchema" in s]
    return "events of " + ", ".join(_type(s) for s in models)


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}"
    if schema.get("description"):
        yield " ".join(schema["description"].split()).replace("``", "`")
    properties = schema.get("properties", {})
    if not properties:
        yield f"{_type({k: v for k, v in schema.items() if k != 'description'})}."
        return
    required = set(schema.get("required", ()))
    rows = []
    for field, found in properties.items():
        default = "required" if field in required else _default(found)
        said = " ".join(str(found.get("description", "")).split()).replace("``", "`").replace("|", "\\|")
        rows.append((f"`{field}`", _type(found).replace("|", "\\|"), default, said))
    described = any(row[3] for row in rows)
    head = ("field", "type", "default", "meaning")
    yield markdown_table(head if described else head[:3], rows if described else [row[:3] for row in rows])


def _default(schema: Mapping[str, Any]) -> str:
    return f"`{json.dumps(schema['default'])}`" if "default" in schema else ""


def _type(schema: Any) -> str:
    """A schema in a few words, with links to those that have a name."""
    if schema is True or schema == {}:
        return "anything"
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema and "properties" not in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[key]))
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join(kind)
    words = kind
    if kind == "array":
        words = f"list of {_type(schema.get('items', True))}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        words = f"object of {_type(schema['additionalProperties'])}"
    bounds = [text.format(schema[key]) for key, text in _BOUNDS if key in schema and abs(schema[key]) < _UNBOUNDED]
    return f"{words} ({', '.join(bounds)})" if bounds else words


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
