"""What templates are shown of tools and calls, how formats are chosen, and what must be called as a grammar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from fixtures import make_tokenizer

from llmctl.config import ServeConfig
from llmctl.errors import RequestError, UsageError
from llmctl.serving.config_check import check_config
from llmctl.serving.intake import Intake
from llmctl.serving.protocol import ChatCompletionRequest
from llmctl.serving.tools.message import MessageReader, call_id
from llmctl.serving.tools.support import ToolSupport
from llmctl.serving.tools.traits import TemplateTraits
from llmctl.text.chat_template import ChatTemplate
from llmctl.text.output_parser.formats import TOOL_FORMATS, tool_format, tool_format_of
from llmctl.text.tokenizer import Tokenizer

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
OBJECTS = (
    "{{ tools | tojson if tools }}" + PLAIN[:-12] + "{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
ITEMS = OBJECTS.replace(
    "{{ c.function.arguments | tojson }}", "{% for k, v in c.function.arguments.items() %}{{ k }}:{{ v }}{% endfor %}"
)
STRINGS = OBJECTS.replace("c.function.arguments | tojson", "'<' + c.function.arguments + '>'")
TILDE = OBJECTS.replace("c.function.arguments | tojson", "'<' ~ c.function.arguments ~ '>'")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def request(*messages: dict[str, Any], **fields: Any) -> ChatCompletionRequest:
    asked = [{"role": "user", "content": "hi"}, *messages]
    return ChatCompletionRequest.model_validate_json(json.dumps({"messages": asked, **fields}))


def rendered(tokenizer: Tokenizer, source: str, body: ChatCompletionRequest, **options: Any) -> str:
    template = ChatTemplate(source)
    support = ToolSupport.of(tokenizer, template, **options)
    made = Intake(tokenizer, template, max_model_len=64, vocab_size=tokenizer.vocab_size, defaults={}, tools=support)
    return made.render_chat(body)


def called(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("source", "shows", "strings"),
    [(PLAIN, False, False), (OBJECTS, True, False), (ITEMS, True, False), (STRINGS, True, True), (TILDE, True, True)],
)
def test_traits(source: str, shows: bool, strings: bool) -> None:
    assert TemplateTraits.of(ChatTemplate(source)) == TemplateTraits(shows, strings)


@pytest.mark.parametrize(
    ("source", "shown"),
    [(OBJECTS, '{"a": 1, "b": ["é"]}'), (ITEMS, "a:1b:['é']"), (STRINGS, '<{"a": 1, "b": ["é"]}>')],
)
def test_arguments_reach_templates_as_they_want_them(tokenizer: Tokenizer, source: str, shown: str) -> None:
    arguments = {"a": 1, "b": ["é"]}
    for given in (arguments, json.dumps(arguments)):
        assert rendered(tokenizer, source, request(called(given))).endswith(f"f{shown}")
    legacy = {"role": "assistant", "function_call": {"name": "f", "arguments": json.dumps(arguments)}}
    result = {"role": "function", "name": "f", "content": "done"}
    assert rendered(tokenizer, source, request(legacy, result)).endswith(f"f{shown}[tool]done")


@pytest.mark.parametrize("given", [None, "", " ", "{}", {}])
def test_no_arguments_are_an_empty_object(tokenizer: Tokenizer, given: Any) -> None:
    assert rendered(tokenizer, OBJECTS, request(called(given))).endswith("f{}")


@pytest.mark.parametrize("given", ["{", "5", "[]", "NaN", '{"a": NaN}', "[" * 5000, '"{}"'])
def test_arguments_that_are_no_object_are_refused_by_name(tokenizer: Tokenizer, given: str) -> None:
    with pytest.raises(RequestError, match=r"messages\[1\].tool_calls\[0\].function.arguments: expected a JSON object"):
        rendered(tokenizer, OBJECTS, request(called(given)))


def test_an_empty_list_of_calls_is_none(tokenizer: Tokenizer) -> None:
    body = request({"role": "assistant", "content": "x", "tool_calls": []})
    assert rendered(tokenizer, "{{ messages[1].tool_calls is defined }}", body) == "False"


def test_tools_and_functions_are_shown_alike(tokenizer: Tokenizer) -> None:
    shown = rendered(tokenizer, OBJECTS, request(tools=[TOOL]))
    assert shown.startswith(json.dumps([TOOL]))
    assert rendered(tokenizer, OBJECTS, request(functions=[TOOL["function"]])) == shown


def test_the_generic_prompt_serves_a_template_that_knows_no_tools(tokenizer: Tokenizer) -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": "12:00"}
    body = request(called('{"a": 1}'), result, tools=[TOOL])
    text = rendered(tokenizer, PLAIN, body, tool_template="generic")
    assert text.startswith("[system]")
    assert json.dumps(TOOL) in text
    assert (
        '[assistant]<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>[user]<tool_response>\n12:00' in text
    )
    system = {"role": "system", "content": "Be kind."}
    body.messages.insert(0, type(body.messages[0]).model_validate(system))
    assert rendered(tokenizer, PLAIN, body, tool_template="generic").startswith("[system]Be kind.\n\nYou can call")
    assert ToolSupport.of(tokenizer, ChatTemplate(PLAIN), tool_template="generic").row.name == "hermes"


def test_a_template_that_shows_no_tools_is_said_and_logged_once(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    body = request(tools=[TOOL])
    support = ToolSupport.of(tokenizer, ChatTemplate(PLAIN))
    warnings = {support.warning(body, support.use(body)) for _ in range(3)}
    assert len(warnings) == 1
    assert "--tool-template generic" in str(warnings.pop())
    assert len(caplog.records) == 1
    assert support.warning(request(), support.use(request())) is None
    for good in (
        ToolSupport.of(tokenizer, ChatTemplate(OBJECTS)),
        ToolSupport.of(tokenizer, ChatTemplate(PLAIN), tool_template="generic"),
    ):
        assert good.warning(body, good.use(body)) is None


def test_formats_are_known_by_their_signs_and_names() -> None:
    for row in TOOL_FORMATS:
        for sign in row.signs:
            assert tool_format_of(f"{{{{ '{sign}' }}}}") is row
    assert tool_format_of("<tool_call><function=") is tool_format("qwen3_coder")
    assert tool_format_of(PLAIN) is None
    names = [name for row in TOOL_FORMATS for name in (row.name, *row.aliases)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tool_call_parser": "nope"}, "tool_call_parser"),
        ({"reasoning_parser": "nope"}, "reasoning_parser"),
        ({"tool_template": "nope"}, "tool_template"),
        ({"tool_template": "generic", "tool_call_parser": "mistral"}, "tool_call_parser"),
    ],
)
def test_options_are_checked_at_the_door(options: dict[str, str], param: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_config(ServeConfig(model="m", **options))  # type: ignore[arg-type]
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning"),
    [("x<think>\n", "a</think>b", "a"), ("x<think>\n\n</think>\n\n", "a", ""), ("x", "<think>a</think>b", "a")],
)
def test_reasoning_begins_where_the_prompt_left_it(
    tokenizer: Tokenizer, prompt: str, text: str, reasoning: str
) -> None:
    support = ToolSupport.of(tokenizer, None, reasoning_parser="deepseek_r1")
    parser = support.use(request()).parser(prompt)
    assert parser is not None
    pieces = parser.push(text) + parser.finish()
    assert "".join(piece.text for piece in pieces if piece.kind == "reasoning") == reasoning


def test_nothing_is_taken_apart_without_need(tokenizer: Tokenizer) -> None:
    support = ToolSupport.of(tokenizer, ChatTemplate(OBJECTS))
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": []}):
        assert support.use(request(**fields)).parser("") is None


def test_ids_are_new_and_of_the_length_that_templates_want() -> None:
    assert len({call_id() for _ in range(100)}) == len({call_id(9) for _ in range(100)}) == 100
    assert len(call_id(9)) == 9
    assert call_id(9).isalnum()


RECURSIVE = {
    "type": "object",
    "properties": {"next": {"$ref": "#"}, "n": {"$ref": "#/$defs/n"}},
    "$defs": {"n": {"type": "integer"}},
    "additionalProperties": False,
}
OTHER = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "string"}}}


@pytest.mark.parametrize(
    ("calls", "fields", "fits"),
    [
        ([("f", {"n": 1, "next": {"n": 2}})], {}, True),
        ([("g", {"n": "x"}), ("f", {})], {}, True),
        ([("g", {"n": "x"}), ("f", {})], {"parallel_tool_calls": False}, False),
        ([("f", {"n": "x"})], {}, False),
        ([("f", {"next": {"n": "x"}})], {}, False),
        ([("g", {"n": 1})], {}, False),
        ([("h", {})], {}, False),
        ([], {}, False),
        ([("g", {})], {"tool_choice": {"type": "function", "function": {"name": "f"}}}, False),
        ([("f", {})], {"tool_choice": {"type": "function", "function": {"name": "f"}}}, True),
    ],
)
def test_what_must_be_called_is_a_schema(
    tokenizer: Tokenizer, calls: list[tuple[str, Any]], fields: dict[str, Any], fits: bool
) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in {"f": RECURSIVE, "g": OTHER}.items()
    ]
    support = ToolSupport.of(tokenizer, ChatTemplate(OBJECTS))
    use = support.use(request(**{"tools": tools, "tool_choice": "required", **fields}))
    assert use.grammar is not None
    written = [{"name": name, "arguments": arguments} for name, arguments in calls]
    assert jsonschema_rs.validator_for(json.loads(use.grammar.source)).is_valid(written) == fits
    parser = use.parser("<think>")
    assert parser is not None
    parser.push(json.dumps(written))
    parser.finish()
    if fits:
        assert parser.complete == [True] * len(calls)


def test_a_call_that_must_be_made_and_is_cut_short_is_no_text(tokenizer: Tokenizer) -> None:
    support = ToolSupport.of(tokenizer, None)
    use = support.use(request(tools=[TOOL], tool_choice="required"))
    whole = '[{"name": "f", "arguments": {"a": 1}}]'
    for cut in range(len(whole)):
        parser = use.parser(None)
        assert parser is not None
        pieces = MessageReader(parser, use).read(whole[:cut], last=True)
        assert {piece.kind for piece in pieces} <= {"name", "arguments"}
