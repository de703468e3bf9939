"""Answers taken apart: every format, whatever the text was cut into, and text that is no call."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.text.output_parser.cursor import Cursor
from llmctl.text.output_parser.formats import TOOL_FORMATS, reasoning_format, tool_format
from llmctl.text.output_parser.parser import OutputParser

TOOLS = {"f": {"a": {"type": "integer"}, "s": {"type": "string"}, "o": {"type": "object"}, "x": {}}, "g": {}}
ARGUMENTS = [
    {},
    {"a": 1},
    {"s": 'quotes " and \\ and {braces}] and </tool_call> and é🎉\n'},
    {"o": {"deep": [{"er": [[], {}, "]}"]}, None, True, 1.5]}, "a": -3},
]
DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
)


@dataclass
class Message:
    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    complete: list[bool] = field(default_factory=list)

    @property
    def parsed(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def read(row: str | None, pieces: Iterable[str], reasoning: str | None = None, **options: bool) -> Message:
    parser = OutputParser(
        tool_format(row) if row else None,
        TOOLS if row else None,
        reasoning_format(reasoning) if reasoning else None,
        **options,
    )
    message = Message()
    found = [piece for text in pieces for piece in parser.push(text)] + parser.finish()
    for kind, text, call in found:
        assert text
        if kind == "name":
            assert call == len(message.calls)
            message.calls.append([text, ""])
        elif kind == "arguments":
            message.calls[call][1] += text
        else:
            setattr(message, kind, getattr(message, kind) + text)
    message.complete = parser.complete
    return message


def written(row: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as a model that knows the format writes them."""
    objects = [json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) for name, arguments in calls]
    texts = [(name, json.dumps(arguments)) for name, arguments in calls]
    begin, end, call, separator, call_end = DEEPSEEK
    match row:
        case "hermes":
            return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
        case "llama3_json":
            return "; ".join(text.replace('"arguments"', '"parameters"', 1) for text in objects)
        case "mistral":
            return f"[TOOL_CALLS][{', '.join(objects)}]"
        case "json":
            return f"[{', '.join(objects)}]"
        case "granite":
            return f"<|tool_call|>[{', '.join(objects)}]"
        case "jamba":
            return f"<tool_calls>[{', '.join(objects)}]</tool_calls>"
        case "phi4_mini_json":
            return f"functools[{', '.join(objects)}]"
        case "pythonic":
            made = [f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})" for name, arguments in calls]
            return f"[{', '.join(made)}]"
        case "deepseek_v3":
            made = [f"{call}function{separator}{name}\n```json\n{text}\n```{call_end}" for name, text in texts]
            return begin + "\n".join(made) + end
        case "deepseek_v31":
            return begin + "".join(f"{call}{name}{separator}{text}{call_end}" for name, text in texts) + end
        case "qwen3_coder":
            return "\n".join(_tagged(name, arguments) for name, arguments in calls)
    raise AssertionError(row)


def _tagged(name: str, given: dict[str, Any]) -> str:
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    made = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{made}</function>\n</tool_call>"


