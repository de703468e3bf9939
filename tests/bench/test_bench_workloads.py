"""Prompts: exact lengths, all different, the same for the same seed; files; arrivals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fake_openai_server import count_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.bench.arrivals import arrival_times
from llmctl.bench.workloads import LengthRange, SharedPrefixes, WorkItem, file_items, random_items, sharegpt_items
from llmctl.errors import UsageError


def counter(texts: Sequence[str]) -> list[int]:
    return [count_tokens(text) for text in texts]


lengths = st.tuples(st.integers(1, 60), st.integers(0, 60)).map(lambda t: LengthRange(t[0], t[0] + t[1]))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25), lengths, st.integers(0, 2**31))
def test_random_prompts_have_exactly_the_length_asked(count: int, span: LengthRange, seed: int) -> None:
    items = random_items(count, span, span, seed=seed, stream=0, counter=counter)
    assert len(items) == count
    for item in items:
        assert item.exact
        assert count_tokens(item.prompt) == item.input_tokens
        assert span.low <= item.input_tokens <= span.high
        assert span.low <= item.output_tokens <= span.high


TOKENIZERS = {
    "a token a byte": lambda text: len(text.encode()),
    "three bytes a token": lambda text: -(-len(text) // 3),
    "with a first token": lambda text: 1 + count_tokens(text),
    "pairs of words": lambda text: -(-len(text.split()) // 2),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_lengths_are_exact_whatever_the_tokenizer(name: str) -> None:
    count = TOKENIZERS[name]
    span = LengthRange(12, 300)
    items = random_items(50, span, span, seed=3, stream=0, counter=lambda texts: [count(t) for t in texts])
    assert all(i.exact for i in items)
    assert all(count(i.prompt) == i.input_tokens for i in items)
    assert len({i.prompt for i in items}) == 50


def test_repeats_do_the_same_amount_of_work_with_other_words() -> None:
    span = LengthRange(16, 64)
    one, again, other = (random_items(20, span, span, seed=1, stream=s, counter=counter) for s in (0, 0, 1))
    assert one == again
    assert [i.input_tokens for i in one] == [i.input_tokens for i in other]
    assert [i.output_tokens for i in one] == [i.output_tokens for i in other]
    prompts = {i.prompt for i in one} | {i.prompt for i in other}
    assert len(prompts) == 40
    assert len({" ".join(p.split()[:4]) for p in prompts}) == 40, "prompts share a beginning"
    assert random_items(20, span, span, seed=2, stream=0, counter=counter) != one


def test_a_tokenizer_that_cannot_be_so_short_gives_true_lengths() -> None:
    items = random_items(3, LengthRange(2, 2), LengthRange(1, 1), seed=0, stream=0, counter=lambda ts: [9] * len(ts))
    assert [(i.input_tokens, i.exact) for i in items] == [(9, False)] * 3


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_share_their_beginnings(name: str) -> None:
    count = TOKENIZERS[name]
    prefixes, span = SharedPrefixes(tokens=40, count=2), LengthRange(8, 30)

    def items(stream: int) -> list[WorkItem]:
        return random_items(
            20, span, span, seed=3, stream=stream, counter=lambda ts: [count(t) for t in ts], prefixes=prefixes
        )

    found = items(0)
    assert all(item.exact and count(item.prompt) == item.input_tokens for item in found)
    own = [item.input_tokens for item in random_items(20, span, span, seed=3, stream=0, counter=None)]
    assert [item.input_tokens for item in found] == [40 + n for n in own]
    words = [item.prompt.split() for item in found]
    for mine in (words[0::2], words[1::2]):
        shared = next(i for i, column in enumerate(zip(*mine, strict=False)) if len(set(column)) > 1)
        assert count(" ".join(mine[0][:shared])) >= 40
    assert words[0][:4] != words[1][:4]
    assert len({item.prompt for item in found}) == 20
    assert items(1)[0].prompt[:20] != found[0].prompt[:20], "a repeat finds no prefix of the one before"


def test_without_a_tokenizer_a_word_is_a_token() -> None:
    items = random_items(5, LengthRange(7, 7), LengthRange(1, 1), seed=0, stream=0, counter=None)
    assert {len(i.prompt.split()) for i in items} == {7}
    assert not any(i.exact for i in items)


@pytest.mark.parametrize("text", ["", "0", "-5", "9-3", "a", "1-2-3", "4-", "-", "3.5"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(UsageError, match="--input-len"):
        LengthRange.parse(text, "input_len")


def test_lengths_round_trip() -> None:
    assert str(LengthRange.parse("32-256", "x")) == "32-256"
    assert str(LengthRange.parse("128", "x")) == "128"


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("first prompt\n\nsecond\n")
    items = file_items(path, 5, LengthRange(3, 3), seed=0, counter=counter)
    assert [i.prompt for i in items] == ["first prompt", "second", "first prompt", "second", "first prompt"]
    assert [i.input_tokens for i in items[:2]] == [2, 1]
    assert {i.output_tokens for i in items} == {3}


def test_jsonl_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    messages = [{"role": "user", "content": "hi there"}]
    rows = [{"prompt": "a b", "output_len": 9}, {"text": "c"}, {"messages": messages, "max_tokens": 2}]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    items = file_items(path, 3, LengthRange(4, 4), seed=0, counter=None)
    assert [i.output_tokens for i in items] == [9, 4, 2]
    assert items[2].messages == tuple(messages)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "\n\n", "no prompts"),
        ("p.jsonl", "{", ":1: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n[1]', ":2: expected an object"),
        ("p.jsonl", '{"question": "a"}', ":1: expected 'prompt'"),
        ("p.jsonl", '{"prompt": 5}', ":1: expected 'prompt'"),
        ("p.jsonl", '{"prompt": "a", "output_len": 0}', "output_len: expected a positive"),
        ("p.jsonl", '{"messages": []}', "messages: expected a list"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        file_items(path, 2, LengthRange(1, 1), seed=0, counter=None)


def test_a_missing_file() -> None:
    with pytest.raises(UsageError, match="No such file"):
        file_items(Path("/nowhere/p.txt"), 2, LengthRange(1, 1), seed=0, counter=None)


@pytest.mark.parametrize("as_lines", [True, False])
def test_sharegpt(tmp_path: Path, as_lines: bool) -> None:
    def row(a: str, b: str) -> dict[str, object]:
        return {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]}

    rows = [row("one", "x y z"), {"conversations": [{"value": "alone"}]}, row("two words", "w")]
    path = tmp_path / "s.json"
    path.write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    items = sharegpt_items(path, 4, None, seed=0, counter=counter)
    assert {(i.prompt, i.output_tokens) for i in items} == {("one", 3), ("two words", 1)}
    assert items == sharegpt_items(path, 4, None, seed=0, counter=counter)
    assert {i.output_tokens for i in sharegpt_items(path, 4, LengthRange(7, 7), seed=0, counter=None)} == {7}


def test_sharegpt_without_conversations(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('[{"conversations": []}]')
    with pytest.raises(UsageError, match="no conversation"):
        sharegpt_items(path, 1, None, seed=0, counter=None)


@given(st.integers(1, 200), st.floats(0.01, 1e4), st.floats(0.05, 50), st.integers(0, 2**31))
def test_arrivals_ascend_and_offer_exactly_the_rate(count: int, rate: float, burstiness: float, seed: int) -> None:
    times = arrival_times(count, rate, burstiness, seed)
    assert len(times) == count
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] == pytest.approx(count / rate)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness: float) -> None:
    gaps = np.diff([0.0, *arrival_times(40_000, 10.0, burstiness, 7)])
    assert gaps.mean() == pytest.approx(0.1, rel=1e-6)
    # Coefficient of variation of a gamma distribution: 1 / sqrt(shape).
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)


def test_even_and_immediate_arrivals() -> None:
    assert arrival_times(3, 2.0, math.inf, 0) == [0.5, 1.0, 1.5]
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0), (1, math.nan)])
def test_bad_rates(rate: float, burstiness: float) -> None:
    with pytest.raises(UsageError):
        arrival_times(3, rate, burstiness, 0)
