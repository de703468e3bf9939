"""Sentencepiece vocabularies of GGUF files: tokens against sentencepiece's algorithm, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import tokenizer_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from spm_vocabulary import LETTERS, PIECES, SPECIAL, USER_DEFINED, sentencepiece_tokens, spm_vocabulary
from tokenizers import Tokenizer as Backend

from llmctl.checkpoint.gguf_spm import spm_parts
from llmctl.checkpoint.gguf_tokenizer import synthesise_aux_files
from llmctl.checkpoint.gguf_vocabulary import Vocabulary
from llmctl.errors import CheckpointError, UnsupportedModelError

TEXTS = st.lists(
    st.sampled_from(
        [*PIECES, *LETTERS, *USER_DEFINED, *SPECIAL, " ", "  ", " the", "../", "ab", "é", "界", "😀", "<0x0A>", "\n"]
    ),
    max_size=14,
).map("".join)


def metadata(**changes: Any) -> dict[str, Any]:
    return tokenizer_keys(spm_vocabulary(**changes))


def backend(**changes: Any) -> Backend:
    return Backend.from_str(synthesise_aux_files(metadata(**changes), "m.gguf")["tokenizer.json"].decode())


WITH_PREFIX, WITHOUT = backend(), backend(add_space_prefix=False)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.booleans())
def test_tokens_are_sentencepieces(text: str, prefix: bool) -> None:
    found = (WITH_PREFIX if prefix else WITHOUT).encode(text, add_special_tokens=False).tokens
    assert found == sentencepiece_tokens(text, spm_vocabulary(), prefix=prefix)


@pytest.mark.parametrize(("prefix", "text"), [(True, "the é世界\n <tool> fox"), (False, " the 😀fox ")])
def test_there_and_back(prefix: bool, text: str) -> None:
    tokenizer = WITH_PREFIX if prefix else WITHOUT
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1  # <s>, though the file does not say that it is added
    assert tokenizer.decode(ids).replace("<tool>  fox", "<tool> fox") == text  # a prefix after every token cut out


def test_roles_of_a_file_that_names_none() -> None:
    roles = dict.fromkeys(("bos_token_id", "eos_token_id", "unk_token_id"))
    files = {name: json.loads(content) for name, content in synthesise_aux_files(metadata(**roles), "m.gguf").items()}
    config = files["tokenizer_config.json"]
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert files["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    specials = {token["content"]: token["special"] for token in files["tokenizer.json"]["added_tokens"]}
    assert specials == {**dict.fromkeys(SPECIAL, True), **dict.fromkeys(USER_DEFINED, False)}


def merges_of(**scores: float) -> list[tuple[str, str]]:
    """Merges of a vocabulary of pieces with these scores, and their letters."""
    pieces = dict.fromkeys("".join(scores), -99.0) | scores
    facts = spm_vocabulary()
    kept = len(facts["list"]) - len(dict.fromkeys([*PIECES, *LETTERS]))
    changes = {
        "list": [*facts["list"][:kept], *pieces],
        "types": [*facts["types"][:kept], *[1] * len(pieces)],
        "token_scores": [*facts["token_scores"][:kept], *pieces.values()],
    }
    merges: list[tuple[str, str]] = spm_parts(Vocabulary(metadata(**changes), "m.gguf"))["model"]["merges"]
    return merges


def test_of_equal_scores_the_leftmost_comes_first() -> None:
    assert merges_of(bc=-1, ab=-1) == [("a", "b"), ("b", "c")]
    assert merges_of(ab=-1, bc=-1) == [("a", "b"), ("b", "c")]
    assert merges_of(ab=-2, bc=-1) == [("b", "c"), ("a", "b")]


@pytest.mark.parametrize(
    "scores",
    [
        {"ab": -1, "ba": -1},  # "aba" and "bab" are cut at the left
        {"bc": -1, "bca": -1, "ab": -1},  # whether (bc, a) comes before (a, b) depends on where bc was made
        {"aa": 0, "aaa": -1, "aaaa": -2, "aaaaa": -2},
    ],
)
def test_scores_that_no_list_of_merges_stands_for(scores: dict[str, float]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf: no list of merges .* such as '[abc]+'"):
        merges_of(**scores)


def test_user_defined_tokens_of_one_score_are_not_merged() -> None:
    facts = spm_vocabulary()
    for token in ("ab", "ba"):
        at = facts["list"].index(token)
        facts["types"][at], facts["token_scores"][at] = 4, -1000.0
    tokenizer = backend(types=facts["types"], token_scores=facts["token_scores"], add_space_prefix=False)
    assert tokenizer.encode("xbaab", add_special_tokens=False).tokens == ["x", "ba", "ab"]


def test_runs_of_one_score() -> None:
    """Llama 2's own: powers of two have scores, the runs between are worse than any."""
    runs = {"a" * size: -1e9 for size in range(2, 17)} | {"a" * size: -float(size) for size in (2, 4, 8, 16)}
    assert merges_of(**runs)[0] == ("a", "a")


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ({"ab" * 257: -1.0}, r"token '(ab)+' of 514 characters is not read: at most 512"),
        ({"a" * size: -1.0 for size in range(2, 66)}, "a run of 65 'a', some of which share a score, is not read"),
        (
            {f"{chr(0x4E00 + i)}a": -1.0 for i in range(1001)} | {f"a{chr(0x5E00 + i)}": -1.0 for i in range(1000)},
            "1001000 pairs of tokens of one score that overlap is not read: at most 1000000",
        ),
    ],
    ids=["long", "run", "ties"],
)
def test_vocabularies_that_would_take_for_ever(scores: dict[str, float], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        merges_of(**scores)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"types": [*[1] * 8, *spm_vocabulary()["types"][8:]]}, "without a byte token '<0x00>' is not read"),
        ({"token_scores": None}, "scores: expected a number for each of"),
        ({"token_scores": [float("nan")] * len(spm_vocabulary()["list"])}, "scores: expected a number for each of"),
        ({"token_scores": [1.0]}, "scores: expected a number for each of"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is not read"),
        ({"add_space_prefix": "yes"}, "add_space_prefix: expected true or false, found 'yes'"),
        ({"list": [*spm_vocabulary()["list"][:-1], "z"]}, "token 'é世' has a character that is no token: not read"),
        *(
            ({"model": name}, f"tokenizer model '{name}' is not read from GGUF; known: gpt2 .*, llama")
            for name in ("gemma4", "t5", "bert", "rwkv", "plamo2", "none")
        ),
    ],
)
def test_what_cannot_be_said_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        synthesise_aux_files(metadata(**changes), "m.gguf")


