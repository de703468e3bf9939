"""Signatures of lora.cu, the adapters of several requests in one batch, and how its two kernels follow each other."""

from __future__ import annotations

from typing import Any

from llmctl.targets.cuda.call import Geometry, Machine, Signature, Sizes
from llmctl.targets.cuda.lora import MAX_RANK, RANK_MULTIPLE, SLICE, lora_entries, lora_splits
from llmctl.targets.cuda.signatures import TAGS, ints, launch, read, register, update

_ROWS, _COLUMNS, _THREADS = 16, 128, 128


def add_adapters(machine: Machine, tag: str, slice_: int = SLICE, **tensors: Any) -> None:
    """``y += scale * (x @ a.T) @ b.T`` for each row's own adapter; rows without one (-1) stay as they are.

    Args:
        tag: ``f16`` or ``bf16``, of x, a, b and y.
        tensors: x [tokens, k] and y [tokens, n], whose rows may be apart; a [adapters, rank, k], b [adapters, n, rank],
            scales f32 [adapters], adapters i32 [tokens]; scratch h f32 [lora_splits(k), tokens, rank].

    Raises:
        ValueError: what the kernels cannot take.
    """
    rank, k, splits = tensors["a"].shape[1], tensors["x"].shape[1], tensors["h"].shape[0]
    if splits != lora_splits(k, slice_):
        raise ValueError(
            f"lora: h has {splits} splits; {k} columns in slices of {slice_} make {lora_splits(k, slice_)}"
        )
    shrink, expand = (
        {name: tensors[name] for name in names.split()} for names in ("x a adapters h", "h b scales adapters y")
    )
    shrink_entry, expand_entry = lora_entries(tag, rank)
    launch(machine, shrink_entry, slice=slice_, **shrink)
    launch(machine, expand_entry, **expand)


def _shrink_geometry(sizes: Sizes) -> Geometry:
    return Geometry((-(-sizes["tokens"] // _ROWS), sizes["splits"], 1), _THREADS)


def _expand_geometry(sizes: Sizes) -> Geometry:
    return Geometry((-(-sizes["tokens"] // _ROWS), -(-sizes["n"] // _COLUMNS), 1), _THREADS)


def _shrink(tag: str, ranks: int) -> Signature:
    return Signature(
        f"lora_shrink_{tag}_r{ranks}",
        "lora.cu",
        (
            read("x", tag, "tokens k", stride="x_stride"),
            read("a", tag, "count rank k"),
            read("adapters", "i32", "tokens", align=4),
            update("h", "f32", "splits tokens rank"),
            *ints("tokens k rank x_stride slice"),
        ),
        {"k": 8, "rank": RANK_MULTIPLE, "x_stride": 8, "slice": 32},
        {"rank": ranks},
        geometry=_shrink_geometry,
    )


def _expand(tag: str, ranks: int) -> Signature:
    return Signature(
        f"lora_expand_{tag}_r{ranks}",
        "lora.cu",
        (
            read("h", "f32", "splits tokens rank"),
            read("b", tag, "count n rank"),
            read("scales", "f32", "count", align=4),
            read("adapters", "i32", "tokens", align=4),
            update("y", tag, "tokens n", align=4, stride="y_stride"),
            *ints("tokens n rank splits y_stride"),
        ),
        {"n": 8, "rank": RANK_MULTIPLE, "y_stride": 2},
        {"rank": ranks},
        geometry=_expand_geometry,
    )


for _tag in TAGS:
    register(make(_tag, ranks) for make in (_shrink, _expand) for ranks in (16, MAX_RANK))
