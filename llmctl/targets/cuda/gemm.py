"""The CUDA GEMM kernels from outside: what they take, and how to launch them (entry, grid, shared memory, workspace).

Pure arithmetic over shapes: the registry, the runtime, the emulated tests and the GPU tests go by the same plans.

By rows of x: up to 16 stream the weights, up to ``GEMM_ROWS`` use tensor cores, more are a dense product (cuBLAS
through torch) of weights dequantised into scratch. An act-order weight needs ``permute_columns`` of x first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import Graph, Op, Weight
from llmctl.targets.cuda.layout import TILE, CudaFormat

ACTIVATION = {"": 0, "silu_mul": 1, "gelu_mul": 2, "gelu_tanh_mul": 3, "relu_mul": 4}
"""The kernels' number of an epilogue."""
STREAM_ROWS = 16
GEMM_ROWS = 192
"""Rows of x above which a dense product of dequantised weights should be as fast: on paper, for an H200, where
dequantising costs a fixed 2.5 bytes a weight and mma.sync runs at half of cuBLAS's rate."""
H200_SMS = 132
INT8_TOKENS = (8, 16, 32, 64)
"""Rows of x a block of the int8 kernels takes."""

_STREAM_STAGES = 4
_BLOCK_TILES = 4
_HALF_THREADS = 128
_BLOCK_SHARED = 99 * 1024  # the least that a block may have on any supported architecture


@dataclass(frozen=True)
class GemmPlan:
    """One launch.

    Attributes:
        entry: kernel. grid, threads, shared: the launch; shared is dynamic shared memory, bytes.
        workspace: float32 elements of scratch. counters: uint32 elements, zero before the first launch and after each.
            Launches that may run at the same time need their own.
    """

    entry: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    workspace: int
    counters: int


def weight_format(weight: Weight, *, gated: bool, table: bool = False, experts: int = 1) -> CudaFormat:
    """How a quantized weight is stored for the kernels; integers of fewer bits than 4 take 4.

    Args:
        table: it is looked up by row as well, which needs it dense. experts: whose rows lie one below the other.

    Raises:
        ValueError: why the kernels cannot take it.
    """
    scheme = weight.quant
    if scheme is None:
        raise ValueError("the weight is dense; the kernel reads codes")
    if table:
        raise ValueError("the weight is an embedding table as well, which is kept dense")
    return CudaFormat(
        bits=4 if scheme.bits <= 4 else 8,
        shape=(weight.shape[0], weight.shape[1]),
        gated=gated,
        group=scheme.group_size,
        symmetric=scheme.symmetric,
        permuted=scheme.act_order,
        book=scheme.book,
        experts=experts,
        minimum=scheme.minimum,
    )


def product_format(op: Op, graph: Graph) -> CudaFormat:
    """``weight_format`` of what a linear or a grouped linear of a graph multiplies by.

    Raises:
        ValueError: as ``weight_format``.
    """
    name, count = op.weights[0], op.attrs.get("count", 1)
    scheme = graph.weights[name].quant
    if op.kind == "grouped_linear" and scheme is not None and scheme.act_order:
        raise ValueError("the experts have act-order groups; the kernel reads columns in order")
    return weight_format(graph.weights[name], gated="epilogue" in op.attrs, table=name in graph.tables(), experts=count)


def gemm_entries(fmt: CudaFormat, dtype: str) -> tuple[str, ...]:
    """Every entry point that a weight of a format may need, whatever the rows of x."""
    tag = DTYPES[dtype].tag
    plans = [plan_gemm(fmt, dtype, m).entry for m in (1, STREAM_ROWS, STREAM_ROWS + 1, GEMM_ROWS)]
    permute = (f"permute_columns_{tag}",) if fmt.permuted else ()
    return (*plans, f"dequantize_{fmt.kind}_{tag}", *permute)


def gemm_sources(fmt: CudaFormat) -> tuple[str, ...]:
    """The files of ``gemm_entries``."""
    return (f"{fmt.kind}a16_stream.cu", f"{fmt.kind}a16_gemm.cu", "dequantize.cu")


