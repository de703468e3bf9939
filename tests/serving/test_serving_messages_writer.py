"""Blocks of a message: the same from a stream, however it was cut, as whole; why it ended, and what it took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from llmctl.engine.output import TextOutput
from llmctl.engine.request import FinishReason
from llmctl.errors import QueueFullError
from llmctl.serving.messages_api.schema import MessagesErrorResponse, MessagesEvent, MessagesResponse
from llmctl.serving.messages_api.writer import MessagesWriter
from llmctl.serving.protocol import ChatCompletionRequest
from llmctl.serving.responses import UsageCount
from llmctl.serving.tools.message import MessageReader
from llmctl.serving.tools.support import ToolSupport
from llmctl.text.output_parser.formats import reasoning_format, tool_format

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "clock")]
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "P}é"}}\n</tool_call>'
CLOCK = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
BROKEN = '<tool_call>{"name": "clock", "arguments": {"a": tru}}</tool_call>'
TEXTS = [
    "Hello, é.",
    "",
    f"On it.\n\n{WEATHER}{CLOCK}",
    f"<think>I wonder.</think>\n\nSo: {WEATHER} and done",
    "<think>never ends",
    '<tool_call>{"name": "weather", "arguments": {"city": "Bo',
    f"{BROKEN} x",
    'Just <tool_call> text. {"name"',
]


def output(text: str, finish: FinishReason | None = None, **fields: Any) -> TextOutput:
    values: dict[str, Any] = {"stop_reason": None, "num_cached_tokens": 4, **fields}
    tokens = values.pop("token_ids", (1,) * max(1, len(text)))
    return TextOutput("0", text, tokens, None, finish, num_output_tokens=1, prompt_scores=None, times=None, **values)


def writer(*, parsed: bool = True, single: bool = False, id_length: int = 0) -> MessagesWriter:
    reader = None
    if parsed:
        support = ToolSupport(tool_format("hermes"), reasoning_format("qwen3"))
        fields = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "parallel_tool_calls": not single}
        use = support.use(ChatCompletionRequest.model_validate(fields))
        parser = use.parser("")
        assert parser is not None
        reader = MessageReader(parser, use)
    return MessagesWriter("m", UsageCount(10), reader, id_length, "mine")


def events(made: MessagesWriter, outputs: Iterable[TextOutput]) -> list[dict[str, Any]]:
    """The events of a stream, each as described, with its type as its name."""
    data = b""
    for part in outputs:
        made.usage.count(0, part)
        data += made.events(0, part)
    found = []
    for event in (data + made.end()).split(b"\n\n")[:-1]:
        name, _, body = event.partition(b"\n")
        MessagesEvent.model_validate_json(body.removeprefix(b"data: "))
        found.append(json.loads(body.removeprefix(b"data: ")))
        assert name.decode() == f"event: {found[-1]['type']}"
    return found


def folded(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that events add up to, as a client does it; every block begins, goes on and stops in its turn."""
    first, ping, *rest, changed, last = found
    assert (first["type"], ping["type"], changed["type"], last["type"]) == (
        *("message_start", "ping", "message_delta", "message_stop"),
    )
    message = first["message"]
    is_open = False
    for event in rest:
        assert event["index"] == len(message["content"]) - is_open
        assert is_open == (event["type"] != "content_block_start")
        if event["type"] == "content_block_start":
            is_open, inner = True, ""
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            (_, name), (field, more) = event["delta"].items()
            assert more
            if name == "input_json_delta":
                inner += more
            else:
                message["content"][-1][field] += more
        else:
            is_open = False
            if inner:
                message["content"][-1]["input"] = inner
    return {**message, **changed["delta"], "usage": changed["usage"]}


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """Without what is new each time; inputs that are whole as objects."""
    blocks = [{k: v for k, v in block.items() if k != "id"} for block in message.pop("content")]
    for block in blocks:
        if isinstance(block.get("input"), str):
            try:
                block["input"] = json.loads(block["input"])
            except ValueError:
                block["input"] = {}
    del message["id"]
    return {**message, "content": blocks}


def whole(text: str, **options: Any) -> dict[str, Any]:
    document = writer(**options).whole([output(text, FinishReason.STOP)])
    MessagesResponse.model_validate(document)
    return plain(document)


