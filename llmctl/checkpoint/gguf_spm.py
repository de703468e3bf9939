"""A sentencepiece vocabulary with scores (``tokenizer.ggml.model == "llama"``) as the BPE of tokenizer.json.

sentencepiece joins the two neighbours whose joint text has the best score, the leftmost of equals; llama.cpp's
llm_tokenizer_spm does the same. BPE joins the pair that stands first in a list. So a pair stands where its joint text's
score puts it: as transformers' ``generate_merges`` does it, but for equal scores (``_settle_ties``).
"""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from typing import Any

import numpy as np

from llmctl.checkpoint.gguf_vocabulary import BYTE, SPECIAL, USER_DEFINED, Vocabulary
from llmctl.errors import CheckpointError, UnsupportedModelError

ROLES = {"bos": 1, "eos": 2, "unknown": 0}
"""llama.cpp's, of a file that does not say."""
_SPACE = "▁"

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
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
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
        if kind in (*SPECIAL, BYTE) or (kind == USER_DEFINED and _SPACE not in token)
    }
    known = {token: i for i, token in enumerate(vocabulary.tokens) if token not in apart}
    _check_letters(vocabulary, known)
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
        merges += _settle_ties(vocabulary.where, [pair for _, pair in tied])
    return merges


def _check_letters(vocabulary: Vocabulary, known: Iterable[str]) -> None:
    """sentencepiece joins characters that are no tokens by themselves; BPE cannot: they are bytes by then."""
    letters = set(vocabulary.tokens)
    odd = next((token for token in known if not letters.issuperset(token)), None)
    if odd is not None:
        raise UnsupportedModelError(f"{vocabulary.where}: token {odd!r} has a character that is no token: not read")


def _settle_ties(where: str, pairs: list[Pair]) -> list[Pair]:
    """Pairs of one score, in an order that takes the leftmost where two of them overlap in a text.

    (a, b) and (b, c) overlap in "abc": the first must stand first. Where that goes round in a circle no order is right.
    Repetitions of one text are let through: the shorter ones, which score better, leave one way to put them together.

    Raises:
        UnsupportedModelError: no such order.
    """
    by_right: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_right.setdefault(pair[1], []).append(pair)
    if not any(left in by_right for left, _ in pairs):
        return pairs
    earlier = {
        pair: [other for other in by_right.get(pair[0], ()) if other != pair and not (_repeats(pair) and _repeats(other))]
        for pair in pairs
    }
    try:
        return list(TopologicalSorter(earlier).static_order())
    except CycleError as error:
        circle = ", ".join(repr(left + right) for left, right in error.args[1][:2])
        raise UnsupportedModelError(
            f"{where}: tokens of equal score that overlap both ways ({circle}): no list of merges stands for them",
            fix="use the model's Hugging Face folder, with its own tokenizer.json",
        ) from error


def _repeats(pair: Pair) -> bool:
    """Whether both parts are repetitions of one text."""
    left, right = pair
    return left + right == right + left
