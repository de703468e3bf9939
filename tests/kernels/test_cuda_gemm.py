"""Launch plans: every entry exists, limits of a block hold, K is shared out alike for any number of streamed rows."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.graph.graph import QuantScheme, Weight, WeightPart
from llmctl.kernels.compile import SOURCE_DIR
from llmctl.kernels.cuda_gemm import (
    GEMM_ROWS,
    STREAM_ROWS,
    TAG,
    dequantize_grid,
    gemm_entries,
    gemm_sources,
    plan_gemm,
    plan_stream,
    plan_tile,
    weight_format,
)
from llmctl.kernels.cuda_layout import CudaFormat

_MACROS = {
    "LLMCTL_STREAM": r"\1_\2_g\4_m\5",
    "LLMCTL_TILE_GEMM": r"\1_\2_t\4",
    "LLMCTL_INT8_GEMM": r"\1_\2_t\3",
    "LLMCTL_DEQUANTIZE": r"dequantize_w\2_\1",
    "LLMCTL_PERMUTE": r"permute_columns_\1",
}


def entries_in(source: str) -> set[str]:
    """Entry points that a file instantiates."""
    found = set()
    for line in (SOURCE_DIR / source).read_text().splitlines():
        call = re.fullmatch(r"(LLMCTL_\w+)\((.*)\)", line)
        if call:
            name = _MACROS[call[1]]
            for number, word in enumerate(re.split(r", *", call[2]), start=1):
                name = name.replace(f"\\{number}", word)
            found.add(name)
    return found


formats = st.builds(
    CudaFormat,
    bits=st.sampled_from([4, 8]),
    shape=st.tuples(st.integers(1, 40000).map(lambda n: 2 * n), st.integers(1, 2048).map(lambda k: 8 * k)),
    gated=st.booleans(),
    group=st.sampled_from([-1, 32, 64, 128, 256]),
    symmetric=st.booleans(),
    permuted=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(fmt=formats, dtype=st.sampled_from(sorted(TAG)), m=st.integers(1, 300), sms=st.integers(1, 200))
def test_plans_are_launchable(fmt: CudaFormat, dtype: str, m: int, sms: int) -> None:
    plans = [plan_gemm(fmt, dtype, m, sms), plan_tile(fmt, dtype, m, int8=fmt.bits == 8, sms=sms)]
    for plan in plans:
        assert min(plan.grid) >= 1
        assert max(plan.grid[1:]) < 65536
        assert plan.threads in (128, 256)
        assert plan.shared <= 99 * 1024
        assert (plan.workspace > 0) == (plan.counters > 0)
    sources = {f"w{fmt.bits}a8_gemm.cu", *gemm_sources(fmt)} if fmt.bits == 8 else gemm_sources(fmt)
    made = set().union(*map(entries_in, sources))
    assert {plan.entry for plan in plans} | set(gemm_entries(fmt, dtype)) <= made
    assert plans[0].entry in gemm_entries(fmt, dtype) or m > GEMM_ROWS


@settings(max_examples=40, deadline=None)
@given(fmt=formats)
def test_streamed_rows_share_k_alike(fmt: CudaFormat) -> None:
    plans = [plan_stream(fmt, "float16", m) for m in range(1, STREAM_ROWS + 1)]
    assert len({(plan.grid, plan.threads) for plan in plans}) == 1


def test_dequantize_covers_the_padded_weight() -> None:
    assert dequantize_grid(CudaFormat(4, (70, 136))) == (3, 2)
    assert dequantize_grid(CudaFormat(4, (70, 136), gated=True)) == (3, 2)


def test_formats_of_weights() -> None:
    weight = Weight("w", (64, 256), (WeightPart("w"),), QuantScheme(4, 64, symmetric=True))
    assert weight_format(weight, gated=True) == CudaFormat(4, (64, 256), True, 64, True)
    three = replace(weight, quant=QuantScheme(3, 64, symmetric=True, act_order=True))
    assert weight_format(three, gated=False) == CudaFormat(4, (64, 256), False, 64, False, True)
    with pytest.raises(ValueError, match="dense"):
        weight_format(replace(weight, quant=None), gated=False)
    with pytest.raises(ValueError, match="groups of 48"):
        weight_format(replace(weight, quant=QuantScheme(4, 48, symmetric=True)), gated=False)