ROWS = [row.name for row in TOOL_FORMATS]
OTHERS = [
    (
        "mistral",
        'ok [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{"b": {"c": 2}}',
        "ok",
        [("f", {"a": 1}), ("g", {"b": {"c": 2}})],
    ),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1} and {"x": 1}', ' and {"x": 1}', [("f", {"a": 1})]),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "id": [1], "name": "f"}</tool_call>', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>.', ".", [("f", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}', "", [("unknown", {})]),
    (
        "qwen3_coder",
        "<function=f><parameter=s>1</parameter><parameter=a>1</parameter></function>",
        "",
        [("f", {"s": "1", "a": 1})],
    ),
    ("qwen3_coder", _tagged("f", {"x": [1]}) + "\nbye", "\nbye", [("f", {"x": [1]})]),
    (
        "pythonic",
        "[f(s='it\\'s', a=-1, x={'k': (1, None)}), g()] done",
        " done",
        [("f", {"s": "it's", "a": -1, "x": {"k": [1, None]}}), ("g", {})],
    ),
    ("pythonic", "[f(x=true, s=null)]", "", [("f", {"x": True, "s": None})]),
]
NO_CALLS = {
    "hermes": [
        *(
            "",
            "<tool_ca",
            "<tool_call>",
            "<tool_call>what</tool_call>",
            "a <tool_call>{",
            " <tool_call>[]</tool_call>\n",
        ),
        *(
            '<tool_call>{"name": "f", "argum',
            '<tool_call>{"name": 1, "arguments": {}}',
            '<tool_call>{"name": "\\ud800"}',
        ),
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
    ],
    "json": ['{"answer": 42} ', '[{"name": "Bob", "arguments": {}}]', 'is {"name": "f", "arguments": {}}'],
    "llama3_json": ['{"name": "f", "parameters": 5}'],
    "pythonic": [
        *("[f(1)]", "[1, 2]", "[Bob(a=1)]", "f(a=1)", "[f(a=1", "[f(a=b'')]", "[f(a=" + "(" * 100 + "1)]"),
    ],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS] a b {}", "[TOOL_CALLS]f[CALL_ID]x", "[TOOL_CALLS]" + "f" * 260],
    "qwen3_coder": ["<function=f>", "<tool_call>\n<function=", "<tool_call><function=a b></function>"],
    "deepseek_v3": [DEEPSEEK[0], DEEPSEEK[0] + "x", f"{DEEPSEEK[0]}{DEEPSEEK[2]}function{DEEPSEEK[3]}f"],
}
BROKEN = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1', [["f", '{"a": [1']], ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1]} x', [["f", '{"a": 1']], "]} x"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tru e}}</tool_call>', [["f", '{"a": tru e}']], ""),
    ("pythonic", "[f(a=1, s=oops)] x", [["f", '{"a": 1']], ")] x"),
    ("qwen3_coder", "<tool_call><function=f><parameter=s>\nab\nc", [["f", '{"s": "ab\\nc']], ""),
]


def every_cut(text: str) -> Iterable[list[str]]:
    yield list(text)
    for at in range(len(text) + 1):
        yield [text[:at], text[at:]]


@pytest.mark.parametrize("row", ROWS)
def test_calls_come_back_as_they_were_written(row: str) -> None:
    for calls in ([("f", arguments)] for arguments in ARGUMENTS):
        assert read(row, [written(row, calls)]).parsed == calls
    for before, after in ((" Let me see.\n\n", "\n"), ("", ""), ("", "\nThere.")):
        calls = [("f", ARGUMENTS[2]), ("g", {}), ("f", ARGUMENTS[3])]
        bare_only = tool_format(row).bare and before
        message = read(row, [before + written(row, calls) + after])
        if not bare_only:
            assert message.parsed == calls
            assert message.complete == [True] * 3
            assert message.content == before.rstrip() + after.rstrip()


@pytest.mark.parametrize("row", ROWS)
def test_no_cut_changes_the_message(row: str) -> None:
    text = written(row, [("f", ARGUMENTS[2]), ("f", ARGUMENTS[3])]) + "\nand text"
    whole = read(row, [text])
    assert len(whole.calls) == 2
    for pieces in every_cut(text):
        assert read(row, pieces) == whole
    for at in range(len(text)):  # however it is cut off
        assert read(row, list(text[:at])) == read(row, [text[:at]])


