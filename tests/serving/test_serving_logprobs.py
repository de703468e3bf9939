"""Log-probabilities in answers: names, bytes, offsets, and the shapes of OpenAI's and vLLM's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from fixtures import LOOP_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import TEXT, byte_fallback, byte_level, metaspace

from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.output import OutputProcessor, TextOutput, TokenText
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import TokenLogprobs, TokenScores
from llmctl.serving.intake import Prompt
from llmctl.serving.logprobs import (
    chat_logprobs,
    completion_logprobs,
    echoed_positions,
    prompt_logprobs,
    shown,
)
from llmctl.text.tokenizer import Tokenizer

UNKNOWN = 5000
"""An id of an embedding that is padded beyond its tokenizer."""
TOKENIZERS = [byte_level, byte_fallback, metaspace]


def output_of(tokenizer: Tokenizer, step: TokenOutput, **params: int) -> TextOutput:
    processor = OutputProcessor(tokenizer)
    processor.add("id", [5], SamplingParams(**params))
    (output,) = processor.process([step]).outputs
    return output


def one_position(tokenizer: Tokenizer, token_id: int, entry: TokenLogprobs) -> TextOutput:
    return output_of(tokenizer, TokenOutput("id", (token_id,), (entry,)), logprobs=len(entry.top_ids))


def scores_of(count: int, top: int, first_id: int = 0) -> TokenScores:
    scores = TokenScores.zeros(count, top)
    scores.logprobs[:] = -1 - np.arange(count)
    scores.ranks[:] = 1 + np.arange(count)
    scores.top_ids[:] = first_id + np.arange(top)
    scores.top_logprobs[:] = -0.5 - np.arange(top)
    return scores


def test_parts_of_characters_go_by_their_bytes() -> None:
    tokenizer = byte_level()
    first, second = (tokenizer.token_to_id(c) for c in ("Ã", "©"))  # the bytes of é
    assert first is not None
    assert second is not None
    output = one_position(tokenizer, first, TokenLogprobs(-0.5, 1, (first, second), (-0.5, -math.inf)))
    chat = chat_logprobs(output.logprobs)
    assert chat is not None
    (entry,) = chat["content"]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("bytes:\\xc3", [0xC3], -0.5)
    assert [t["logprob"] for t in entry["top_logprobs"]] == [-0.5, -9999.0]
    body = completion_logprobs(output.logprobs or ())
    assert body["top_logprobs"] == [{"bytes:\\xc3": -0.5, "bytes:\\xa9": -9999.0}]
    json.loads(msgspec.json.encode(body))


def test_a_token_that_is_the_replacement_character_is_text() -> None:
    assert shown(TokenText(5, "\ufffd", "\ufffd".encode(), -1.0, 1)) == "\ufffd"
    assert shown(TokenText(5, "\ufffd", b"\xef", -1.0, 1)) == "bytes:\\xef"


def test_tokens_of_one_text_are_kept_apart() -> None:
    """``A`` and ``<0x61>`` are both the text a: the position's own keeps the name, whatever its rank."""
    tokenizer = byte_fallback()
    letter, byte = tokenizer.token_to_id("a"), tokenizer.token_to_id("<0x61>")
    assert letter is not None
    assert byte is not None
    output = one_position(tokenizer, letter, TokenLogprobs(-2.0, 2, (byte, letter), (-0.5, -2.0)))
    body = completion_logprobs(output.logprobs or ())
    assert body["tokens"] == ["a"]
    assert body["token_logprobs"] == [-2.0]
    assert body["top_logprobs"] == [{"a": -2.0, f"token_id:{byte}": -0.5}]


