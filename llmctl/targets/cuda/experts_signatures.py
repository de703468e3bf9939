"""Signatures of the kernels of a mixture's experts, and calls of grouped products. Importing this registers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmctl.targets.cuda.call import Array, Call, Geometry, Machine, Signature, Sizes
from llmctl.targets.cuda.experts import EXPERTS_SOURCE, MAX_EXPERTS, SLOTS, GroupedPlan, route_shared
from llmctl.targets.cuda.gemm import ACTIVATION
from llmctl.targets.cuda.gemm_signatures import PLANE, STREAM_GROUPS, code_array, code_values, least_group
from llmctl.targets.cuda.layout import CudaFormat
from llmctl.targets.cuda.signatures import TAGS, blocks, floats, ints, launch, maybe, prepare, read, register, write


def grouped_call(
    machine: Machine, plan: GroupedPlan, fmt: CudaFormat | None, planes: Mapping[str, Any], *, experts: int,
    epilogue: str = "", order: Any = None, blocks: Any = None, is_sorted: bool = False, **tensors: Any,
) -> Call:  # fmt: skip
    """A planned grouped product, after the slots are sorted where the plan asks for it.

    Args:
        fmt, planes: a packed weight's, as ``gemm_call`` has them; None and ``w`` [experts * n, K] of a dense one.
        experts: how many there are. epilogue: ``silu_mul`` and the like, or "".
        order, blocks: scratch, i32 [slots] and [blocks, 4] of the plan; None where its ``group`` is "". is_sorted: a
            product of the same slots by the same plan's ``group`` has left them sorted there.
        tensors: x [rows, K], chosen i32 [slots], y [slots, outputs], n (rows of one expert).

    Raises:
        ValueError: as ``call.bind``; slots that are no multiple of x's rows.
    """
    slots, rows = tensors["chosen"].shape[0], tensors["x"].shape[0]
    if not rows or slots % rows:
        raise ValueError(f"{plan.entry}: {slots} slots are not those of {rows} rows")
    outputs = tensors["n"] // 2 if epilogue else tensors["n"]
    if tensors["y"].shape[-1] != outputs:
        raise ValueError(f"{plan.entry}: y: expected {outputs} columns, found {tensors['y'].shape[-1]}")
    if plan.group and not is_sorted:
        launch(machine, plan.group, chosen=tensors["chosen"], order=order, blocks=blocks, experts=experts)
    weight = {"w": planes["w"]} if fmt is None else {
        "codes": planes["tiles"], "scales": planes["tile_scales"], "group_size": fmt.group_size,
        **code_values(fmt, planes),
    }  # fmt: skip
    return prepare(
        plan.entry,
        Geometry(plan.grid, plan.threads, plan.shared),
        **weight,
        order=order if plan.group else None,
        blocks=blocks if plan.group else None,
        share=slots // rows,
        activation=ACTIVATION[epilogue],
        **tensors,
    )


def _slots(tag: str) -> tuple[Array, ...]:
    return (
        read("x", tag, "x_rows k"),
        read("chosen", "i32", "slots", align=4),
        maybe(read("order", "i32", "slots", align=4)),
        maybe(read("blocks", "i32", "block_count 4")),
    )


def _quantized(kind: str, group: int, size: int, tag: str) -> Signature:
    return Signature(
        f"grouped_{kind}a16_{tag}_g{group}_m{size}",
        f"grouped_{kind}a16.cu",
        (
            *_slots(tag),
            read("codes", "u8", "code_bytes"),
            read("scales", "f16", PLANE),
            code_array(kind),
            write("y", tag, "slots outputs", align=2),
            *ints("n k share group_size activation"),
        ),
        {"k": 8, "group_size": least_group(kind)},
    )


def _dense(size: int, tag: str) -> Signature:
    return Signature(
        f"grouped_dense_{tag}_m{size}",
        "grouped_dense.cu",
        (
            *_slots(tag),
            read("w", tag, "all_rows k"),
            write("y", tag, "slots outputs", align=2),
            *ints("n k share activation"),
        ),
        {"k": 8},
    )


def _route_geometry(sizes: Sizes) -> Geometry:
    return Geometry((sizes["rows"], 1, 1), 32, route_shared(sizes["experts"], sizes["groups"]))


def _route(tag: str) -> Signature:
    return Signature(
        f"route_{tag}",
        EXPERTS_SOURCE,
        (
            read("logits", tag, "rows experts", align=2),
            maybe(read("bias", "f32", "experts", align=4)),
            write("chosen", "i32", "rows top_k", align=4),
            write("shares", tag, "rows top_k", align=2),
            *ints("experts top_k softmax renormalise groups top_groups"),
            *floats("scale"),
        ),
        limits={"experts": MAX_EXPERTS, "top_k": "experts"},
        geometry=_route_geometry,
    )


def _group(size: int) -> Signature:
    return Signature(
        f"group_slots_m{size}",
        EXPERTS_SOURCE,
        (
            read("chosen", "i32", "slots", align=4),
            write("order", "i32", "slots", align=4),
            write("blocks", "i32", "block_count 4"),
            *ints("slots experts block_count"),
        ),
        limits={"experts": MAX_EXPERTS},
        geometry=lambda sizes: Geometry((1, 1, 1), 256, -(-8 * sizes["experts"] // 16) * 16),
    )


def _weighted_sum(tag: str) -> Signature:
    return Signature(
        f"weighted_sum_{tag}",
        EXPERTS_SOURCE,
        (
            read("x", tag, "rows parts*width"),
            read("shares", tag, "rows parts", align=2),
            write("y", tag, "rows width"),
            *ints("rows parts width sigmoid"),
        ),
        {"width": 8},
        geometry=blocks(256, lambda sizes: sizes["rows"] * (sizes["width"] // 8), 256),
    )


def _signatures(tag: str) -> Iterator[Signature]:
    for size in SLOTS:
        for kind, groups in STREAM_GROUPS.items():
            for group in groups:
                yield _quantized(kind, group, size, tag)
        yield _dense(size, tag)
    yield _route(tag)
    yield _weighted_sum(tag)


for _tag in TAGS:
    register(_signatures(_tag))
register(_group(size) for size in SLOTS)