@pytest.mark.parametrize(("row", "text", "content", "calls"), OTHERS)
def test_other_spellings(row: str, text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    message = read(row, [text])
    assert (message.content, message.parsed, all(message.complete)) == (content, calls, True)
    assert all(read(row, pieces) == message for pieces in every_cut(text))


@pytest.mark.parametrize(("row", "text"), [(row, text) for row, texts in NO_CALLS.items() for text in texts])
def test_what_is_no_call_is_text_to_the_letter(row: str, text: str) -> None:
    for pieces in every_cut(text):
        assert read(row, pieces) == Message(content=text)


@pytest.mark.parametrize(("row", "text", "calls", "content"), BROKEN)
def test_a_call_that_breaks_off_keeps_what_it_has(row: str, text: str, calls: list[list[str]], content: str) -> None:
    for pieces in every_cut(text):
        assert read(row, pieces) == Message(content, calls=calls, complete=[False])


@pytest.mark.parametrize(("row", "text"), [(row, written(row, [("f", ARGUMENTS[3])])) for row in ROWS])
def test_arguments_come_before_they_are_over(row: str, text: str) -> None:
    parser = OutputParser(tool_format(row), TOOLS)
    events = [(at, piece.kind) for at, char in enumerate(text) for piece in parser.push(char)]
    first = next(at for at, kind in events if kind == "arguments")
    assert events[0][1] == "name"
    assert first < len(text) - 5
    assert sum(kind == "arguments" for _, kind in events) > 1


NOISE = [
    *(piece for row in TOOL_FORMATS for piece in row.markers),
    *('{"name": "f"', ', "arguments": {', '"parameters": ', "}", "]", "[", ",", ";", '"', "\\", "'", "f(", "a=1", ")"),
    *(" ", "\n"),
    *("<parameter=s>", "</parameter>", ">", "f", "é", "🎉", "<think>", "</think>", "text"),
]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(NOISE), max_size=12), st.sampled_from(ROWS), st.booleans(), st.integers(0, 2**32))
def test_noise_is_read_alike_however_it_is_cut_and_never_lost(
    parts: list[str], row: str, thinks: bool, seed: int
) -> None:
    text = "".join(parts)
    reasoning = "qwen3" if thinks else None
    whole = read(row, [text], reasoning)
    assert read(row, list(text), reasoning) == whole
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(4))
    assert read(row, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)], reasoning) == whole
    if not whole.calls and not thinks:
        assert whole.content == text


@pytest.mark.parametrize(
    ("text", "row", "options", "reasoning", "content"),
    [
        ("<think>\nhm </thin\n</think>\n\nHi", "qwen3", {}, "hm </thin", "Hi"),
        ("hm\n</think>\nHi", "qwen3", {"begun": True}, "hm", "Hi"),
        ("hm</think>Hi", "deepseek_r1", {}, "hm", "Hi"),
        ("Hi", "deepseek_r1", {"closed": True}, "", "Hi"),
        (" Hi <think>", "qwen3", {}, "", " Hi <think>"),
        ("<think> never ends", "qwen3", {}, "never ends", ""),
        ("[THINK]hm[/THINK]Hi", "mistral", {}, "hm", "Hi"),
    ],
)
def test_reasoning(text: str, row: str, options: dict[str, bool], reasoning: str, content: str) -> None:
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    for pieces in every_cut(text):
        assert read(None, pieces, row, **options) == Message(content, reasoning)
        assert read("hermes", pieces, row, **options) == Message(content, reasoning)
    if content:
        message = read("hermes", list(text + call), row, **options)
        assert (message.reasoning, message.content, message.parsed) == (reasoning, content, [("f", {"a": 1})])


def _read_space(size: int) -> None:
    assert read("hermes", [" " * size + "x"]).content.endswith(" x")


def _read_markers(size: int) -> None:
    cursor = Cursor()
    cursor.feed("bb" * size)
    for _ in range(size):
        assert next(cursor.until(("bb", "bz"), pytest.fail), None) is None
    assert not cursor.take(1)


@pytest.mark.parametrize("work", [_read_space, _read_markers])
def test_a_whole_answer_takes_time_by_its_length(work: Callable[[int], None]) -> None:
    """It is read in the event loop, and may be as long as the context."""

    def seconds(size: int) -> float:
        before = time.process_time()
        work(size)
        return time.process_time() - before

    short = min(seconds(1000) for _ in range(3))
    assert min(seconds(16_000) for _ in range(3)) < 60 * short
