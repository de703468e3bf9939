"""What an output must match, as plain data that travels from a request to the worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmctl.errors import RequestError

Kind = Literal["json_schema", "regex", "choice", "gbnf", "lark", "lark_json"]

MAX_SOURCE_CHARS = 65536
"""The compiler's recursion is bounded by it (``compiler.STACK_BYTES``)."""
ANSWER = "answer"
"""What ``GrammarSpec.before`` calls the grammar that follows."""


@dataclass(frozen=True)
class GrammarSpec:
    """A grammar of one of the kinds below.

    Attributes:
        kind: of ``source``. ``json_schema``: a JSON object. ``regex``: an expression that the whole output matches.
            ``choice``: a JSON array of strings. ``gbnf``: llama.cpp's notation. ``lark``: llguidance's Lark.
            ``lark_json``: as ``lark_with_schemas`` makes it.
        source: at most 65536 characters.
        param: the request's field that it comes from, for refusals.
        before: what may come before it, as rules of Lark, of which ``start`` has it as ``@answer``; empty: nothing may.

    Raises:
        RequestError: a source that is too long, or not Unicode.
    """

    kind: Kind
    source: str
    param: str = field(default="structured_outputs", compare=False)
    before: str = ""

    def __post_init__(self) -> None:
        if len(self.source) > MAX_SOURCE_CHARS:
            raise RequestError(
                f"{self.param}: expected at most {MAX_SOURCE_CHARS} characters, found {len(self.source)}",
                param=self.param,
            )
        try:
            self.source.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{self.param}: not valid Unicode at character {error.start}", param=self.param
            ) from error


def json_schema(schema: Any, param: str) -> GrammarSpec:
    """The grammar of a JSON schema that has been parsed. Its properties keep their order.

    Raises:
        RequestError: neither an object nor ``true``; as ``GrammarSpec``.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        found = "false, which nothing matches" if schema is False else type(schema).__name__
        raise RequestError(f"{param}: expected a JSON schema (an object), found {found}", param=param)
    return GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False, separators=(",", ":")), param)


def json_object(param: str) -> GrammarSpec:
    """The grammar of any JSON object."""
    return json_schema({"type": "object"}, param)


def lark_with_schemas(lark: str, schemas: Mapping[str, Any], param: str) -> GrammarSpec:
    """The grammar of rules in Lark, each on a line, of which some are JSON schemas, given by their names.

    Raises:
        RequestError: as ``GrammarSpec``.
    """
    source = {"lark": lark, "schemas": schemas}
    return GrammarSpec("lark_json", json.dumps(source, ensure_ascii=False, separators=(",", ":")), param)
