"""Signatures of the GEMM kernels, and their calls from packed weights and plans. Importing this registers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmctl.targets.cuda.call import Array, Call, Geometry, Signature
from llmctl.targets.cuda.gemm import ACTIVATION, STREAM_ROWS, GemmPlan
from llmctl.targets.cuda.layout import CudaFormat
from llmctl.targets.cuda.signatures import TAGS, blocks, ints, maybe, prepare, read, register, update, write

STREAM_GROUPS = {
    "w4": (32, 64, 128), "w8": (32, 64), "fp8": (32, 64), "book4": (32, 64, 128), "k4": (16, 32), "k8": (16, 32),
}  # fmt: skip
"""Columns a group that the streaming kernels of a kind of codes are made for."""
PLANE = "tiles groups 32"
"""The shape of a plane of scales or zeros."""


def gemm_call(
    plan: GemmPlan, fmt: CudaFormat, planes: dict[str, Any], *, epilogue: str = "", workspace: Any = None,
    counters: Any = None, **tensors: Any,
) -> Call:  # fmt: skip
    """A planned product with a packed weight.

    Args:
        planes: the weight's planes by suffix, as ``fmt.planes()`` names them.
        epilogue: ``silu_mul`` and the like for a gated weight, else "".
        workspace, counters: at least as much as the plan asks for; may be None when it asks for none.
        tensors: x [m, K], y [m, N] (gated: [m, N / 2]), and maybe bias [N], residual (like y), token_scales [m].

    Raises:
        ValueError: as ``call.bind``; planes or scratch that do not fit the format or the plan.
    """
    for suffix, (dtype, shape) in fmt.planes().items():
        if tuple(planes[suffix].shape) != shape:
            raise ValueError(f"{plan.entry}: {suffix}: expected {dtype} {shape}, found {tuple(planes[suffix].shape)}")
    for name, tensor, needed in (("workspace", workspace, plan.workspace), ("counters", counters, plan.counters)):
        if needed and (tensor is None or tensor.numel() < needed):
            raise ValueError(f"{plan.entry}: {name}: expected {needed} elements or more")
    if fmt.gated != bool(epilogue) or epilogue not in ACTIVATION:
        raise ValueError(f"{plan.entry}: epilogue '{epilogue}' of a weight that is {'' if fmt.gated else 'not '}gated")
    rows, columns = fmt.shape
    outputs = rows // 2 if epilogue else rows
    if tensors["y"].shape[-1] != outputs:
        raise ValueError(f"{plan.entry}: y: expected {outputs} columns, found {tensors['y'].shape[-1]}")
    return prepare(
        plan.entry,
        Geometry(plan.grid, plan.threads, plan.shared),
        codes=planes["tiles"],
        scales=planes["tile_scales"],
        **code_values(fmt, planes),
        workspace=workspace if plan.workspace else None,
        counters=counters if plan.counters else None,
        n=rows,
        k=columns,
        group_size=fmt.group_size,
        activation=ACTIVATION[epilogue],
        **tensors,
    )


def dequantize_call(fmt: CudaFormat, tag: str, planes: dict[str, Any], w: Any) -> Call:
    """A packed weight into w [N, K], in packed column order.

    Raises:
        ValueError: as ``call.bind``.
    """
    return prepare(
        f"dequantize_{fmt.kind}_{tag}",
        codes=planes["tiles"],
        scales=planes["tile_scales"],
        **code_values(fmt, planes),
        w=w,
        group_size=fmt.group_size,
        gated=int(fmt.gated),
    )


def code_values(fmt: CudaFormat, planes: Mapping[str, Any]) -> dict[str, Any]:
    """What says which numbers the codes are, as the kernels' arguments."""
    if fmt.kind == "book4":
        return {"book": planes["tile_book"]}
    if fmt.minimum:
        return {"minimums": planes["tile_minimums"]}
    return {} if fmt.symmetric else {"zeros": planes["tile_zeros"]}


def code_array(kind: str) -> Array:
    """The parameter that ``code_values`` gives."""
    if kind == "book4":
        return read("book", "f32", "16")
    return maybe(read("minimums", "f16", PLANE) if kind in ("k4", "k8") else read("zeros", "u8", PLANE))


def least_group(kind: str) -> int:
    """Columns that groups are multiples of."""
    return min(STREAM_GROUPS.get(kind, (32,)))


def _gemm(entry: str, source: str, tag: str, *, int8: bool = False, rows: int = 0) -> Signature:
    x = [read("x", "s8", "m k"), read("token_scales", "f32", "m", align=4)] if int8 else [read("x", tag, "m k")]
    kind = entry.partition("a16")[0]
    values = () if int8 else (code_array(kind),)
    return Signature(
        entry,
        source,
        (
            *x,
            read("codes", "u8", "code_bytes"),
            read("scales", "f16", PLANE),
            *values,
            maybe(read("bias", tag, "n", align=2)),
            maybe(read("residual", tag, "m outputs", align=2)),
            write("y", tag, "m outputs", align=2),
            maybe(update("workspace", "f32", "workspace_size")),
            maybe(update("counters", "u32", "counter_count", align=4)),
            *ints("m n k group_size activation"),
        ),
        {"k": 16 if int8 else 8, "group_size": least_group(kind)},
        {"m": rows} if rows else {},
    )


def _dequantize(kind: str, tag: str) -> Signature:
    return Signature(
        f"dequantize_{kind}_{tag}",
        "dequantize.cu",
        (
            read("codes", "u8", "code_bytes"),
            read("scales", "f16", PLANE),
            code_array(kind),
            write("w", tag, "n k"),
            *ints("n k group_size gated"),
        ),
        {"k": 8, "group_size": least_group(kind)},
        geometry=lambda sizes: Geometry((sizes["tiles"], -(-sizes["k"] // 128), 1), 128),
    )


def _permute(tag: str) -> Signature:
    return Signature(
        f"permute_columns_{tag}",
        "dequantize.cu",
        (read("x", tag, "m k"), read("permutation", "i32", "k"), write("y", tag, "m k"), *ints("m k")),
        geometry=blocks(256, lambda sizes: sizes["m"] * sizes["k"], 256),
    )


def _signatures(tag: str) -> Iterator[Signature]:
    for kind, groups in STREAM_GROUPS.items():
        name = f"{kind}a16"
        for rows in (8, STREAM_ROWS):
            for group in groups:
                yield _gemm(f"{name}_stream_{tag}_g{group}_m{rows}", f"{name}_stream.cu", tag, rows=rows)
        for tokens in (32, 64):
            yield _gemm(f"{name}_gemm_{tag}_t{tokens}", f"{name}_gemm.cu", tag)
        yield _dequantize(kind, tag)
    for tokens in (8, 16, 32, 64):
        yield _gemm(f"w8a8_gemm_{tag}_t{tokens}", "w8a8_gemm.cu", tag, int8=True)
    yield _permute(tag)


for _tag in TAGS:
    register(_signatures(_tag))
