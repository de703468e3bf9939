"""Launch plans: every entry exists, limits of a block hold, K is shared out alike for any number of streamed rows."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.graph.code_books import CODE_BOOKS
from llmctl.graph.dtypes import HALF_DTYPES
from llmctl.graph.graph import QuantScheme, Weight, WeightPart
from llmctl.targets.cuda.call import Call
from llmctl.targets.cuda.compile import SOURCE_DIR
from llmctl.targets.cuda.gemm import (
    GEMM_ROWS,
    STREAM_ROWS,
    gemm_entries,
    gemm_sources,
    plan_gemm,
    plan_stream,
    plan_tile,
    weight_format,
)
from llmctl.targets.cuda.gemm_signatures import gemm_call
from llmctl.targets.cuda.layout import CudaFormat
from llmctl.targets.cuda.signatures import SIGNATURES

_MACROS = {
    "LLMCTL_STREAM": r"\1_\2_g\4_m\5",
    "LLMCTL_TILE_GEMM": r"\1_\2_t\4",
    "LLMCTL_INT8_GEMM": r"\1_\2_t\3",
    "LLMCTL_DEQUANTIZE": r"dequantize_w\2_\1",
    "LLMCTL_BOOK_STREAM": r"\1_\2_g\3_m\4",
    "LLMCTL_BOOK_GEMM": r"\1_\2_t\3",
    "LLMCTL_DEQUANTIZE_BOOK": r"dequantize_book4_\1",
    "LLMCTL_FLOAT8_STREAM": r"\1_\2_g\3_m\4",
    "LLMCTL_FLOAT8_GEMM": r"\1_\2_t\3",
    "LLMCTL_DEQUANTIZE_FLOAT8": r"dequantize_fp8_\1",
    "LLMCTL_MINIMUM_STREAM": r"\1_\2_g\4_m\5",
    "LLMCTL_MINIMUM_GEMM": r"\1_\2_t\4",
    "LLMCTL_DEQUANTIZE_MINIMUMS": r"dequantize_k\2_\1",
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


def fitted(bits: int, symmetric: bool, book: str, group: int, minimum: bool, **facts: Any) -> CudaFormat:
    """A format; a code book of its own bits, and without zeros; minimums, or groups of 16, where there can be some."""
    book = book if book and CODE_BOOKS[book].bits == bits and group != 16 else ""
    minimum = minimum and not book and group in (16, 32)
    symmetric = not minimum and (symmetric or bool(book) or group == 16)
    return CudaFormat(bits, group=group, symmetric=symmetric, book=book, minimum=minimum, **facts)


formats = st.builds(
    fitted,
    bits=st.sampled_from([4, 8]),
    book=st.sampled_from(["", "nf4", "fp4", "fp8_e4m3"]),
    shape=st.tuples(st.integers(1, 40000).map(lambda n: 2 * n), st.integers(1, 2048).map(lambda k: 8 * k)),
    gated=st.booleans(),
    group=st.sampled_from([-1, 16, 32, 64, 128, 256]),
    symmetric=st.booleans(),
    minimum=st.booleans(),
    permuted=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(fmt=formats, dtype=st.sampled_from(HALF_DTYPES), m=st.integers(1, 300), sms=st.integers(1, 200))
def test_plans_are_launchable(fmt: CudaFormat, dtype: str, m: int, sms: int) -> None:
    plans = [plan_gemm(fmt, dtype, m, sms), plan_tile(fmt, dtype, m, int8=fmt.kind == "w8", sms=sms)]
    for plan in plans:
        assert min(plan.grid) >= 1
        assert max(plan.grid[1:]) < 65536
        assert plan.threads in (128, 256)
        assert plan.shared <= 99 * 1024
        assert (plan.workspace > 0) == (plan.counters > 0)
    sources = {"w8a8_gemm.cu", *gemm_sources(fmt)} if fmt.kind == "w8" else gemm_sources(fmt)
    made = set().union(*map(entries_in, sources))
    assert {plan.entry for plan in plans} | set(gemm_entries(fmt, dtype)) <= made
    assert plans[0].entry in gemm_entries(fmt, dtype) or m > GEMM_ROWS


@settings(max_examples=40, deadline=None)
@given(fmt=formats)
def test_streamed_rows_share_k_alike(fmt: CudaFormat) -> None:
    plans = [plan_stream(fmt, "float16", m) for m in range(1, STREAM_ROWS + 1)]
    assert len({(plan.grid, plan.threads) for plan in plans}) == 1


@settings(max_examples=40, deadline=None)
@given(fmt=formats, dtype=st.sampled_from(HALF_DTYPES), m=st.integers(1, 300))
def test_every_plan_has_a_signature(fmt: CudaFormat, dtype: str, m: int) -> None:
    for entry in (plan_gemm(fmt, dtype, m).entry, *gemm_entries(fmt, dtype)):
        assert entry in entries_in(SIGNATURES[entry].source)


def call(**changes: Any) -> Call:
    """A small gated product that split K needs scratch for, with changes."""
    fmt = CudaFormat(4, (64, 2048), True, 128)
    plan = plan_stream(fmt, "float16", 3)
    kinds = {"U8": torch.uint8, "F16": torch.float16}
    planes = {suffix: torch.zeros(shape, dtype=kinds[dtype]) for suffix, (dtype, shape) in fmt.planes().items()}
    arguments: dict[str, Any] = {
        "planes": planes,
        "epilogue": "silu_mul",
        "workspace": torch.zeros(plan.workspace),
        "counters": torch.zeros(plan.counters, dtype=torch.int32),
        "x": torch.zeros(3, 2048, dtype=torch.float16),
        "y": torch.zeros(3, 32, dtype=torch.float16),
    }
    assert plan.workspace
    return gemm_call(plan, fmt, **arguments | changes)


def test_a_call_takes_the_plans_geometry() -> None:
    made = call()
    plan = plan_stream(CudaFormat(4, (64, 2048), True, 128), "float16", 3)
    assert (made.entry, made.geometry.grid, made.geometry.shared) == (plan.entry, plan.grid, plan.shared)
    assert [int(a) for a in made.arguments[-5:]] == [3, 64, 2048, 128, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workspace": None}, "workspace: expected"),
        ({"counters": torch.zeros(1, dtype=torch.int32)}, "counters: expected 2 elements"),
        ({"epilogue": ""}, "a weight that is gated"),
        ({"epilogue": "tanh_mul"}, "epilogue 'tanh_mul'"),
        ({"y": torch.zeros(3, 64, dtype=torch.float16)}, "y: expected 32 columns, found 64"),
        ({"x": torch.zeros(3, 1024, dtype=torch.float16)}, "x: expected"),
        ({"x": torch.zeros(9, 2048, dtype=torch.float16), "y": torch.zeros(9, 32, dtype=torch.float16)}, "m: expected"),
        ({"x": torch.zeros(3, 2048, dtype=torch.bfloat16)}, "x: expected float16"),
        ({"bias": torch.zeros(32, dtype=torch.float16)}, "bias: expected"),
    ],
)
def test_calls_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_planes_of_another_format_are_refused() -> None:
    fmt = CudaFormat(4, (64, 2048), True, 128)
    planes = {"tiles": torch.zeros(5, dtype=torch.uint8), "tile_scales": None, "tile_zeros": None}
    with pytest.raises(ValueError, match="tiles: expected"):
        gemm_call(plan_stream(fmt, "float16", 3), fmt, planes, epilogue="silu_mul")


def test_formats_of_weights() -> None:
    weight = Weight("w", (64, 256), (WeightPart("w"),), QuantScheme(4, 64, symmetric=True))
    assert weight_format(weight, gated=True) == CudaFormat(4, (64, 256), True, 64, True)
    three = replace(weight, quant=QuantScheme(3, 64, symmetric=True, act_order=True))
    assert weight_format(three, gated=False) == CudaFormat(4, (64, 256), False, 64, True, True)
    book = replace(weight, quant=QuantScheme(4, 64, symmetric=True, book="nf4"))
    assert weight_format(book, gated=True) == CudaFormat(4, (64, 256), True, 64, True, book="nf4")
    assert weight_format(book, gated=True).planes()["tile_book"] == ("F32", (16,))
    float8 = replace(weight, quant=QuantScheme(8, 128, symmetric=True, book="fp8_e4m3", block_rows=64))
    assert weight_format(float8, gated=True) == CudaFormat(8, (64, 256), True, 128, True, book="fp8_e4m3")
    assert weight_format(float8, gated=True).planes().keys() == {"tiles", "tile_scales"}
    q4_k = QuantScheme(4, 32, symmetric=False, minimum=True)
    assert weight_format(replace(weight, quant=q4_k), gated=False) == CudaFormat(4, (64, 256), group=32, minimum=True)
    with pytest.raises(ValueError, match="minimums in groups of 64"):
        weight_format(replace(weight, quant=replace(q4_k, group_size=64)), gated=False)
    with pytest.raises(ValueError, match="dense"):
        weight_format(replace(weight, quant=None), gated=False)
    with pytest.raises(ValueError, match="groups of 48"):
        weight_format(replace(weight, quant=QuantScheme(4, 48, symmetric=True)), gated=False)


def test_a_book_is_not_optional() -> None:
    fmt = CudaFormat(4, (64, 2048), True, 128, symmetric=True, book="nf4")
    plan = plan_stream(fmt, "float16", 3)
    assert plan.entry == "book4a16_stream_f16_g128_m8"
    planes = {"tiles": torch.zeros(fmt.planes()["tiles"][1], dtype=torch.uint8),
              "tile_scales": torch.zeros(fmt.planes()["tile_scales"][1], dtype=torch.float16),
              "tile_book": torch.zeros(8)}  # fmt: skip
    with pytest.raises(ValueError, match=r"tile_book: expected F32 \(16,\)"):
        gemm_call(plan, fmt, planes, epilogue="silu_mul")
    planes["tile_book"] = torch.zeros(16, dtype=torch.float16)
    with pytest.raises(ValueError, match="book: expected float32"):
        gemm_call(
            plan, fmt, planes, epilogue="silu_mul", workspace=torch.zeros(plan.workspace),
            counters=torch.zeros(plan.counters, dtype=torch.int32), x=torch.zeros(3, 2048, dtype=torch.float16),
            y=torch.zeros(3, 32, dtype=torch.float16),
        )  # fmt: skip
