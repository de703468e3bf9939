"""Requests of the Messages API as the chats that they stand for, and what is refused of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmctl.errors import RequestError
from llmctl.serving.body import parsed
from llmctl.serving.error_shapes import MESSAGES, problem_of
from llmctl.serving.messages_api.protocol import CountTokensRequest, MessagesRequest
from llmctl.serving.messages_api.translate import chat_request, notes, tokenize_request
from llmctl.serving.outline import Outline
from llmctl.serving.tools.support import ToolSupport
from llmctl.serving.tools.traits import TemplateTraits
from llmctl.text.chat_template import ChatTemplate
from llmctl.text.output_parser.formats import reasoning_format, tool_format

HI = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "input_schema": SCHEMA}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bonn"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}
CALLED = {"role": "assistant", "content": [CALL]}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def request(**fields: Any) -> MessagesRequest:
    data = json.dumps({"messages": [HI], "max_tokens": 5, **fields}).encode()
    return parsed(data, Outline(data), MessagesRequest)


def chat(**fields: Any) -> dict[str, Any]:
    """What is set in the chat that a request stands for."""
    made = chat_request(request(**fields)).model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    assert made.pop("max_tokens") == 5
    assert made.pop("stream") == bool(fields.get("stream"))
    return made


@pytest.mark.parametrize(
    ("fields", "made"),
    [
        ({}, {"messages": [HI]}),
        ({"model": "m", "stream": True}, {"model": "m", "messages": [HI]}),
        ({"system": "Be kind."}, {"messages": [{"role": "system", "content": "Be kind."}, HI]}),
        (
            {"system": [text("Be"), text("kind.", cache_control={"type": "ephemeral"})]},
            {"messages": [{"role": "system", "content": [text("Be"), text("kind.")]}, HI]},
        ),
        ({"system": []}, {"messages": [HI]}),
        ({"messages": [HI, HI]}, {"messages": [{"role": "user", "content": [text("hi"), text("hi")]}]}),
        (
            {"messages": [HI, {"role": "assistant", "content": "The"}]},
            {"messages": [HI, {"role": "assistant", "content": "The"}], "continue_final_message": True},
        ),
        (
            {"stop_sequences": ["a"], "temperature": 0, "top_p": 1, "top_k": 3, "metadata": {"user_id": "me"}},
            {"messages": [HI], "stop": ["a"], "temperature": 0.0, "top_p": 1.0, "top_k": 3, "user": "me"},
        ),
        ({"thinking": {"type": "disabled"}}, {"messages": [HI], "chat_template_kwargs": {"enable_thinking": False}}),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            {"messages": [HI], "chat_template_kwargs": {"enable_thinking": True}},
        ),
        (
            {"output_config": {"effort": "low"}},
            {"messages": [HI], "chat_template_kwargs": {"reasoning_effort": "low"}},
        ),
        ({"thinking": {"type": "adaptive"}, "speed": "standard", "mcp_servers": []}, {"messages": [HI]}),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            {"messages": [HI], "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        ),
    ],
)
def test_a_request_is_a_chat(fields: dict[str, Any], made: dict[str, Any]) -> None:
    assert chat(**fields) == made


def test_calls_their_results_and_thoughts_are_history() -> None:
    turn = [{"type": "thinking", "thinking": "Hm.", "signature": ""}, text("Let me see."), CALL]
    failed = {**RESULT, "content": [text("no"), text("rain")], "is_error": True}
    asked = chat(
        messages=[
            HI,
            {"role": "assistant", "content": turn},
            {"role": "user", "content": [failed, text("So?")]},
        ]
    )
    called = {"id": "toolu_1", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    assert asked["messages"] == [
        HI,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [called], "reasoning_content": "Hm."},
        {"role": "tool", "content": "Error: no\nrain", "tool_call_id": "toolu_1", "name": "weather"},
        {"role": "user", "content": "So?"},
    ]
    assert chat(messages=[HI, CALLED, {"role": "user", "content": [RESULT]}])["messages"][2]["content"] == "rain"


@pytest.mark.parametrize(
    ("choice", "made"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"type": "tool", "name": "weather", "disable_parallel_tool_use": False},
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}, "parallel_tool_calls": True},
        ),
    ],
)
def test_tools_and_what_must_be_called(choice: dict[str, Any], made: dict[str, Any]) -> None:
    function = {"name": "weather", "parameters": SCHEMA}
    asked = chat(tools=[TOOL], tool_choice=choice)
    assert asked == {"messages": [HI], "tools": [{"type": "function", "function": function}], **made}
    described = {**TOOL, "type": "custom", "description": "Tells.", "strict": True}
    assert chat(tools=[described])["tools"][0]["function"] == {**function, "description": "Tells.", "strict": True}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": -1}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: .*found 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "content.0: .*found 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "content.0: .*found 'document'"),
        (
            {"messages": [HI, CALLED, {"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}]},
            "messages.2.content.0.tool_result.content.0.type: .*found 'image'",
        ),
        (
            {"messages": [{"role": "user", "content": [CALL]}]},
            "messages.0.content.0: .*'tool_use' is none of role 'user'",
        ),
        ({"messages": [HI, {"role": "assistant", "content": [RESULT]}]}, "none of role 'assistant'"),
        ({"messages": [HI, CALLED, {"role": "system", "content": [RESULT]}]}, "none of role 'system'"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages.0.content.0.tool_use_id: .*found 'toolu_1'"),
        ({"messages": [HI, CALLED]}, "messages.1.content.0: .*expected it to end in text"),
        (
            {"messages": [HI, {"role": "assistant", "content": ""}]},
            "messages.1.content.0: .*expected it to end in text",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type: .*'web_search_20250305'"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name: "),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools.0.defer_loading: not supported"),
        ({"tools": [{**TOOL, "defer_loading": 0}]}, "tools.0.defer_loading: .*found int"),
        ({"temperature": 1e7}, "temperature: "),
        ({"tool_choice": {"type": "some"}}, "tool_choice: expected type 'auto', 'any', 'tool', 'none', found 'some'"),
        ({"tool_choice": "auto"}, "tool_choice: Input should be an object"),
        ({"thinking": {"type": "enabled", "display": "omitted"}}, "thinking.enabled.display: .*found 'omitted'"),
        ({"thinking": {"type": "between_tools"}}, "thinking: .*found 'between_tools'"),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config.format.type: .*found 'regex'"),
        ({"output_config": {"effort": "utmost"}}, "output_config.effort: .*found 'utmost'"),
        ({"service_tier": "gold"}, "service_tier: .*found 'gold'"),
        ({"stop_sequences": [""]}, "stop_sequences.0: "),
        *(
            ({name: "x"}, f"{name}: not supported: ")
            for name in (
                *("container", "context_management", "diagnostics", "inference_geo", "mcp_servers", "output_format"),
                "speed",
            )
        ),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        chat_request(request(**fields))
    assert caught.value.http_status == 400
    assert MESSAGES.body(problem_of(caught.value))["error"]["message"] == str(caught.value)


def test_tokens_are_counted_of_the_same_prompt() -> None:
    fields: dict[str, Any] = {
        "system": "s",
        "messages": [HI, CALLED, {"role": "user", "content": [RESULT]}, {"role": "assistant", "content": "It"}],
        "tools": [TOOL],
        "thinking": {"type": "disabled"},
    }
    data = json.dumps(fields).encode()
    counted = tokenize_request(parsed(data, Outline(data), CountTokensRequest)).model_dump(exclude_unset=True)
    asked = chat_request(request(**fields)).model_dump(exclude_unset=True)
    assert {name: asked[name] for name in counted} == counted
    assert counted.keys() == {"model", "messages", "tools", "continue_final_message", "chat_template_kwargs"}


ON = {"type": "enabled", "budget_tokens": 1024}
SWITCH, LEVELS = "{% if enable_thinking %}x{% endif %}", "{{ reasoning_effort }}"


@pytest.mark.parametrize(
    ("fields", "template", "parser", "said"),
    [
        ({"thinking": ON}, SWITCH, None, ["thinking", "thinking.budget_tokens"]),
        ({"thinking": ON}, "", "qwen3", ["thinking.budget_tokens"]),
        ({"thinking": {"type": "enabled"}}, "", "qwen3", []),
        ({"thinking": {"type": "disabled"}}, "", "qwen3", ["thinking"]),
        ({"thinking": {"type": "disabled"}}, SWITCH, "qwen3", []),
        ({"thinking": {"type": "disabled"}}, "", None, []),
        ({"output_config": {"effort": "low"}}, SWITCH, None, ["output_config.effort"]),
        ({"output_config": {"effort": "low"}}, LEVELS, None, []),
        ({}, "", None, []),
    ],
)
def test_what_is_without_effect_is_said(
    fields: dict[str, Any], template: str, parser: str | None, said: list[str]
) -> None:
    reasoning = None if parser is None else reasoning_format(parser)
    support = ToolSupport(tool_format("hermes"), reasoning, TemplateTraits.of(ChatTemplate(template)))
    assert [note.partition(":")[0] for note in notes(request(**fields), support)] == said
