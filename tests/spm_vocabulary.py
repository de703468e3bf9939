"""A small sentencepiece vocabulary with scores, as GGUF has it, and sentencepiece's own way to cut a text by it."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
LETTERS = "▁abcdefhnoqrtuxT./é世"
PIECES = """▁t th ▁th he ▁the ▁T ▁The qu ▁q ▁qu fo ▁f ▁fo ▁fox ox ▁▁ ▁▁▁▁ ▁▁▁ .. ... / ./ ../ ../.. ../../ ../../../
    ab ba aba ababa bab é世""".split()
USER_DEFINED = ["<tool>", "\n\n"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]


def spm_vocabulary(**changes: Any) -> dict[str, Any]:
    """``tokenizer.ggml.*`` without the prefix, by gguf.GGUFWriter's names; the first pieces have the best scores."""
    spelt = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *USER_DEFINED]
    pieces = list(dict.fromkeys([*PIECES, *LETTERS]))
    kinds = [2, *[_CONTROL] * 3, *[_BYTE] * 256, *[_USER_DEFINED] * len(USER_DEFINED), *[1] * len(pieces)]
    return {
        "model": "llama",
        "pre": "default",
        "list": [*spelt, *pieces],
        "types": kinds,
        "token_scores": [-1000.0] * len(spelt) + [-float(i) for i in range(len(pieces))],
        "merges": [],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
        **changes,
    }


def sentencepiece_tokens(text: str, vocabulary: dict[str, Any], *, prefix: bool = True) -> list[str]:
    """The tokens of a text: special and user-defined ones first, then the two neighbours of the best joint score."""
    apart = [t for t, kind in zip(vocabulary["list"], vocabulary["types"], strict=True) if kind in (2, 3, 4)]
    pattern = "|".join(map(re.escape, sorted(apart, key=len, reverse=True)))
    scores = {
        token: score
        for token, score, kind in zip(vocabulary["list"], vocabulary["token_scores"], vocabulary["types"], strict=True)
        if kind == 1
    }
    found: list[str] = []
    for piece in re.split(f"({pattern})", text):
        if piece in apart:
            found.append(piece)
        elif piece:
            found += _pieces((" " * prefix + piece).replace(" ", "▁"), scores)
    return found


def _pieces(text: str, scores: dict[str, float]) -> list[str]:
    parts = list(text)
    while True:
        pairs = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return [token for part in parts for token in ([part] if part in scores else _bytes(part))]


def _bytes(part: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in part.encode()]
