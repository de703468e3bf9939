"""Grammars compiled: what each kind takes, what is refused and how, what is remembered, hostile ones."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

import numpy as np
import pytest
from small_tokenizers import byte_fallback, byte_level, metaspace

from llmctl.errors import RequestError
from llmctl.structured import compiler as compiling
from llmctl.structured.compiler import GrammarCompiler
from llmctl.structured.matcher import TokenMatcher
from llmctl.structured.spec import MAX_SOURCE_CHARS, GrammarSpec, Kind, json_object, json_schema
from llmctl.text.tokenizer import Tokenizer

CHOICES = ["a", "ab", 'q"\\\n', "[x](y)*+?.", "日本🙂"]
TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_ids
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, EOS)


def matcher(spec: GrammarSpec) -> TokenMatcher:
    return COMPILER.submit(spec).result().matcher()


def takes(spec: GrammarSpec, text: str) -> bool:
    found = matcher(spec)
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        found.accept(token)
    return found.complete and not found.problem


def allowed(found: TokenMatcher, size: int = TOKENIZER.vocab_size) -> set[int]:
    row = np.zeros(-(-size // 32), np.uint32)
    found.fill(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback(), metaspace()])
def test_a_mask_is_what_each_token_tried_alone_says(tokenizer: Tokenizer) -> None:
    """Padding, special tokens, tokens of parts of characters: all in one vocabulary, a few ids wider than it."""
    size = tokenizer.vocab_size + 5
    compiler = GrammarCompiler(tokenizer, size, tokenizer.eos_token_ids)
    schema = {"type": "object", "properties": {"é": {"type": "string"}, "n": {"type": "number"}}, "required": ["n"]}
    rng = np.random.default_rng(3)
    specs = [GrammarSpec("regex", "(fox|dog|你好|[a-z ]{3,9})+"), json_schema(schema, "x")]
    for spec in specs[: 1 if tokenizer is metaspace() else 2]:  # which has no braces
        found = compiler.submit(spec).result().matcher()
        for _ in range(15):
            mask = allowed(found, size)
            tried = {i for i in range(size) if _may_come(found, i)} - tokenizer.special_token_ids
            assert (mask >= tokenizer.eos_token_ids) == found.complete
            mask -= tokenizer.eos_token_ids
            assert mask == tried
            if not tried or found.accept(int(rng.choice(sorted(tried)))):
                break


def test_of_text_that_can_only_be_one_every_beginning_is_allowed() -> None:
    spelt = {i: TOKENIZER.token_bytes(i) for i in range(TOKENIZER.vocab_size)}
    beginnings = {i for i, data in spelt.items() if data and b"the fox".startswith(data)}
    assert len(beginnings) > 1
    assert allowed(matcher(GrammarSpec("regex", "the fox"))) == beginnings


def _may_come(found: TokenMatcher, token: int) -> bool:
    return bool(found._matcher.validate_tokens([token]))


def test_a_model_without_an_end_of_sequence_ends_with_its_grammar() -> None:
    for size in (TOKENIZER.vocab_size, -(-TOKENIZER.vocab_size // 32) * 32):
        compiler = GrammarCompiler(TOKENIZER, size, ())
        found = compiler.submit(GrammarSpec("regex", "fox|the")).result().matcher()
        mask = allowed(found, size)
        assert mask
        assert max(mask) < TOKENIZER.vocab_size
        tokens = TOKENIZER.encode("the", add_special_tokens=False)
        assert [found.accept(token) for token in tokens] == [False] * (len(tokens) - 1) + [True]


@pytest.mark.parametrize(
    ("kind", "source", "yes", "no"),
    [
        ("regex", "[0-9]{2}|x.y", ["12", "xäy"], ["1", "x\ny", "12 "]),
        ("regex", "^a$|^b$", ["a", "b"], ["ab"]),
        ("choice", json.dumps(CHOICES), CHOICES, ["b", "aab", "[x](y)+?."]),
        ("lark", 'start: "a" B\nB: /[0-9]{3}/', ["a123"], ["a12", "a1234"]),
        ("gbnf", 'root ::= "a" [0-9]', ["a1"], ["a"]),
    ],
)  # fmt: skip
def test_kinds(kind: Kind, source: str, yes: list[str], no: list[str]) -> None:
    assert [takes(GrammarSpec(kind, source), text) for text in yes] == [True] * len(yes)
    assert [takes(GrammarSpec(kind, source), text) for text in no] == [False] * len(no)


def test_white_space_of_json_is_bounded() -> None:
    indented = json.dumps({"a": [1, {"b": "c"}]}, indent=2)
    assert all(takes(json_object("x"), text) for text in ('{"a":1}', '{"a": 1, "b": 2}', indented, '{\n\n"a":1}'))
    assert not any(takes(json_object("x"), text) for text in ('{\n\n\n"a":1}', '{"a":  1}', ' {"a":1}', '{"a":1}\n'))
    assert not takes(json_object("x"), "{\n" + " " * 21 + '"a":1}')


def test_a_name_that_is_spelt_out_cannot_come_under_another_spelling() -> None:
    """An additional property's name may be anything else: if an escape could spell it, the schema would not hold."""
    for name, spelling in (("a", "\\u0061"), ("/", "\\/"), ("\n", "\\u000a"), ("\x1f", "\\u001F")):
        schema = {"type": "object", "properties": {name: {"type": "string"}}}
        assert json.loads(f'"{spelling}"') == name
        assert not takes(json_schema(schema, "x"), f'{{"{spelling}":1}}')


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"if": {}, "then": {"minLength": 1}}, "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "format": "flight-number"}, "flight-number"),
        ({"type": "string", "pattern": "a(?=b)"}, "look-ahead"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        ({"type": "text"}, "text"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "cannot be enforced"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"items": {"anyOf": [{"properties": {"a": {"type": "object", "minProperties": 3}}}]}}, "minProperties"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        matcher(json_schema(schema, "guided_json"))
    assert caught.value.param == "guided_json"
    assert "\n" not in str(caught.value)
    assert "%" not in str(caught.value), "what was made of it is shown"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "minProperties": 1},
        {"type": "object", "minProperties": 2, "required": ["a", "b"], "properties": {"a": {}, "b": {}}},
        {"type": "object", "properties": {"minProperties": {"const": 7}}, "required": ["minProperties"]},
        {"const": {"minProperties": 5}},
    ],
)
def test_counts_of_properties_that_hold_are_taken(schema: dict[str, Any]) -> None:
    assert allowed(matcher(json_schema(schema, "x")))


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("regex", "(a", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "", "the empty text only"),
        ("regex", "a^b", "cannot be enforced"),
        ("choice", '[""]', "the empty text only"),
        ("lark", 'start: "a" b\nb: "x" foo', r"at 2\(4\): unknown name: \"foo\"$"),
        ("gbnf", "root ::= x", "rule 'x' is not defined"),
    ],
)
def test_grammars_that_are_none(kind: Kind, source: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        matcher(GrammarSpec(kind, source))


def test_sources_are_bounded() -> None:
    with pytest.raises(RequestError, match=f"at most {MAX_SOURCE_CHARS} characters, found {MAX_SOURCE_CHARS + 1}"):
        GrammarSpec("regex", "x" * (MAX_SOURCE_CHARS + 1))
    with pytest.raises(RequestError, match="not valid Unicode"):
        GrammarSpec("regex", "\ud800")


def _chain(count: int) -> str:
    links = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(count)}
    return json.dumps({"$ref": "#/$defs/0", "$defs": {**links, str(count): {}}}, separators=(",", ":"))


