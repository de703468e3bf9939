"""The fields that describe an output, in every server's spelling: one grammar, or a refusal that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmctl.errors import RequestError
from llmctl.serving.openai_errors import from_validation_error
from llmctl.serving.protocol import ChatCompletionRequest, CompletionRequest, SamplingFields
from llmctl.serving.structured_fields import grammar_of
from llmctl.structured.spec import GrammarSpec, json_object, json_schema

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "é"}}}
GBNF, LARK = 'root ::= "a"', 'start: "a"'
BODIES = {
    CompletionRequest: {"prompt": "a"},
    ChatCompletionRequest: {"messages": [{"role": "user", "content": "a"}]},
}


def grammar(fields: dict[str, Any], model: type[SamplingFields] = CompletionRequest) -> GrammarSpec | None:
    return grammar_of(model.model_validate_json(json.dumps({**BODIES[model], **fields})))


@pytest.mark.parametrize("model", BODIES)
@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, json_object("x")),
        *(
            ({"response_format": {"type": "json_object", name: SCHEMA}}, json_schema(SCHEMA, "x"))
            for name in ("schema", "value")
        ),
        ({"structured_outputs": {"json_object": True}}, json_object("x")),
        *(
            ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **more}}},
             json_schema(SCHEMA, "x"))
            for more in ({}, {"strict": True}, {"strict": False, "description": "d"})
        ),
        *(
            (fields, json_schema(SCHEMA, "x"))
            for schema in (SCHEMA, json.dumps(SCHEMA), json.dumps(SCHEMA, indent=3, ensure_ascii=False))
            for fields in ({"guided_json": schema}, {"json_schema": schema}, {"structured_outputs": {"json": schema}})
        ),
        *(
            (fields, GrammarSpec("regex", "a+"))
            for fields in ({"guided_regex": "a+"}, {"regex": "a+"}, {"structured_outputs": {"regex": "a+"}})
        ),
        *(
            (fields, GrammarSpec("choice", '["é", "b"]'))
            for fields in ({"guided_choice": ["é", "b"]}, {"structured_outputs": {"choice": ["é", "b"]}})
        ),
        *(
            (fields, GrammarSpec("gbnf", GBNF))
            for fields in (
                {"guided_grammar": GBNF},
                {"grammar": GBNF},
                {"ebnf": GBNF},
                {"structured_outputs": {"grammar": GBNF}},
            )
        ),
        *(
            (fields, GrammarSpec("lark", LARK))
            for fields in ({"guided_grammar": LARK}, {"grammar": LARK}, {"structured_outputs": {"grammar": LARK}})
        ),
        ({"guided_json": True}, json_schema({}, "x")),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, GrammarSpec("regex", "a")),
    ],
)  # fmt: skip
def test_every_spelling_is_one_grammar(
    fields: dict[str, Any], spec: GrammarSpec | None, model: type[SamplingFields]
) -> None:
    found = grammar(fields, model)
    assert found == spec
    if found is not None:
        assert found.param == [name for name in fields if fields[name] != {"type": "text"}][0]  # noqa: RUF015


def test_properties_keep_their_order() -> None:
    found = grammar({"guided_json": SCHEMA})
    assert found is not None
    assert list(json.loads(found.source)["properties"]) == ["b", "a"]


@pytest.mark.parametrize("model", BODIES)
@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"guided_json": {}, "regex": "a"}, "regex", "found guided_json and regex"),
        ({"response_format": {"type": "json_object"}, "grammar": GBNF}, "grammar", "response_format and grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "one description"),
        ({"structured_outputs": {}}, "structured_outputs", "one of json, regex"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "one of json, regex"),
        ({"structured_outputs": {"whitespace_pattern": "x", "json": {}}}, "structured_outputs", "whitespace_pattern"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "an object with 'schema'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format", "'schema'"),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format", "'schema' does not belong"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format", "does not belong"),
        *(
            ({"response_format": {"type": type_, name: {}}}, "response_format", f"'{name}' does not belong")
            for type_, name in (("text", "schema"), ("text", "value"), ("json_schema", "value"))
        ),
        ({"response_format": {"type": "json_object", "schema": {}, "value": {}}}, "response_format", "found both"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format", "does not belong"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "found 'structural_tag'"),
        ({"guided_json": False}, "guided_json", "which nothing matches"),
        ({"guided_json": "[1]"}, "guided_json", "found list"),
        ({"guided_json": "{'a': 1}"}, "guided_json", "not JSON"),
        ({"json_schema": "[" * 100_000}, "json_schema", "nested too deeply"),
        ({"json_schema": '{"maximum": NaN}'}, "json_schema", "NaN"),
        ({"guided_json": '{"const": "\\ud800"}'}, "guided_json", "not valid Unicode"),
        ({"guided_regex": "a" * 65537}, "guided_regex", "at most 65536 characters, found 65537"),
        ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json", "at most 65536 characters"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": [1]}, "guided_choice", "string"),
        ({"regex": 5}, "regex", "string"),
    ],
)
def test_what_is_no_grammar_is_refused_by_its_field(
    fields: dict[str, Any], param: str, said: str, model: type[SamplingFields]
) -> None:
    with pytest.raises((RequestError, ValueError)) as caught:
        grammar(fields, model)
    error = caught.value if isinstance(caught.value, RequestError) else from_validation_error(caught.value)  # type: ignore[arg-type]
    assert error.param == param
    assert said in str(error)
