"""Signatures of the attention kernels; ``attention.py`` plans their launches. Importing this registers them."""

from __future__ import annotations

from collections.abc import Iterable

from llmctl.targets.cuda.attention import HEAD_DIMS, Launch
from llmctl.targets.cuda.call import Array, Geometry, Signature
from llmctl.targets.cuda.signatures import TAGS, floats, ints, maybe, read, register, update


def planned(plan: Launch) -> Geometry:
    """The geometry of a planned launch."""
    return Geometry(plan.grid, plan.threads, plan.shared)


def _cache(kv: str, dim: int) -> tuple[Array, ...]:
    scales = [read(name, "f32", "cells kv_heads", align=4) for name in ("key_scales", "value_scales")]
    return (
        *(read(name, kv, f"cells kv_heads {dim}") for name in ("keys", "values")),
        *(scales if kv == "s8" else map(maybe, scales)),
        read("block_tables", "i32", "sequences blocks", align=4, stride="table_stride"),
        read("seq_lens", "i32", "sequences", align=4),
    )


def _attention(tag: str, kv: str, dim: int) -> Iterable[Signature]:
    q = read("q", tag, f"tokens heads*{dim}", stride="q_stride")
    starts = read("query_start", "i32", "sequences+1", align=4)
    factors = floats("scale softcap key_scale value_scale")
    yield Signature(
        f"attention_decode_{tag}_{kv}_d{dim}",
        f"attention_decode_d{dim}.cu",
        (
            q,
            *_cache(kv, dim),
            maybe(starts),
            update("parts", "f32", f"sequences heads max_splits {dim}"),
            update("part_stats", "f32", "sequences heads max_splits 2"),
            *ints("heads kv_heads block_size table_stride q_stride window split max_splits"),
            *factors,
        ),
        {"q_stride": 8, "split": 16, "heads": 1},
    )
    yield Signature(
        f"attention_prefill_{tag}_{kv}_d{dim}",
        f"attention_prefill_d{dim}.cu",
        (
            q,
            *_cache(kv, dim),
            starts,
            update("out", tag, f"tokens heads*{dim}", stride="out_stride"),
            *ints("heads kv_heads block_size table_stride q_stride window out_stride sequences min_rows"),
            *factors,
        ),
        {"q_stride": 8, "out_stride": 8},
    )


def _combine(tag: str) -> Signature:
    return Signature(
        f"attention_combine_{tag}",
        "attention_combine.cu",
        (
            read("parts", "f32", "sequences heads max_splits head_dim"),
            read("part_stats", "f32", "sequences heads max_splits 2"),
            read("seq_lens", "i32", "sequences", align=4),
            maybe(read("query_start", "i32", "sequences+1", align=4)),
            update("out", tag, "tokens heads*head_dim", stride="out_stride"),
            *ints("sequences heads head_dim out_stride window split max_splits"),
            *floats("value_unit"),
        ),
        limits={"head_dim": 256},
    )


for _tag in TAGS:
    register([_combine(_tag)])
    for _kv in (_tag, "s8", "e4m3"):
        for _dim in HEAD_DIMS:
            register(_attention(_tag, _kv, _dim))
