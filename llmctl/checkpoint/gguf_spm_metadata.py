"""A tokenizer.json of sentencepiece's kind as a GGUF file's scores and types; the other way round is ``gguf_spm.py``.

tokenizer.json has merges in the order of scores, and not the scores. Any numbers that fall from one merge to the next
stand for the same order. That they do is not believed but compared: ``check_same_merges``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from llmctl.checkpoint.gguf_spm import SPACE, Pair
from llmctl.checkpoint.gguf_vocabulary import BYTE, NORMAL, UNKNOWN
from llmctl.errors import UnsupportedModelError

_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREFIX = {"type": "Prepend", "prepend": SPACE}
# Gemma's, after whose normalizer there is no space left to split at.
_NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def has_prefix(stages: Sequence[Any]) -> bool:
    """Whether a space is put before every text.

    Args:
        stages: what happens to a text before it is merged.

    Raises:
        UnsupportedModelError: something else happens than GGUF's readers do.
    """
    before = [stage for stage in stages if stage != _NO_SPLIT or _SPACES not in stages]
    if before in ([_SPACES], [{"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}]):
        return False
    if before == [_PREFIX, _SPACES]:
        return True
    if any(stage["type"] == "Metaspace" for stage in before):
        raise UnsupportedModelError(
            "its Metaspace puts a space before the first word of a text; GGUF's readers put one after every special "
            "token, too, and before a space"
        )
    kinds = ", ".join(stage["type"] for stage in before) or "nothing"
    raise UnsupportedModelError(f"its stages before BPE ({kinds}) are not sentencepiece's")


def spm_kinds(tokens: Sequence[tuple[str, int]], unknown: str | None) -> list[tuple[str, int]]:
    """Tokens with their types, bytes and ``unknown`` among them.

    A byte whose token is written as its character (Gemma's tab) is called as GGUF calls bytes: nothing is merged of it,
    or the merges will differ.
    """
    names = {token for token, _ in tokens}
    missing = {chr(byte): f"<0x{byte:02X}>" for byte in range(128) if f"<0x{byte:02X}>" not in names}

    def kind(token: str, kind: int) -> tuple[str, int]:
        if kind == NORMAL and (token in missing or _BYTE_TOKEN.fullmatch(token)):
            return missing.get(token, token), BYTE
        return token, UNKNOWN if token == unknown else kind

    return [kind(*one) for one in tokens]


def scores(merges: Sequence[Pair], tokens: Sequence[str]) -> list[float]:
    """A score for every token: minus the place of the first of the merges that make it.

    Tokens whose merges take turns share a score; one that nothing makes has the least. float32 holds them up to 2^24.
    """
    last = {left + right: place for place, (left, right) in enumerate(merges)}
    found: dict[str, float] = {}
    start = end = -1
    for place, (left, right) in enumerate(merges):
        if place > end:
            start = place
        end = max(end, last[left + right])
        found[left + right] = -float(start)
    return [found.get(token, -float(len(merges))) for token in tokens]


def live_merges(document: Mapping[str, Any]) -> list[Pair]:
    """The merges of tokenizer.json that can come about.

    Of an added token none can: wherever its text occurs, it has been cut out before. Only a text with ``▁`` comes to be
    afterwards, out of spaces.
    """
    cut = {
        token["content"]
        for token in document.get("added_tokens", ())
        if not token.get("normalized") and not token.get("single_word") and SPACE not in token["content"]
    }
    pairs = (tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in _merges(document))
    return [(left, right) for left, right in pairs if cut.isdisjoint((left, right, left + right))]


def check_same_merges(mine: Sequence[Pair], read: Sequence[Pair]) -> None:
    """Hold merges against those that a reader makes of the scores.

    The order of the ways to make one token is free: sentencepiece does not tell them apart.

    Raises:
        UnsupportedModelError: they differ.
    """
    odd = sorted(set(mine) ^ set(read))
    if odd:
        left, right = odd[0]
        verb = "does not join" if odd[0] in set(read) else "joins"
        raise UnsupportedModelError(f"its BPE {verb} {left!r} and {right!r}, unlike any scores")
    if list(_in_steps(mine)) != list(_in_steps(read)):
        raise UnsupportedModelError("its merges stand in an order that no scores stand for")


def _in_steps(merges: Sequence[Pair]) -> Iterator[list[Pair]]:
    for _, pairs in groupby(merges, key="".join):
        yield sorted(pairs)


def _merges(document: Mapping[str, Any]) -> Sequence[Any]:
    found: Sequence[Any] = document["model"]["merges"]
    return found
