"""The fields of a request that say what its output must match, in the spellings of four servers, as one GrammarSpec.

Whether a grammar can be compiled is for the worker to say; here is refused what contradicts itself or is no grammar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from llmctl.errors import RequestError
from llmctl.serving.protocol import ResponseFormat, SamplingFields, StructuredOutputs
from llmctl.structured.spec import GrammarSpec, json_object, json_schema

_FORMATS = "'text', 'json_object' or 'json_schema'"


def grammar_of(body: SamplingFields) -> GrammarSpec | None:
    """What the output must match; None when nothing is said.

    Raises:
        RequestError: said twice, or not a grammar; ``param`` names the field.
    """
    found = list(_given(body))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise RequestError(f"expected one description of the output, found {names}", param=found[1][0])
    return found[0][1]() if found else None


def _given(body: SamplingFields) -> Iterator[tuple[str, Callable[[], GrammarSpec]]]:
    """Each description that is given, unmade: a name to tell it by, and how to make it."""
    if body.response_format is not None and body.response_format.type != "text":
        yield "response_format", partial(_from_response_format, body.response_format)
    elif body.response_format is not None:
        _refuse_unused(body.response_format, "json_schema", "schema_", "value")
    if body.structured_outputs is not None:
        yield from _from_structured_outputs(body.structured_outputs)
    for name, make in _FIELDS.items():
        value = getattr(body, name)
        if value is not None:
            yield name, partial(make, value, name)


def _from_response_format(given: ResponseFormat) -> GrammarSpec:
    param = "response_format"
    if given.type == "json_object":
        _refuse_unused(given, "json_schema")
        if given.schema_ is not None and given.value is not None:
            raise RequestError(f"{param}: expected 'schema' or 'value', found both", param=param)
        schema = given.value if given.schema_ is None else given.schema_
        return json_object(param) if schema is None else json_schema(schema, param)
    if given.type == "json_schema":
        _refuse_unused(given, "schema_", "value")
        if given.json_schema is None or given.json_schema.schema_ is None:
            raise RequestError("response_format.json_schema: expected an object with 'schema'", param=param)
        return json_schema(given.json_schema.schema_, param)
    raise RequestError(f"response_format: expected type {_FORMATS}, found '{given.type[:40]}'", param=param)


def _refuse_unused(given: ResponseFormat, *names: str) -> None:
    for name in names:
        if getattr(given, name) is not None:
            raise RequestError(
                f"response_format: '{name.rstrip('_')}' does not belong to type '{given.type}'", param="response_format"
            )


def _from_structured_outputs(given: StructuredOutputs) -> Iterator[tuple[str, Callable[[], GrammarSpec]]]:
    param = "structured_outputs"
    made = {
        name.rstrip("_"): (_FORMS[name], value) for name, value in given if value is not None and value is not False
    }
    if not made:
        raise RequestError(f"{param}: expected one of json, regex, choice, grammar or json_object", param=param)
    for name, (make, value) in made.items():
        yield (param if len(made) == 1 else f"{param}.{name}"), partial(make, value, param)


def _json(value: Any, param: str) -> GrammarSpec:
    """A schema as an object, or spelt as a string."""
    if not isinstance(value, str):
        return json_schema(value, param)
    try:
        return json_schema(json.loads(value, parse_constant=_no_constant), param)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"{param}: expected a JSON schema, and this is not JSON: {reason}", param=param) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _regex(value: str, param: str) -> GrammarSpec:
    return GrammarSpec("regex", value, param)


def _choice(value: list[str], param: str) -> GrammarSpec:
    return GrammarSpec("choice", json.dumps(value, ensure_ascii=False), param)


def _gbnf(value: str, param: str) -> GrammarSpec:
    return GrammarSpec("gbnf", value, param)


def _grammar(value: str, param: str) -> GrammarSpec:
    """GBNF, or Lark, which never says ``::=`` but in a string."""
    return GrammarSpec("gbnf" if "::=" in value else "lark", value, param)


_FORMS: dict[str, Callable[[Any, str], GrammarSpec]] = {
    "json_": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": lambda _, param: json_object(param),
}
_FIELDS: dict[str, Callable[[Any, str], GrammarSpec]] = {
    "guided_json": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "json_schema": _json,
    "regex": _regex,
    "ebnf": _gbnf,
    "grammar": _grammar,
}
