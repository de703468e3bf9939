"""Signatures of the CUDA kernels for norms, RoPE, elementwise ops, sampling and quantised rows, by entry point.

The kernels' files say what each argument means. Launch geometry is a function of sizes here, and only here: the
emulated tests, the tests on a device and the runtime launch alike. ``register`` adds the entries of other files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llmctl.targets.cuda.call import Array, Call, Geometry, Machine, Number, Signature, Sizes, bind

SIGNATURES: dict[str, Signature] = {}
"""By entry point."""

TAGS = ("f16", "bf16")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def register(signatures: Iterable[Signature]) -> None:
    """Add signatures to ``SIGNATURES``."""
    SIGNATURES.update({signature.entry: signature for signature in signatures})


def prepare(entry: str, geometry: Geometry | None = None, **arguments: Any) -> Call:
    """``bind`` by entry point.

    Raises:
        ValueError: no such entry, or as ``bind``.
    """
    if entry not in SIGNATURES:
        raise ValueError(f"no CUDA kernel '{entry}'")
    return bind(SIGNATURES[entry], arguments, geometry)


def launch(machine: Machine, entry: str, geometry: Geometry | None = None, **arguments: Any) -> None:
    """Check arguments and launch.

    Raises:
        ValueError: as ``prepare``.
    """
    machine.launch(prepare(entry, geometry, **arguments))


def read(name: str, dtype: str, shape: str, **options: Any) -> Array:
    """An input; ``shape``: sizes separated by spaces."""
    return Array(name, dtype, tuple(shape.split()), **options)


def write(name: str, dtype: str, shape: str, **options: Any) -> Array:
    """An output, all of which is written."""
    return Array(name, dtype, tuple(shape.split()), "write", **options)


def update(name: str, dtype: str, shape: str, **options: Any) -> Array:
    """Read and written, or written in part."""
    return Array(name, dtype, tuple(shape.split()), "update", **options)


def maybe(array: Array) -> Array:
    """The same, but it may be None."""
    return Array(array.name, array.dtype, array.shape, array.use, array.align, array.stride, True)


def ints(names: str) -> tuple[Number, ...]:
    """i32 parameters."""
    return tuple(Number(name, "i32") for name in names.split())


def floats(names: str) -> tuple[Number, ...]:
    """f32 parameters."""
    return tuple(Number(name, "f32") for name in names.split())


def blocks(threads: int, items: Callable[[Sizes], int], per_block: int = 1) -> Callable[[Sizes], Geometry]:
    """As many blocks of ``threads`` as ``items`` need."""
    return lambda sizes: Geometry((-(-items(sizes) // per_block), 1, 1), threads)


def _rows(sizes: Sizes) -> int:
    return sizes["rows"]


# ---- norm.cu -------------------------------------------------------------------------------------------------------

_ROW_BLOCKS = blocks(256, _rows)


def _norm(tag: str, kind: str, add: bool, int8: bool) -> Signature:
    row = "rows hidden"
    inputs = [read("x", tag, row), *([read("residual", tag, row)] if add else []), read("w", tag, "hidden")]
    if kind == "layer":
        inputs.append(maybe(read("b", tag, "hidden")))
    outputs = [write("q", "s8", row, align=8), write("scales", "f32", "rows", align=4)] if int8 else [
        write("y", tag, row)
    ]  # fmt: skip
    if add:
        outputs.append(write("sum", tag, row))
    tail = (*ints("hidden"), *floats("eps"), *(ints("plus_one") if kind == "rms" else ()))
    name = f"{'add_' if add else ''}{kind}_norm_{'s8_' if int8 else ''}{tag}"
    return Signature(name, "norm.cu", (*inputs, *outputs, *tail), {"hidden": 8}, geometry=_ROW_BLOCKS)


def _head_norm(tag: str) -> Signature:
    return Signature(
        f"head_rms_norm_{tag}",
        "norm.cu",
        (
            read("x", tag, "rows heads*head_dim", stride="x_stride"),
            read("w", tag, "head_dim"),
            write("y", tag, "rows heads*head_dim", stride="y_stride"),
            *ints("rows heads head_dim x_stride y_stride"),
            *floats("eps"),
            *ints("plus_one"),
        ),
        {"head_dim": 8, "x_stride": 8, "y_stride": 8},
        geometry=blocks(128, lambda s: s["rows"] * s["heads"], 4),
    )


# ---- rope_kv.cu ----------------------------------------------------------------------------------------------------


def _rope_kv(tag: str, kv: str) -> Signature:
    def row(make: Callable[..., Array], name: str, heads: str) -> Array:
        return maybe(make(name, tag, f"tokens {heads}*head_dim", align=8, stride=f"{name}_stride"))

    cache = "cells kv_heads head_dim"
    scales = ("key_scales", "value_scales") if kv == "s8" else ()
    return Signature(
        f"rope_kv_{tag}_{kv}",
        "rope_kv.cu",
        (
            row(read, "q", "heads"),
            row(read, "k", "kv_heads"),
            row(read, "v", "kv_heads"),
            row(write, "q_out", "heads"),
            maybe(read("positions", "i64", "tokens", align=8)),
            *(maybe(read(name, "f32", "places rotary_dim/2")) for name in ("cosines", "sines")),
            maybe(read("slots", "i64", "tokens", align=8)),
            *(maybe(update(name, kv, cache, align=8)) for name in ("keys", "values")),
            *(
                maybe(update(name, "f32", "cells kv_heads", align=4))
                for name in ("key_scales", "value_scales")
            ),
            *ints("tokens heads kv_heads head_dim rotary_dim gptj q_stride k_stride v_stride q_out_stride"),
            *floats("key_scale value_scale"),
        ),
        {"head_dim": 4, "rotary_dim": 2, **{f"{name}_stride": 4 for name in ("q", "k", "v", "q_out")}},
        {"head_dim": 256, "rotary_dim": "head_dim"},
        {
            "heads": ("q", "q_out"),
            "kv_heads": ("k", "v", "slots", "keys", "values", *scales),
            "rotary_dim": ("positions", "cosines", "sines"),
        },
        blocks(128, lambda s: s["tokens"] * (s["heads"] + 2 * s["kv_heads"]), 4),
    )  # fmt: skip


# ---- elementwise.cu, quantize_rows.cu ------------------------------------------------------------------------------


def _elementwise(name: str, tag: str, *arrays: Array, more: tuple[Number, ...] = ()) -> Signature:
    return Signature(
        f"{name}_{tag}", "elementwise.cu", (*arrays, *ints("rows width"), *more), {"width": 8},
        geometry=blocks(256, lambda s: s["rows"] * (s["width"] // 8), 256),
    )  # fmt: skip


def _elementwise_all(tag: str) -> Iterable[Signature]:
    x, y, z = read("x", tag, "rows width"), read("y", tag, "rows width"), write("z", tag, "rows width")
    made = write("y", tag, "rows width")
    for fn in ACTIVATIONS:
        yield _elementwise(f"act_{fn}", tag, x, made)
        yield _elementwise(f"{fn}_mul", tag, read("x", tag, "rows 2*width"), made)
    yield _elementwise("add", tag, x, y, z)
    yield _elementwise("mul", tag, x, y, z)
    ids, table = read("ids", "i64", "rows", align=8), read("w", tag, "table width")
    yield _elementwise("embed", tag, ids, table, made, more=floats("scale"))
    positions = read("positions", "i64", "rows", align=8)
    yield _elementwise("pos_embed", tag, x, positions, table, z, more=ints("offset"))


def _quantize(tag: str, fn: str | None) -> Signature:
    return Signature(
        f"{fn}_mul_s8_{tag}" if fn else f"quantize_s8_{tag}",
        "quantize_rows.cu",
        (
            read("x", tag, "rows 2*width" if fn else "rows width"),
            write("q", "s8", "rows width", align=8),
            write("scales", "f32", "rows", align=4),
            *ints("width"),
        ),
        {"width": 8},
        geometry=_ROW_BLOCKS,
    )


# ---- sampling.cu, logits.cu ----------------------------------------------------------------------------------------


def _sample(tag: str) -> Signature:
    return Signature(
        f"sample_{tag}",
        "sampling.cu",
        (
            read("logits", tag, "rows vocab", align=4 if tag == "f32" else 2, stride="stride"),
            maybe(read("allowed", "u32", "rows vocab/+32", align=4)),
            read("temperature", "f32", "rows", align=4),
            maybe(read("top_k", "i32", "rows", align=4)),
            *(maybe(read(name, "f32", "rows", align=4)) for name in ("top_p", "min_p")),
            read("seeds", "u64", "rows", align=8),
            read("positions", "i64", "rows", align=8),
            write("tokens", "i32", "rows", align=4),
            *ints("vocab stride"),
        ),
        limits={"vocab": 2**23},
        geometry=blocks(1024, _rows),
    )  # fmt: skip


def _feed() -> Signature:
    return Signature(
        "feed_tokens", "sampling.cu",
        (
            update("ids", "i64", "rows", align=8), read("source", "i32", "rows", align=4),
            read("tokens", "i32", "count", align=4), *ints("rows"),
        ),
        geometry=blocks(256, _rows, 256),
    )  # fmt: skip


def _logits() -> Iterable[Signature]:
    logits = update("logits", "f32", "rows vocab", align=4)

    def column(name: str, dtype: str, size: str) -> Array:
        return read(name, dtype, size, align=4)

    biases = (column("bias_rows", "i32", "n"), column("bias_ids", "i32", "n"), column("bias_values", "f32", "n"))
    yield Signature(
        "add_bias", "logits.cu", (logits, *biases, *ints("n vocab")), geometry=blocks(256, lambda s: s["n"], 256)
    )
    lists = (column("starts", "i32", "rows+1"), column("ids", "i32", "n"), column("counts", "i32", "n"))
    penalties = tuple(column(name, "f32", "rows") for name in ("repetition", "presence", "frequency"))
    yield Signature("penalise", "logits.cu", (logits, *lists, *penalties, *ints("vocab")), geometry=_ROW_BLOCKS)
    results = (write("logprob", "f32", "rows", align=4), write("rank", "i32", "rows", align=4))
    yield Signature(
        "logprobs", "logits.cu",
        (read("logits", "f32", "rows vocab", align=4), column("tokens", "i32", "rows"), *results, *ints("vocab")),
        geometry=blocks(1024, _rows),
    )  # fmt: skip


for _tag in TAGS:
    register(
        _norm(_tag, kind, add, int8) for kind in ("rms", "layer") for add in (False, True) for int8 in (False, True)
    )
    register([_head_norm(_tag), *(_rope_kv(_tag, kv) for kv in (_tag, "s8", "e4m3"))])
    register(_elementwise_all(_tag))
    register(_quantize(_tag, fn) for fn in (None, *ACTIVATIONS))
register([*(_sample(tag) for tag in (*TAGS, "f32")), _feed(), *_logits()])