def test_every_token_goes_by_its_id_when_asked() -> None:
    tokenizer = byte_level()
    output = one_position(tokenizer, 70, TokenLogprobs(-2.0, 3, (71, 72), (-0.5, -1.0)))
    body = completion_logprobs(output.logprobs or (), as_ids=True)
    assert body["tokens"] == ["token_id:70"]
    assert body["top_logprobs"] == [{"token_id:70": -2.0, "token_id:71": -0.5, "token_id:72": -1.0}]
    chat = chat_logprobs(output.logprobs, as_ids=True)
    assert chat is not None
    assert chat["content"][0]["token"] == "token_id:70"
    assert bytes(chat["content"][0]["bytes"]) == tokenizer.token_bytes(70)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_ids_beyond_the_tokenizer_have_names(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    output = one_position(tokenizer, UNKNOWN, TokenLogprobs(-2.0, 3, (UNKNOWN + 1, 7), (-0.5, -1.0)))
    body = completion_logprobs(output.logprobs or ())
    assert body["tokens"] == [f"token_id:{UNKNOWN}"]
    assert len(body["top_logprobs"][0]) == 3
    chat = chat_logprobs(output.logprobs)
    assert chat is not None
    assert chat["content"][0]["bytes"] is None
    assert chat["content"][0]["top_logprobs"][1]["bytes"] is not None
    _, entry = prompt_logprobs(tokenizer, Prompt([7, UNKNOWN]), scores_of(1, 1, UNKNOWN + 1), 1)
    assert entry is not None
    assert entry[str(UNKNOWN)] == {"logprob": -1.0, "rank": 1, "decoded_token": None}


def test_what_is_not_a_number_is_null() -> None:
    output = one_position(byte_level(), 70, TokenLogprobs(math.nan, 1, (71,), (-0.5,)))
    body = completion_logprobs(output.logprobs or ())
    assert (body["token_logprobs"], body["top_logprobs"]) == ([None], [None])


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("".join(TEXT) + LOOP_TEXT), min_size=1, max_size=12), cut=st.integers(0, 12))
def test_offsets_are_of_the_characters_before(make: Callable[[], Tokenizer], text: str, cut: int) -> None:
    """Of an echoed text and its continuation: what precedes a token's own bytes, whole characters counted."""
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    text = tokenizer.decode(ids)
    prompt, rest = ids[: cut % len(ids)], ids[cut % len(ids) :]
    given_text = tokenizer.decode(prompt)
    positions = []
    if prompt:
        positions = echoed_positions(tokenizer, Prompt(prompt, given_text), TokenScores.zeros(len(prompt) - 1), 0)
    processor = OutputProcessor(tokenizer)
    processor.add("id", prompt, SamplingParams(logprobs=0))
    entries = tuple(TokenLogprobs(-1.0, 1) for _ in rest)
    (output,) = processor.process([TokenOutput("id", tuple(rest), entries, FinishReason.LENGTH)]).outputs
    echoed = given_text + output.text
    body = completion_logprobs(positions)["text_offset"]
    body += completion_logprobs(output.logprobs or (), start=len(given_text))["text_offset"]
    assert body == sorted(body)
    assert body[0] == 0
    if "\ufffd" in given_text and not text.startswith(given_text):  # the cut is within a character
        return
    data, begun = b"", False
    for number, (token_id, offset) in enumerate(zip(ids, body, strict=True)):
        assert echoed[:offset] == data.decode("utf-8", "ignore"), number
        if token_id not in tokenizer.special_token_ids:  # <unk>, which decoding leaves out
            data += tokenizer.token_bytes(token_id) if begun else tokenizer.first_token_bytes(token_id)
            begun = True


def test_special_tokens_take_up_what_the_text_spells() -> None:
    tokenizer = byte_level()
    (bos,) = tokenizer.encode("<s>", add_special_tokens=False)
    ids = tokenizer.encode("ab<|im_end|>c", add_special_tokens=False)
    scores = TokenScores.zeros(len(ids), 0)

    def offsets(text: str) -> list[int]:
        return [p.offset for p in echoed_positions(tokenizer, Prompt([bos, *ids], text), scores, 0)]

    assert len(ids) == 4
    assert offsets("ab<|im_end|>c") == [0, 0, 1, 2, 12]  # as it was given; <s> was put before it
    assert offsets("abc") == [0, 0, 1, 2, 2]  # as the ids decode


def test_a_prompts_positions_are_openais_and_vllms() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("abc", add_special_tokens=False)
    assert len(ids) == 3
    scores = scores_of(2, 3, ids[1])
    prompt = Prompt(ids, "abc")
    body = completion_logprobs(echoed_positions(tokenizer, prompt, scores, 2))
    assert body["tokens"] == ["a", "b", "c"]
    assert body["text_offset"] == [0, 1, 2]
    assert body["token_logprobs"] == [None, -1.0, -2.0]
    assert body["top_logprobs"] == [None, {"b": -1.0, "c": -1.5}, {"c": -2.0, "b": -0.5}]
    first, second, third = prompt_logprobs(tokenizer, prompt, scores, 1)
    assert first is None
    assert second == {str(ids[1]): {"logprob": -1.0, "rank": 1, "decoded_token": "b"}}
    assert third == {
        str(ids[2]): {"logprob": -2.0, "rank": 2, "decoded_token": "c"},
        str(ids[1]): {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
    }
    assert next(iter(third)) == str(ids[2])


def test_a_prompt_of_one_token_has_one_null() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a", add_special_tokens=False)
    prompt, nothing = Prompt(ids, "a"), TokenScores.zeros(0)
    assert prompt_logprobs(tokenizer, prompt, nothing, 3) == [None]
    body = completion_logprobs(echoed_positions(tokenizer, prompt, nothing, 3))
    assert body == {"text_offset": [0], "token_logprobs": [None], "tokens": ["a"], "top_logprobs": [None]}


def test_no_logprobs_are_null() -> None:
    output = output_of(byte_level(), TokenOutput("id", (5,)))
    assert chat_logprobs(output.logprobs) is None