def test_every_split_of_a_text_streams_as_transformers_decodes_it(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from llmctl.text.detokenizer import IncrementalDetokenizer
    from llmctl.text.tokenizer import Tokenizer

    for prefix in (True, False):
        for name, content in synthesise_aux_files(metadata(add_space_prefix=prefix), "m.gguf").items():
            (tmp_path / name).write_bytes(content)
        theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
        for text in (" the 世界 é😀\n\n fox", "😀<tool>the<|im_end|>  fox..", "<s> the"):
            ids = theirs(text, add_special_tokens=False).input_ids
            assert ids == ours.encode(text, add_special_tokens=False)
            whole = theirs.decode(ids, skip_special_tokens=True)
            assert whole == ours.decode(ids)
            for at in range(len(ids)):
                before, after = IncrementalDetokenizer(ours, ()), IncrementalDetokenizer(ours, ids[:at])
                head = "".join(before.push(i) for i in ids[:at])
                assert head + "".join(after.push(i) for i in ids[at:]) + after.flush() == whole


def test_a_grammar_takes_the_tokens_bytes() -> None:
    from llmctl.structured.compiler import GrammarCompiler
    from llmctl.structured.spec import GrammarSpec
    from llmctl.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_files(synthesise_aux_files(metadata(), "m.gguf"))
    bytes_of = {tokenizer.id_to_token(i): tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert [bytes_of[token] for token in ("▁", "▁the", "<0x0A>", "<0xE7>", "é", "\n\n", "<tool>")] == [
        *(b" ", b" the", b"\n", b"\xe7", "é".encode(), b"\n\n", b"<tool>"),
    ]
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    matcher = compiler.submit(GrammarSpec("regex", "(the fox|界)\n{1,2}")).result().matcher()
    compiler.close()

    def allowed() -> set[str]:
        row = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        matcher.fill(row)
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")
        return {tokenizer.id_to_token(int(i)) or "" for i in np.flatnonzero(bits)}

    assert allowed() == {"t", "th", "<0x74>", "<0xE7>"}
    for token, then in (("<0xE7>", {"<0x95>"}), ("<0x95>", {"<0x8C>"}), ("<0x8C>", {"<0x0A>", "\n\n"})):
        matcher.accept(tokenizer.token_to_id(token) or 0)
        assert allowed() == then
    matcher.accept(tokenizer.token_to_id("\n\n") or 0)
    assert matcher.complete