@pytest.mark.parametrize("options", [{}, {"single": True}, {"parsed": False}], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_adds_up_to_the_whole_message_wherever_it_is_cut(text: str, options: dict[str, Any]) -> None:
    expected = whole(text, **options)
    cuts: list[Sequence[str]] = [[text[:i], text[i:]] for i in range(len(text) + 1)]
    for parts in [*cuts, list(text), [text]]:
        outputs = [output(part, token_ids=(1,) * len(part)) for part in parts[:-1]]
        last = parts[-1] if parts else ""
        outputs.append(output(last, FinishReason.STOP, token_ids=(1,) * (max(1, len(text)) - len(text) + len(last))))
        assert plain(folded(events(writer(**options), outputs))) == expected


def test_blocks() -> None:
    thinking, text, call, rest = whole(TEXTS[3])["content"]
    assert thinking == {"type": "thinking", "thinking": "I wonder.", "signature": ""}
    assert text == {"type": "text", "text": "So:"}
    assert call == {"type": "tool_use", "name": "weather", "input": {"city": "P}é"}}
    assert rest == {"type": "text", "text": " and done"}
    assert whole("")["content"] == []
    assert [block["type"] for block in whole(TEXTS[2])["content"]] == ["text", "tool_use", "tool_use"]
    assert [block["type"] for block in whole(TEXTS[2], single=True)["content"]] == ["text", "tool_use"]
    assert whole(TEXTS[3], parsed=False)["content"] == [{"type": "text", "text": TEXTS[3]}]


def test_a_call_that_was_cut_off_has_what_there_is_of_its_input() -> None:
    for text, found in [
        ('{"city": "Bonn", "day": "Mo', {"city": "Bonn"}),
        ('{"city": ["Bonn", "Pa', {"city": ["Bonn"]}),
        ("{", {}),
    ]:
        message = whole(f'<tool_call>{{"name": "weather", "arguments": {text}')
        assert (message["content"][0]["input"], message["stop_reason"]) == (found, "end_turn")
    for broken in (BROKEN, BROKEN.replace('{"a": tru}', "[1]"), BROKEN.replace('{"a": tru}', '"[1]"')):
        assert [block.get("input", {}) for block in whole(broken)["content"]] == [{}]


def test_ids_are_those_that_clients_or_templates_know() -> None:
    def ids(**options: Any) -> list[str]:
        blocks = writer(**options).whole([output(TEXTS[2], FinishReason.STOP)])["content"]
        return [block["id"] for block in blocks if "id" in block]

    assert len(set(ids())) == 2
    assert all(name.startswith("toolu_") for name in ids())
    assert [len(name) for name in ids(id_length=9)] == [9, 9]


@pytest.mark.parametrize(
    ("text", "finish", "stop", "reason"),
    [
        ("x", FinishReason.STOP, None, ("end_turn", None)),
        ("x", FinishReason.STOP, 5, ("end_turn", None)),
        ("x", FinishReason.STOP, "END", ("stop_sequence", "END")),
        ("x", FinishReason.LENGTH, None, ("max_tokens", None)),
        (WEATHER, FinishReason.STOP, None, ("tool_use", None)),
        (WEATHER[:-20], FinishReason.LENGTH, None, ("max_tokens", None)),
    ],
)
def test_why_it_ended(text: str, finish: FinishReason, stop: int | str | None, reason: tuple[str, str | None]) -> None:
    last = output(text, finish, stop_reason=stop)
    message = writer().whole([last])
    assert (message["stop_reason"], message["stop_sequence"]) == reason
    (changed,) = [event for event in events(writer(), [last]) if event["type"] == "message_delta"]
    assert tuple(changed["delta"].values()) == reason


def test_usage_tells_the_prompts_tokens_apart() -> None:
    parts = [output("ab", num_cached_tokens=4), output("cde", FinishReason.STOP, num_cached_tokens=4)]
    found = events(writer(), parts)
    expected = {"input_tokens": 6, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 0}
    assert found[0]["message"]["usage"] == {**expected, "output_tokens": 2}
    assert found[-2]["usage"] == {**expected, "output_tokens": 5}


def test_what_nobody_waits_for_any_more_is_no_fault() -> None:
    assert writer().whole([])["content"] == []


def test_an_error_is_an_event() -> None:
    made = writer()
    assert made.headers == {"Request-Id": "mine"}
    name, _, data = made.failure(QueueFullError("full")).strip().partition(b"\ndata: ")
    assert name == b"event: error"
    document = MessagesErrorResponse.model_validate_json(data)
    assert (document.error.type, document.request_id) == ("rate_limit_error", "mine")
