"""A sentencepiece vocabulary with scores (``tokenizer.ggml.model == "llama"``) as the BPE of tokenizer.json.

sentencepiece joins the two neighbours whose joint text has the best score, the leftmost of equals; llama.cpp's
llm_tokenizer_spm does the same. BPE joins the pair that stands first in a list. So a pair stands where its joint text's
score puts it: as transformers' ``generate_merges`` does it, but for equal scores (``_settle_ties``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from llmctl.checkpoint.gguf_vocabulary import BYTE, SPECIAL, UNUSED, USER_DEFINED, Vocabulary
from llmctl.errors import CheckpointError, UnsupportedModelError

ROLES = {"bos": 1, "eos": 2, "unknown": 0}
"""llama.cpp's, of a file that does not say."""
SPACE = "▁"
"""What sentencepiece writes for a space."""
MOST_CHARS, MOST_RUN, MOST_TIES = 512, 64, 10**6
"""Characters of a token, and of a run that shares its score; pairs that are compared because their scores are equal.
The work grows with the second, fourth and first power. sentencepiece makes tokens of 16, Gemma's have runs of 31."""

Pair = tuple[str, str]


def spm_parts(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json's normalizer, pre_tokenizer, decoder and model.

    Raises:
        CheckpointError: damaged tables.
        UnsupportedModelError: no byte tokens; scores that no list of merges stands for; white space removed.
    """
    where = vocabulary.where
    of_bytes = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == BYTE}
    missing = next((name for name in (f"<0x{byte:02X}>" for byte in range(256)) if name not in of_bytes), None)
    if missing:
        raise UnsupportedModelError(f"{where}: a sentencepiece vocabulary without a byte token '{missing}' is not read")
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise UnsupportedModelError(f"{where}: tokenizer.ggml.remove_extra_whitespaces is not read")
    prefix = vocabulary.flag("add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.text("unknown"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(vocabulary.tokens)},
            "merges": _merges(vocabulary),
        },
    }


def _scores(vocabulary: Vocabulary) -> list[float]:
    found = vocabulary.numbers("scores", "fiu", "numbers")
    if found is None or len(found) != len(vocabulary.tokens) or not np.isfinite(found).all():
        raise CheckpointError(
            f"{vocabulary.where}: metadata tokenizer.ggml.scores: expected a number for each of "
            f"{len(vocabulary.tokens)} tokens"
        )
    return [float(score) for score in found]


def _merges(vocabulary: Vocabulary) -> list[Pair]:
    """Every way to put a token together of two, best score first."""
    scores = _scores(vocabulary)
    # Special and user-defined tokens are cut out of a text before it is merged, but for those spelt with ▁.
    apart = {
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (*SPECIAL, BYTE) or (kind == USER_DEFINED and SPACE not in token)
    }
    known = {token: i for i, token in enumerate(vocabulary.tokens) if token not in apart}
    _check_letters(vocabulary, known)
    long = next((token for token in known if len(token) > MOST_CHARS), None)
    if long is not None:
        raise _too_large(vocabulary.where, f"token {long[:40]!r} of {len(long)} characters", MOST_CHARS)
    pairs = [
        (scores[i], (token[:cut], token[cut:]))
        for token, i in known.items()
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    # The longest left part first, then the order of ids (the sort keeps it).
    pairs.sort(key=lambda item: (-item[0], -len(item[1][0]), -len(item[1][1])))
    merges: list[Pair] = []
    for _, tied in groupby(pairs, key=lambda item: item[0]):
        group = [pair for _, pair in tied]
        merges += group if len(group) == 1 else _settle_ties(vocabulary.where, group)
    _check_runs(vocabulary.where, {token: scores[i] for token, i in known.items() if len(set(token)) == 1}, merges)
    return merges


def _check_letters(vocabulary: Vocabulary, known: Iterable[str]) -> None:
    """sentencepiece joins characters that are no tokens by themselves; BPE cannot: they are bytes by then.

    Unused tokens, with which a vocabulary is filled up, are joined by neither.
    """
    letters = set(vocabulary.tokens)
    unused = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == UNUSED}
    odd = next((token for token in known if token not in unused and not letters.issuperset(token)), None)
    if odd is not None:
        raise UnsupportedModelError(f"{vocabulary.where}: token {odd!r} has a character that is no token: not read")


def _settle_ties(where: str, pairs: list[Pair]) -> list[Pair]:
    """Pairs of one score, in an order that takes the leftmost where two of them overlap in a text.

    (a, b) and (b, c) overlap in "abc": the first must stand first. No order is right where that goes round in a circle,
    nor where one joins what another has made. The ways to make one repetition ("../../../") are let through: shorter
    ones, which score better, leave one way in a text; and runs of one character, for ``_check_runs``.

    Raises:
        UnsupportedModelError: no such order.
    """
    made = {left + right for left, right in pairs}
    by_right: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_right.setdefault(pair[1], []).append(pair)
    if not any(left in by_right or left in made or right in made for left, right in pairs):
        return pairs
    odd = next((pair for pair in pairs if not made.isdisjoint(pair) and not _is_run(pair)), None)
    if odd is not None:
        raise _inexpressible(where, "".join(odd))
    compared = sum(len(by_right.get(left, ())) for left, _ in pairs)
    if compared > MOST_TIES:
        raise _too_large(where, f"{compared} pairs of tokens of one score that overlap", MOST_TIES)
    earlier = {
        pair: [other for other in by_right.get(pair[0], ()) if other != pair and not _harmless(pair, other)]
        for pair in pairs
    }
    try:
        return list(TopologicalSorter(earlier).static_order())
    except CycleError as error:
        raise _inexpressible(where, "".join(error.args[1][0])) from error


def _inexpressible(where: str, token: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: no list of merges stands for tokens of equal score that overlap, such as {token!r}",
        fix="use the model's Hugging Face folder, with its own tokenizer.json",
    )


def _too_large(where: str, found: str, most: int) -> UnsupportedModelError:
    return UnsupportedModelError(f"{where}: a sentencepiece vocabulary with {found} is not read: at most {most}")


def _harmless(one: Pair, other: Pair) -> bool:
    return (_is_run(one) and _is_run(other)) or "".join(one) == "".join(other)


def _is_run(pair: Pair) -> bool:
    return len({*pair[0], *pair[1]}) == 1


def _check_runs(where: str, runs: dict[str, float], merges: list[Pair]) -> None:
    """Runs of one character with equal scores (Llama 2's of ▁) must come out of BPE as sentencepiece has them.

    Raises:
        UnsupportedModelError: some run does not.
    """
    by_score: dict[tuple[str, float], list[str]] = {}
    for token, score in runs.items():
        by_score.setdefault((token[0], score), []).append(token)
    letters = {letter for (letter, _), tied in by_score.items() if len(tied) > 1}
    for letter in sorted(letters):
        ranked = {pair: -float(i) for i, pair in enumerate(merges) if _is_run(pair) and pair[0][0] == letter}
        scored = {pair: runs["".join(pair)] for pair in ranked}
        longest = max(len(token) for token in runs if token[0] == letter)
        if longest > MOST_RUN:
            raise _too_large(where, f"a run of {longest} {letter!r}, some of which share a score,", MOST_RUN)
        for length in range(2, 3 * longest + 1):
            if _joined(letter * length, ranked) != _joined(letter * length, scored):
                raise _inexpressible(where, letter * length)


def _joined(text: str, values: Mapping[Pair, float]) -> list[str]:
    """A text joined pair by pair, always the leftmost of those with the greatest value."""
    parts = list(text)
    while found := [(values[pair], -at) for at, pair in enumerate(pairwise(parts)) if pair in values]:
        at = -max(found)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return parts
