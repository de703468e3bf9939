"""Reasoning before an answer that is held to a grammar: it is free, has an end, and the answer after it matches."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from small_tokenizers import byte_level_backend
from tokenizers import AddedToken

from llmctl.errors import RequestError
from llmctl.serving.protocol import ChatCompletionRequest
from llmctl.serving.tools.support import ToolSupport
from llmctl.serving.tools.thinking import standing
from llmctl.structured.compiler import GrammarCompiler
from llmctl.structured.matcher import TokenMatcher
from llmctl.structured.spec import GrammarSpec, json_schema
from llmctl.text.output_parser.formats import reasoning_format
from llmctl.text.tokenizer import Tokenizer

PROPERTIES = {"a": {"type": "integer"}, "b": {"enum": ["<think>", "x"]}}
SCHEMA: dict[str, Any] = {"type": "object", "properties": PROPERTIES, "required": ["a"], "additionalProperties": False}
VALID = jsonschema_rs.Draft202012Validator(SCHEMA)
WORDS = ("the dog", "the fox")
SPECS = {
    "json": json_schema(SCHEMA, "response_format"),
    "choice": GrammarSpec("choice", json.dumps(WORDS)),
    "regex": GrammarSpec("regex", "the (dog|fox)"),
    "gbnf": GrammarSpec("gbnf", 'root ::= "the " ("dog" | "fox")'),
    "lark": GrammarSpec("lark", 'start: "the" animal\nanimal: "dog" | "fox"\n%ignore " "'),
}
ANSWERS = {"json": '{"a": 5, "b": "<think>"}', **dict.fromkeys(("choice", "regex", "gbnf", "lark"), "the fox")}
THOUGHTS = ("", "<think>", "\n<think>\nI wonder: ", "<think>{} the dog ", '<think>{"a"', "x <think>", "<thi")
MARKERS = ("spelt", "token", "special")
ENDS = ("", "</think>", "</think>\n\n", " </think> ", "</thin </think>\n")


class Words:
    """A tokenizer, and what a server makes of it. markers: special tokens, tokens of their own, or spelt."""

    def __init__(self, markers: str, parser: str) -> None:
        backend = byte_level_backend()
        row = reasoning_format(parser)
        if markers != "spelt":
            backend.add_tokens([AddedToken(text, special=markers == "special") for text in row.markers])
        self.tokenizer = Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
        self.support = ToolSupport.of(self.tokenizer, None, reasoning_parser=parser)
        self.texts = [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]
        self.eos = set(self.tokenizer.eos_token_ids)
        self._compiler = GrammarCompiler(self.tokenizer, self.tokenizer.vocab_size, self.eos)

    def matcher(self, spec: GrammarSpec, prompt: str = "", *, forcing: bool = False) -> TokenMatcher:
        found = self.support.use(request()).answer_grammar(spec, prompt)
        assert found is not None
        return self._compiler.submit(found, forcing=forcing).result().matcher()

    def allowed(self, found: TokenMatcher) -> set[int]:
        row = np.zeros(-(-len(self.texts) // 32), np.uint32)
        found.fill(row)
        assert not found.problem
        return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())

    def walk(self, found: TokenMatcher, text: str, rng: random.Random) -> tuple[str, bool]:
        """An output that follows a text while it may, then anything that it may: it, and whether it is over."""
        data, written, following = text.encode(), b"", True
        for _ in range(200):
            allowed = self.allowed(found)
            if allowed & self.eos and (not following or len(written) >= len(data)):
                return written.decode(errors="ignore"), True
            choices = sorted(i for i in allowed - self.eos if self.texts[i])
            fits = [i for i in choices if data.startswith(self.texts[i], len(written))] if following else []
            following = following and bool(fits) and len(written) < len(data)
            closing = [i for i in choices if self.texts[i] in (b'"', b"}")]
            token = rng.choice(fits if following else closing if closing and rng.random() < 0.5 else choices)
            written += self.texts[token]
            if found.accept(token):
                return written.decode(errors="ignore"), True
        return written.decode(errors="ignore"), False

    def read(self, text: str, prompt: str = "") -> tuple[str, str]:
        """Reasoning and content."""
        parser = self.support.use(request()).parser(prompt)
        assert parser is not None
        pieces = parser.push(text) + parser.finish()
        kinds = ("reasoning", "content")
        reasoning, content = ("".join(p.text for p in pieces if p.kind == kind) for kind in kinds)
        return reasoning, content


def request(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "a"}], **fields})


@cache
def words(markers: str, parser: str = "qwen3") -> Words:
    return Words(markers, parser)


def matches(name: str, text: str) -> bool:
    if name == "json":
        return bool(VALID.is_valid(json.loads(text)))
    # The grammar in Lark ignores spaces.
    return text in WORDS or (name == "lark" and text.replace(" ", "") in ("thedog", "thefox"))


def _fuzz(markers: str, parser: str, count: int) -> Counter[str]:
    rng, made, seen = random.Random(5), words(markers, parser), Counter[str]()
    for name, spec in SPECS.items():
        for prompt in ("", "<think>\n", "<think></think>"):
            for _ in range(count):
                text = rng.choice(THOUGHTS) + rng.choice(ENDS) + ANSWERS[name]
                output, over = made.walk(made.matcher(spec, prompt), text, rng)
                reasoning, content = made.read(output, prompt)
                seen["over"] += over
                seen["reasoned"] += bool(over and reasoning)
                seen["followed"] += output == text
                assert not over or matches(name, content), (name, prompt, output)
    return seen


@pytest.mark.parametrize("markers", MARKERS)
def test_what_is_over_has_an_answer_that_matches(markers: str) -> None:
    seen = _fuzz(markers, "qwen3", count=6)
    assert min(seen["over"], seen["reasoned"], seen["followed"]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("markers", MARKERS)
@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
def test_many_outputs_that_are_over_have_answers_that_match(markers: str, parser: str) -> None:
    assert _fuzz(markers, parser, count=150)["reasoned"] > 300


@pytest.mark.parametrize("markers", MARKERS)
@pytest.mark.parametrize("name", SPECS)
def test_every_way_to_an_answer(markers: str, name: str) -> None:
    made, rng = words(markers), random.Random(2)
    begun = ("<think></think>", "<think>\n{the [] é\n</think>\n\n", "<think> <think>x</think> ")
    for prompt, befores in (
        ("", ("", *(begun if markers != "spelt" else ()))),
        ("<think>\n", ("</think>", "I <think> the dog {\n</think>\n\n")),
        ("<think></think>", ("",)),
    ):
        for before in befores:
            text = before + ANSWERS[name]
            assert made.walk(made.matcher(SPECS[name], prompt), text, rng) == (text, True), (prompt, before)


def test_what_is_no_token_of_the_marker_begins_no_reasoning() -> None:
    """A model that would rather call ``<tool_call>`` is not led into ``<think>`` by their common beginning."""
    for markers in MARKERS:
        made = words(markers)
        (bracket,) = made.tokenizer.encode("<", add_special_tokens=False)
        allowed = made.allowed(made.matcher(SPECS["json"]))
        assert bracket not in allowed
        assert (made.support.reasoning_opener in allowed) == (markers != "spelt")


def test_reasoning_must_end_before_the_answer_does() -> None:
    made = words("spelt")
    found = made.matcher(SPECS["json"], "<think>")
    for token in made.tokenizer.encode('{"a": 1}', add_special_tokens=False):
        assert not made.allowed(found) & made.eos
        assert not found.accept(token)
    assert not made.allowed(found) & made.eos


def test_what_is_forced_after_reasoning_is_jumped_to() -> None:
    made = words("spelt")
    spec = GrammarSpec("regex", "[ab]the lazy dog sleeps")
    found = made.matcher(spec, "<think>", forcing=True)
    for token in made.tokenizer.encode("so</think>a", add_special_tokens=False):
        assert token in made.allowed(found)
        found.accept(token)
    assert b"".join(made.texts[i] for i in found.forced(30)).startswith(b"the lazy")


def test_a_grammar_that_is_none_is_refused_as_without_reasoning() -> None:
    made = words("spelt")
    for spec in (GrammarSpec("lark", 'start: "x" foo'), GrammarSpec("regex", ""), GrammarSpec("gbnf", "root ::= x")):
        said = []
        for prompt in ("<think></think>", "<think>", ""):
            with pytest.raises(RequestError) as caught:
                made.matcher(spec, prompt)
            said.append(str(caught.value))
        assert len(set(said)) == 1


def test_calls_that_must_be_made_come_after_reasoning() -> None:
    made, rng = words("special"), random.Random(3)
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    use = made.support.use(request(tools=[tool], tool_choice="required"))
    grammar = use.answer_grammar(use.grammar, "<think>\n")
    assert grammar is not None
    assert set(use.markers) == set(made.support.reasoning_markers.values())
    text = 'I must call f.</think>\n[{"name": "f", "arguments": {"a": 1}}]'
    found = made._compiler.submit(grammar).result().matcher()
    assert made.walk(found, text, rng) == (text, True)
    parser = use.parser("<think>\n")
    assert parser is not None
    pieces = [(piece.kind, piece.text) for piece in parser.push(text) + parser.finish()]
    assert pieces == [("reasoning", "I must call f."), ("name", "f"), ("arguments", '{"a": 1}')]


@pytest.mark.parametrize(
    ("prompt", "continued", "found"),
    [
        ("a<think>\n", None, (True, False)),
        ("a<think>\n\n</think>\n\n", None, (False, True)),
        ("a", None, (False, False)),
        ("a<think>", "The answer", (False, True)),
        ("a<think>x", "<think>x", (True, False)),
        ("a<think>x</think>y", "<think>x</think>y", (False, True)),
    ],
)
def test_where_reasoning_stands(prompt: str, continued: str | None, found: tuple[bool, bool]) -> None:
    assert standing(reasoning_format("qwen3"), prompt, continued) == found


def test_what_goes_on_with_a_message_of_the_assistants_is_no_reasoning() -> None:
    """Not even for a model that leaves the opening marker out."""
    support = words("spelt", parser="deepseek_r1").support
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is"}]
    for fields, kinds in (({"continue_final_message": True}, {"content"}), ({}, {"reasoning"})):
        parser = support.use(request(messages=messages, **fields)).parser("a")
        assert parser is not None
        assert {piece.kind for piece in parser.push(" 5.") + parser.finish()} == kinds
