"""Every barrier and wait in the attention kernels is needed, and every slip in the arithmetic shows: each in turn."""

from __future__ import annotations

import re

import attention_case
import pytest
from attention_case import AttentionCase
from emulator import EmulationError, kernels_from_text, missing

from llmctl.targets.cuda.attention import AttentionShape
from llmctl.targets.cuda.compile import SOURCE_DIR

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
_CALL = re.compile(r"(block_sync|warp_sync|cp_async_wait<\d>)\(\);")


def _run(which: str) -> None:
    for tag, kv in (("bf16", "bf16"), ("f16", "s8")):
        counts = [1, 1, 1] if which == "decode" else [40, 1, 70]
        case = AttentionCase(AttentionShape(tag, kv, 3, 1, 64, 16), [150, 9, 700], counts)
        case.check(case.decode(split=512, grid=1) if which == "decode" else case.prefill())


def _run_windowed(which: str) -> None:
    for kv in ("f16", "s8"):
        counts = [1, 1] if which == "decode" else [40, 23]
        case = AttentionCase(AttentionShape("f16", kv, 3, 1, 64, 32), [250, 49], counts, window=200)
        case.check(case.decode(split=512) if which == "decode" else case.prefill())


def _source(which: str, text: str) -> str:
    return f"{text.replace('#pragma once', '')}\nLLMCTL_ATTENTION_ALL(LLMCTL_ATTENTION_{which.upper()}, 64)\n"


def _calls() -> list[tuple[str, int]]:
    return [
        (which, match.start())
        for which in ("decode", "prefill")
        for match in _CALL.finditer((SOURCE_DIR / f"attention_{which}.cuh").read_text())
    ]


@pytest.mark.parametrize(("which", "at"), _calls())
def test_attention_without_one_of_its_barriers_fails(which, at, monkeypatch):
    text = (SOURCE_DIR / f"attention_{which}.cuh").read_text()
    mutant = kernels_from_text(_source(which, text[:at] + _CALL.sub(";", text[at:], count=1)), f"{which}.cu")
    real = attention_case.kernels
    monkeypatch.setattr(attention_case, "kernels", lambda name: mutant if which in name else real(name))
    with pytest.raises(EmulationError):
        _run(which)


# What goes wrong in the arithmetic, by the text it is done in: an index, a mask, a scale, the order of dims.
_SLIPS = [
    ("decode", "output_dim<S>(n % 2, 2 * t + e)", "(n % 2 * 8 + 2 * t + e)"),
    ("prefill", "{flash.out[m][2 * j][2 * h] * by, flash.out[m][2 * j][2 * h + 1] * by}", "{by, by}"),
    ("prefill", "(first + row) / group", "first + row / group"),
    ("tile", "back >= window", "back > window"),
    ("tile", "back < 0 ||", "back < -1 ||"),
    ("tile", "total[m][h] * shrink[m][h] + sum", "total[m][h] + sum"),
    ("tile", "if (!vote_all(same)) rescale(shrink);", ""),
    ("cache", "row < live ? kChunk : 0", "kChunk"),
    ("cache", "S::kBytes ? w / 2 + w % 2 * 4", "S::kBytes ? w"),
    ("cache", "(unit * kUnit & (block_size - 1))", "0"),
]


@pytest.mark.parametrize(
    ("which", "part", "right", "wrong"),
    [(which, *slip) for which in ("decode", "prefill") for slip in _SLIPS if slip[0] in ("tile", "cache", which)],
)
def test_a_slip_in_the_arithmetic_fails(which, part, right, wrong, monkeypatch):
    texts = {name: (SOURCE_DIR / f"attention_{name}.cuh").read_text() for name in ("cache", "tile", which)}
    assert right in texts[part]
    texts[part] = texts[part].replace(right, wrong)
    joined = re.sub(r'#include "attention_\w+\.cuh"', "", "\n".join(texts.values()))
    mutant = kernels_from_text(_source(which, joined), f"{which}.cu")
    real = attention_case.kernels
    monkeypatch.setattr(attention_case, "kernels", lambda name: mutant if which in name else real(name))
    with pytest.raises(AssertionError):
        _run_windowed(which)
