"""Calls that may be made, held to strict tools: whatever is generated, each call is one of theirs, and text is free."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from small_tokenizers import byte_level_backend

from llmctl.serving.protocol import ChatCompletionRequest, Tool
from llmctl.serving.tools.held import held_calls, why_not_held
from llmctl.serving.tools.support import ToolSupport
from llmctl.structured.compiler import CompiledGrammar, GrammarCompiler
from llmctl.text.output_parser.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    Layout,
    ReasoningFormat,
    ToolFormat,
    tool_format,
)
from llmctl.text.output_parser.parser import OutputParser
from llmctl.text.tokenizer import Tokenizer


def _tool(name: str, *, strict: bool = True, **properties: Any) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "strict": strict, "parameters": {**parameters, "additionalProperties": False}}
    return Tool.model_validate({"type": "function", "function": function})


TOOLS = [
    _tool("get_weather", city={"type": "string"}, unit={"enum": ["c", "f"]}),
    _tool("get", n={"type": "integer"}),
    _tool("loose", strict=False),
]
VALIDATORS = {
    tool.function.name: jsonschema_rs.Draft202012Validator(
        tool.function.parameters if tool.function.strict else {"type": "object"}
    )
    for tool in TOOLS
}
SCHEMAS = {tool.function.name: (tool.function.parameters or {})["properties"] for tool in TOOLS}
HELD = [row for row in TOOL_FORMATS if why_not_held(row) is None]
# By default one of each shape.
ROWS = [
    pytest.param(
        row,
        id=row.name,
        marks=[] if row.name in ("deepseek_v3", "hermes", "llama3_json", "mistral") else pytest.mark.slow,
    )
    for row in HELD
]
THINKS = REASONING_FORMATS[1]
# Of a call that is right, and of what is none, or one that the parser reads and that is not as it should be.
RIGHT = ('{"name": "get", "KEY": {"n": 5}}', '{"name":"get_weather","KEY":{"city":"x","unit":"c"}}')
WRONG = (
    *('{"name": "loose", "KEY": {}}', '{"name": "other", "KEY": {"n": 5}}', '{"name": "get", "KEY": {"n": "5"}}'),
    *('{"KEY": {"n": "5"}, "name": "get"}', '{"id": "a", "type": "x", "name": "get", "arguments": {"n": "x"}}'),
    *('{"na\\u006de": "get", "arguments": {"n": "x"}}', '{"name": "g\\u0065t", "arguments": {"n": "x"}}'),
    *('{"id": {"a": 1}, "name": "get", "arguments": {"n": "x"}}', '{"name": "get", "arguments": "{\\"n\\": 1.5}"}'),
    *('{"id": 1 "name": "get", "arguments": {"n": "x"}}', '{"name": "Alice", "age": 3}', '{"id": 1, "title": "x"}'),
)
FREE = (
    *("Just text.", "é — 你好 < <tool", "{", "[1, 2]", '{"name": "Alice", "age": 3}', '{"id": 1, "title": "x"}'),
    *('[{"foo": [1]}]', '{"type": "circle", "id": "a"}', " \n{}", 'so: {"name": "get"}', "[TOOL", "<|python_ta"),
)


class _Vocabulary:
    """A tokenizer; with ``special`` the markers are special tokens."""

    def __init__(self, row: ToolFormat, *, special: bool) -> None:
        backend = byte_level_backend()
        if special:
            backend.add_special_tokens([*row.begins, *filter(None, (row.end,)), *THINKS.markers])
        self.tokenizer = Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
        self.support = ToolSupport.of(self.tokenizer, None, tool_call_parser=row.name, reasoning_parser=THINKS.name)
        self.texts = [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]
        self.eos = set(self.tokenizer.eos_token_ids)
        hidden = set(self.tokenizer.special_token_ids) - {*self.marker_ids.values()}
        self._by_byte: dict[int, list[int]] = {}
        for i, text in enumerate(self.texts):
            if text and i not in hidden:
                self._by_byte.setdefault(text[0], []).append(i)
        self._compiler = GrammarCompiler(self.tokenizer, self.tokenizer.vocab_size, self.tokenizer.eos_token_ids)

    @property
    def marker_ids(self) -> dict[str, int]:
        return {**self.support.tool_markers, **self.support.reasoning_markers}

    def grammar(self, row: ToolFormat, reasoning: ReasoningFormat | None, **options: Any) -> CompiledGrammar:
        spec = held_calls(row, TOOLS, "tools", special_ids=self.marker_ids, reasoning=reasoning, **options)
        return self._compiler.submit(spec).result()

    def spelt(self, text: str, rng: random.Random) -> Iterator[int]:
        """Tokens of a text, any that fit."""
        data, at = text.encode(), 0
        while at < len(data):
            fits = [i for i in self._by_byte[data[at]] if data.startswith(self.texts[i], at)]
            yield (chosen := rng.choice(fits))
            at += len(self.texts[chosen])


@cache
def _vocabulary(row: ToolFormat, special: bool) -> _Vocabulary:
    return _Vocabulary(row, special=special)


def _outputs(row: ToolFormat) -> list[str]:
    """Answers with and without calls, right and wrong."""
    begin = row.begins[0] if row.begins else ""
    calls = [call.replace("KEY", row.arguments) for call in (*RIGHT, *WRONG)]
    made = [*FREE, f" {begin}"]
    for call in calls:
        for form in (call, f"[{call}]", f"[{call}, {calls[0]}]", f"{call}; {calls[1]}", f" \n{call}", f"[\t{call}]"):
            made += [form, f"{begin}{form}{row.end}", f"a {begin}{form}{row.end} b {begin}{calls[0]}{row.end}c"]
    for name in ("get", "get_weather", "other") if row.name_ends else ():
        call = f'{row.call_begin}{name}{row.name_ends[0]}{{"n": 5}}{row.call_end}'
        made += [f"{begin}{call}{row.end}", f"x{begin}{call}\n{call}{row.end}y{begin}", f'{begin}{name}{{"n": "5"}}']
    return made


def _walk(
    words: _Vocabulary, grammar: CompiledGrammar, text: str, rng: random.Random, most: int = 240
) -> tuple[list[int], bool, bool]:
    """An output that follows a text while it may, then anything that it may, with a preference for what closes: its
    tokens, whether it is over, and whether it is that text."""
    matcher, script, tokens, followed = grammar.matcher(), words.spelt(text, rng), list[int](), True
    row = np.zeros(-(-len(words.texts) // 32), np.uint32)
    while len(tokens) < most:
        matcher.fill(row)
        assert not matcher.problem
        allowed = set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())
        token = next(script, None)
        if token is None and allowed & words.eos:
            return tokens, True, followed
        if token not in allowed:
            followed = False
            if not (others := sorted(allowed - words.eos)):
                return tokens, True, followed
            closing = [i for i in others if words.texts[i] in (b'"', b"}", b"]")]
            token = rng.choice(closing if closing and rng.random() < 0.5 else others)
            if rng.random() < 0.5:
                script = iter(())
        tokens.append(token)
        if matcher.accept(token):
            return tokens, True, followed
    return tokens, False, followed


def _can_be_written(words: _Vocabulary, grammar: CompiledGrammar, text: str, rng: random.Random) -> bool:
    matcher, row = grammar.matcher(), np.zeros(-(-len(words.texts) // 32), np.uint32)
    for token in words.spelt(text, rng):
        matcher.fill(row)
        if not row[token // 32] >> token % 32 & 1:
            return False
        matcher.accept(token)
    return True


def _parsed(pieces: Sequence[str], parser: OutputParser) -> tuple[list[str], list[str], str]:
    """Names and arguments of the calls, and the text beside them."""
    found = [piece for text in pieces for piece in parser.push(text)] + parser.finish()
    names = [piece.text for piece in found if piece.kind == "name"]
    arguments = ["".join(p.text for p in found if p.kind == "arguments" and p.call == i) for i in range(len(names))]
    return names, arguments, "".join(piece.text for piece in found if piece.kind == "content")


@pytest.mark.parametrize("special", [False, True], ids=["spelt", "special"])
@pytest.mark.parametrize("row", ROWS)
def test_every_call_is_a_tools(row: ToolFormat, special: bool) -> None:
    assert _fuzz(row, special=special, count=2, seed=1)["calls"]


@pytest.mark.slow
@pytest.mark.parametrize("special", [False, True], ids=["spelt", "special"])
@pytest.mark.parametrize("row", HELD, ids=lambda row: row.name)
def test_every_call_is_a_tools_in_hundreds_of_answers(row: ToolFormat, special: bool) -> None:
    seen = _fuzz(row, special=special, count=60, seed=2)
    assert seen["calls"] > 40
    assert seen["over"] > 50
    assert seen["several"]


def _fuzz(row: ToolFormat, *, special: bool, count: int, seed: int) -> Counter[str]:
    rng, words = random.Random(seed), _vocabulary(row, special)
    seen: Counter[str] = Counter()
    for single, (reasoning, begun) in product((False, True), ((None, False), (THINKS, False), (THINKS, True))):
        grammar = words.grammar(row, reasoning, single=single, begun=begun)
        for _ in range(count):
            text = rng.choice(_outputs(row))
            if reasoning is not None:
                begin = rng.choice(["", "<think>", "\n<think>x", "x<think>", " <thi"])
                text = begin + rng.choice([f"hm {''.join(row.begins)}{{}} ", "", "</think>", "</think>\n\n"]) + text
            tokens, over, _ = _walk(words, grammar, text, rng)
            written = b"".join(words.texts[i] for i in tokens).decode(errors="ignore")
            names, arguments, content = _parsed([written], parser := OutputParser(row, SCHEMAS, reasoning, begun=begun))
            by_chars = _parsed(list(written), OutputParser(row, SCHEMAS, reasoning, begun=begun))
            assert by_chars == (names, arguments, content)
            for i, (name, made) in enumerate(zip(names, arguments, strict=True)):
                assert name in VALIDATORS, written
                if parser.complete[i]:
                    assert VALIDATORS[name].is_valid(json.loads(made)), written
                else:  # cut
                    assert not over, written
            assert not single or len(names) <= 1, written
            seen["calls"] += len(names)
            seen["several"] += len(names) > 1
            seen["over"] += over
    return seen


@pytest.mark.parametrize("row", ROWS)
def test_what_would_be_read_as_a_wrong_call_cannot_be_written(row: ToolFormat) -> None:
    rng, words, seen = random.Random(4), _vocabulary(row, special=False), Counter[str]()
    for reasoning, before in ((None, ""), (THINKS, "<think>x</think>")):
        grammar = words.grammar(row, reasoning, single=False)
        for text in _outputs(row):
            names, arguments, _ = _parsed([before + text], OutputParser(row, SCHEMAS, reasoning))
            right = all(
                name in VALIDATORS and VALIDATORS[name].is_valid(json.loads(made))
                for name, made in zip(names, arguments, strict=True)
            )
            seen["right" if right else "wrong"] += 1
            assert right or not _can_be_written(words, grammar, before + text, rng), text
    assert seen["right"] > 5
    assert seen["wrong"] > 5
    if row.begins and Layout.JSON in row.layouts:
        call = f"[{RIGHT[0]}]" if row.listed else RIGHT[0]
        once = row.begins[0] + call.replace("KEY", row.arguments) + row.end
        alone = words.grammar(row, None, single=True)
        assert _can_be_written(words, alone, once, rng)
        assert not _can_be_written(words, alone, f"{once} {row.begins[0]}", rng)


@pytest.mark.parametrize("special", [False, True], ids=["spelt", "special"])
@pytest.mark.parametrize("row", ROWS)
def test_text_and_right_calls_come_as_they_are(row: ToolFormat, special: bool) -> None:
    rng, words = random.Random(3), _vocabulary(row, special)
    begin = row.begins[0] if row.begins else ""
    (first, second), end = (call.replace("KEY", row.arguments) for call in RIGHT), row.end
    right = []
    if row.name_ends:
        call = f'{row.call_begin}get{row.name_ends[0]}{{"n": 5}}{row.call_end}'
        right = [(f"{begin}{call}{end}", 1), (f"Well. {begin}\n{call}\n{call}\n{end}", 2)][: 2 if row.call_end else 1]
    elif row.listed:
        right = [(f"{begin}[{first}, {second}]{end}", 2), (f"Well. {begin} [{first}]{end}", 1)]
    elif row.end:
        right = [(f"{begin}\n{first}\n{end}\n{begin}{second}{end}", 2), (f"Well. {begin}{first}{end} Done.", 1)]
    if row.bare:
        right += [(first, 1), (f"\n {second}", 1), (f"[{first}]", 1)]
        right.append((f"{first}; {second}" if row.separator == ";" else f"[{first}, {second}]", 2))
    for reasoning, before in ((None, ""), (THINKS, ""), (THINKS, f"<think>I {begin} wonder</think>\n\n")):
        grammar = words.grammar(row, reasoning, single=False)
        for text, calls in [(text, 0) for text in FREE] + right:
            tokens, over, followed = _walk(words, grammar, before + text, rng, most=1000)
            written = b"".join(words.texts[i] for i in tokens).decode()
            assert (written, over, followed) == (before + text, True, True)
            names, _, content = _parsed([written], OutputParser(row, SCHEMAS, reasoning))
            assert len(names) == calls
            assert calls or content.strip() == text.strip()


def test_what_cannot_be_held_is_said_with_its_reason() -> None:
    assert [row.name for row in TOOL_FORMATS if why_not_held(row)] == ["qwen3_coder", "phi4_mini_json", "pythonic"]
    tool = {"type": "function", "function": {"name": "f", "strict": True}}

    def use(parser: str, **fields: Any) -> tuple[Any, str | None]:
        asked = {"messages": [{"role": "user", "content": "a"}], "tools": [tool], **fields}
        body = ChatCompletionRequest.model_validate(asked)
        support = ToolSupport(tool_format(parser))
        support.traits = type(support.traits)(shows_tools=True)
        made = support.use(body)
        return made.answer_grammar(None, "a"), support.warning(body, made)

    grammar, said = use("hermes")
    assert (grammar.param, said) == ("tools", None)
    told = "tools: strict is enforced only where tool_choice demands a call: "
    assert use("pythonic") == (None, f"{told}the format pythonic writes arguments as Python")
    assert use("hermes", response_format={"type": "json_object"})[1] == f"{told}the answer is to match something else"
    assert use("hermes", tool_choice="none") == (None, None)
    assert use("hermes", tool_choice="required") == (None, None)
    del tool["function"]["strict"]  # type: ignore[attr-defined]
    assert use("pythonic") == (None, None)