CHAIN = "start: r0\n" + "".join(f"r{i}:r{i + 1}\n" for i in range(5400)) + 'r5400:"a"\n'


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("lark", CHAIN, None),  # 8 MiB of stack overflow on these two
        ("json_schema", _chain(700), None),
        ("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000, "recursion"),
        ("regex", "(" * 30000 + "a" + ")" * 30000, "cannot be enforced"),
        ("regex", "(a*)*" * 10000, "too big"),
        ("regex", "(.{1,1000}){1,1000}", ""),
        ("regex", "(a|b)*a(a|b){20}", None),
        ("gbnf", "root ::= x*\nx ::= [a-z] | [a-z] [a-z] | [a-z ]* y\ny ::= x | [^0-9]*\n", ""),
    ],
)
def test_hostile_grammars_are_compiled_or_refused(kind: Kind, source: str, said: str | None) -> None:
    assert len(source) <= MAX_SOURCE_CHARS
    if said is None:
        assert allowed(matcher(GrammarSpec(kind, source)))
    elif said:
        with pytest.raises(RequestError, match=said):
            matcher(GrammarSpec(kind, source))
    else:  # it depends on the vocabulary
        with contextlib.suppress(RequestError):
            matcher(GrammarSpec(kind, source))


def test_a_grammar_that_takes_long_for_a_token_is_refused_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GrammarSpec("regex", "[a-z]+ once more")
    found = matcher(spec)
    monkeypatch.setattr(compiling, "STEP_SECONDS", -1.0)
    with pytest.raises(RequestError, match="for a token"):
        GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, EOS).submit(spec).result()
    monkeypatch.setattr("llmctl.structured.matcher.STEP_SECONDS", -1.0)
    assert not found.problem
    allowed(found)
    assert "for a token" in found.problem


def test_the_latest_grammars_are_remembered_refusals_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MAX_CACHED", 2)
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, EOS)
    first, bad = GrammarSpec("regex", "a"), GrammarSpec("regex", "(a")
    kept = compiler.submit(first)
    refused = compiler.submit(bad)
    assert compiler.submit(GrammarSpec("regex", "a", "another_field")) is kept
    assert compiler.submit(bad) is refused
    compiler.submit(GrammarSpec("regex", "b"))  # the oldest use is the first's
    assert compiler.submit(bad) is refused
    assert compiler.submit(first) is not kept
    monkeypatch.setattr(compiling, "MAX_CACHED_CHARS", 2)
    again = compiler.submit(first)
    compiler.submit(GrammarSpec("regex", "bc"))
    assert compiler.submit(first) is not again


def test_a_grammar_may_be_compiled_twice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no longer remembered while it is compiled, where many come."""
    compiler, spec = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, EOS), GrammarSpec("regex", "ab")
    both, compile_ = threading.Barrier(compiling.THREADS), compiler.compile

    def meet(spec: GrammarSpec, forcing: bool) -> compiling.CompiledGrammar:
        both.wait(timeout=60)
        return compile_(spec, forcing)

    monkeypatch.setattr(compiler, "compile", meet)
    futures = [compiler.submit(spec)]
    compiler._cache.clear()
    futures.append(compiler.submit(spec))
    assert all(future.result().matcher() for future in futures)
    assert not compiler._clocks


def test_matchers_of_one_grammar_are_independent() -> None:
    compiled = COMPILER.submit(GrammarSpec("regex", "ab|cd")).result()
    one, other = compiled.matcher(), compiled.matcher()
    before = allowed(other)
    one.accept(TOKENIZER.encode("a", add_special_tokens=False)[0])
    assert allowed(other) == before
    assert allowed(one) != before


def test_the_vocabulary_is_made_before_there_is_a_grammar() -> None:
    """It takes long in threads that wait for the engine, and a grammar has a deadline."""
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, EOS)
    compiler._pool.shutdown(wait=True)
    assert "_vocabulary" in vars(compiler)