def int8_entries(dtype: str) -> tuple[str, ...]:
    """Every entry point that an 8-bit weight may need for int8 rows of x."""
    return tuple(f"w8a8_gemm_{DTYPES[dtype].tag}_t{tokens}" for tokens in INT8_TOKENS)


@functools.lru_cache(maxsize=4096)
def plan_stream(fmt: CudaFormat, dtype: str, m: int, sms: int = H200_SMS) -> GemmPlan:
    """The launch for m = 1..16 rows of x. K is shared out regardless of m, so a row has the same bits in any batch."""
    chunks = 16 // fmt.bits
    columns = min(fmt.group if fmt.group in (16, 32, 64) else 128, 32 * chunks)
    tiles, steps = fmt.rows // TILE, fmt.columns // (32 * chunks)
    # Eight warps on every SM keep 48 KiB in flight; where tiles alone do that, smaller blocks leave a shorter tail.
    warps = 4 if tiles >= 2 * sms or steps < 8 else 8
    splits = max(1, min(sms // tiles, steps // warps))
    stage = chunks * 128 * fmt.bits + 32 * chunks // columns * TILE * (4 if fmt.by_halves else 3)
    rows = 8 if m <= 8 else 16
    return GemmPlan(
        entry=f"{fmt.kind}a16_stream_{DTYPES[dtype].tag}_g{columns}_m{rows}",
        grid=(tiles, splits, 1),
        threads=32 * warps,
        shared=warps * _STREAM_STAGES * stage,
        workspace=splits * tiles * TILE * rows if splits > 1 else 0,
        counters=tiles if splits > 1 else 0,
    )


@functools.lru_cache(maxsize=4096)
def plan_tile(fmt: CudaFormat, dtype: str, m: int, *, int8: bool = False, sms: int = H200_SMS) -> GemmPlan:
    """The launch on tensor cores, for any m; ``int8``: int8 activations."""
    sizes = INT8_TOKENS if int8 else (32, 64)
    tokens = next((size for size in sizes if m <= size), sizes[-1])
    shared = _tile_ring(fmt, tokens, int8)
    columns, rows = -(-m // tokens), -(-fmt.rows // (TILE * _BLOCK_TILES))
    steps = fmt.columns // 64
    # Two blocks of four warps an SM hide latency; too few blocks share K, first over the halves of a block (sums meet
    # in shared memory), then over blocks, as long as every share is a few stages long.
    tiles = columns * rows
    shares = max(1, min(2 * sms // tiles, steps // 4))
    # Whole blocks leave SMs idle when the pairs do not come out even.
    paired = shares > 1 and 2 * shared <= _BLOCK_SHARED and (shares % 2 == 0 or 10 * tiles * (shares // 2) >= 9 * sms)
    halves = 2 if paired else 1
    splits = shares // halves
    return GemmPlan(
        entry=f"{fmt.kind}a{8 if int8 else 16}_gemm_{DTYPES[dtype].tag}_t{tokens}",
        grid=(columns, rows, splits),
        threads=_HALF_THREADS * halves,
        shared=shared * halves,
        workspace=splits * tiles * TILE * _BLOCK_TILES * tokens if splits > 1 else 0,
        counters=tiles if splits > 1 else 0,
    )


def plan_gemm(fmt: CudaFormat, dtype: str, m: int, sms: int = H200_SMS) -> GemmPlan:
    """The launch for 16-bit activations and m rows of x, by m."""
    return plan_stream(fmt, dtype, m, sms) if m <= STREAM_ROWS else plan_tile(fmt, dtype, m, sms=sms)


def _tile_ring(fmt: CudaFormat, tokens: int, int8: bool) -> int:
    """Shared memory of a half: TileShape::kRing of gemm_tile.cuh."""
    groups = 2 * TILE * 4 if fmt.by_halves else TILE * 3  # bytes a chunk: scales, and zeros or minimums
    stage = 2 * tokens * (32 if int8 else 64) + _BLOCK_TILES * 2 * (128 * fmt.bits + groups)
    return stage * (3 if stage > 12 * 1024 else 4)
