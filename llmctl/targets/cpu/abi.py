"""What Python and the native kernels agree on: enums, structs in ctypes, constants, the library's entry points.

A library carries the same list as numbers that its own declarations gave (``native/abi.h``); ``open_library`` compares.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from llmctl.errors import EngineLoadError

TILE = 32
"""Outputs of a linear that lie together: ``kTile``."""
LANES = 16
"""Lanes of a vector, half a tile; a head of the KV cache is padded to a multiple of it: ``kLanes``."""
MAX_ACT_GROUP = 128
"""Most columns that share an activation scale: ``kMaxActGroup``."""
QUERIES = 8
"""Queries of one K/V head that a kernel takes at once: ``kQueries``."""
MAX_HEAD = 256
"""Most columns of a head: ``kMaxHead``."""
KEYS = 16
"""Tokens of a tile of the KV cache, which a block is a multiple of: ``kKeys``."""
TILE_ROWS = 16
"""Rows of int8 activations that lie together in tile registers: ``kTileRows``."""
TILE_BYTES = 64
"""Bytes of a row of a tile register: ``kTileBytes``."""
SPLIT = 128
"""Fewest columns of x that a partial sum of adapters has: ``kSplit``."""
MAX_SPLITS = 16
"""Most partial sums: ``kMaxSplits``."""
MAX_KINDS = 21
"""Entries of a profile, one a ``Kind``: ``kMaxKinds``."""


class Kind(IntEnum):
    """``enum Kind``."""

    EMBED = 0
    POS_EMBED = 1
    RMS_NORM = 2
    LAYER_NORM = 3
    HEAD_RMS_NORM = 4
    LINEAR = 5
    ACT = 6
    MUL = 7
    ADD = 8
    ROPE = 9
    KV_WRITE = 10
    ATTENTION = 11
    GATHER_ROWS = 12
    QUANTIZE = 13
    TO_BF16 = 14
    CAP = 15
    ROUTE = 16
    SORT_ROWS = 17
    GATHER_EXPERTS = 18
    GROUPED_LINEAR = 19
    WEIGHTED_SUM = 20


ACT = {"": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
DTYPE = {"f32": 0, "bf16": 1, "f16": 2, "w4": 3, "w8": 4, "w4_min": 5, "w8_min": 6, "e4m3": 7, "book4": 8}
KV_TYPE = {"f32": 0, "bf16": 1, "s8": 2}
WEIGHT_BITS = {"f32": 32, "bf16": 16, "w4": 4, "w8": 8, "w4_min": 4, "w8_min": 8, "e4m3": 8, "book4": 4}
"""Bits of an element of a linear's weight, by ``DTYPE``."""


def kv_token_bytes(columns: int, dtype: str) -> int:
    """Bytes of one token's K or V of one head, its scale included.

    Args:
        columns: of the head, padded to ``LANES``. dtype: of ``KV_TYPE``.
    """
    return columns + 4 if dtype == "s8" else columns * (2 if dtype == "bf16" else 4)


class Matrix(c.Structure):
    """``struct Matrix``: fp32 rows of ``ld`` elements."""

    _fields_ = (("data", c.c_void_p), ("ld", c.c_int64))


class IntActs(c.Structure):
    """``struct IntActs``: int8 codes with a scale and a negated sum a group."""

    _fields_ = (
        *((name, c.c_void_p) for name in ("codes", "scales", "negated_sums")),
        *((name, c.c_int64) for name in ("k", "group")),
        *((name, c.c_int32) for name in ("wide", "grouped")),
    )


class Choice(c.Structure):
    """``struct Choice``: the experts of each token."""

    _fields_ = (
        *((name, c.c_void_p) for name in ("experts", "order", "place", "starts")),
        *((name, c.c_int64) for name in ("count", "top_k", "groups", "top_groups")),
        *((name, c.c_int32) for name in ("sigmoid", "renormalise")),
    )


class LoraModule(c.Structure):
    """``struct LoraModule``."""

    _fields_ = (
        *((name, c.c_int64) for name in ("first", "stride", "panels")),
        *((name, c.c_void_p) for name in ("a", "b", "scales", "ranks", "a_scales", "b_scales")),
    )


class OpDesc(c.Structure):
    """``struct OpDesc``."""

    _fields_ = (
        *((name, c.c_int32) for name in ("kind", "act", "weight_dtype", "neox")),
        *((name, c.c_int32) for name in ("writes_kv", "on_rows")),
        ("layer", c.c_int64),
        *((name, Matrix) for name in ("x", "x2", "x3", "y", "y2")),
        *((name, IntActs) for name in ("x8", "y8")),
        *((name, c.c_int64) for name in ("width", "n", "n_padded", "k", "group", "zero_step")),
        *((name, c.c_int64) for name in ("nested", "nested_bits", "code_bits", "scale_rows")),
        *((name, c.c_void_p) for name in ("w", "w_scales", "w_zeros", "w_minimums", "w_scale_codes", "w_scale_supers")),
        *((name, c.c_void_p) for name in ("w_scale_supers32", "w_scale_starts", "w_scale_map")),
        *((name, c.c_void_p) for name in ("w_scales32", "w_book", "bias")),
        *((name, c.c_void_p) for name in ("permutation", "x16")),
        *((name, c.c_int64) for name in ("heads", "kv_heads", "head_dim", "rotary_dim", "window")),
        *((name, c.c_void_p) for name in ("cos", "sin", "lora")),
        *((name, c.c_int64) for name in ("num_lora", "lora_rank")),
        ("low", Matrix),
        ("lora_dtype", c.c_int32),
        *((name, c.c_float) for name in ("eps", "offset", "scale", "softcap")),
        ("choice", Choice),
        ("sorted", c.c_int32),
    )


class KvDesc(c.Structure):
    """``struct KvDesc``."""

    _fields_ = (
        ("base", c.c_void_p),
        *((name, c.c_int64) for name in ("kv_heads", "head_dim", "padded_dim")),
        *((name, c.c_int32) for name in ("type", "group")),
    )


class LogprobsOut(c.Structure):
    """``struct LogprobsOut``."""

    _fields_ = (
        ("width", c.c_int64),
        *((name, c.c_void_p) for name in ("logprobs", "ranks", "top_ids", "top_logprobs")),
    )


class StepDesc(c.Structure):
    """``struct StepDesc``."""

    _fields_ = (
        *((name, c.c_int64) for name in ("tokens", "seqs", "rows")),
        *((name, c.c_void_p) for name in ("token_ids", "positions", "slots", "query_start", "block_tables")),
        ("max_blocks", c.c_int64),
        *((name, c.c_void_p) for name in ("logits_rows", "targets", "target_tops")),
        ("out", LogprobsOut),
        ("adapters", c.c_void_p),
    )


class SamplingDesc(c.Structure):
    """``struct SamplingDesc``."""

    _fields_ = (
        ("rows", c.c_int64),
        *((name, c.c_void_p) for name in ("temperature", "seeds", "positions", "top_k", "top_p", "min_p")),
        *((name, c.c_void_p) for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")),
        *((name, c.c_void_p) for name in ("prompt_ids", "prompt_offsets", "output_ids", "output_offsets")),
        *((name, c.c_void_p) for name in ("bias_ids", "bias_values", "bias_offsets", "allowed_mask", "num_logprobs")),
        ("token_ids", c.c_void_p),
        ("out", LogprobsOut),
    )


STRUCTS: tuple[type[c.Structure], ...] = (
    Matrix, IntActs, Choice, LoraModule, OpDesc, KvDesc, LogprobsOut, StepDesc, SamplingDesc,
)  # fmt: skip
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llmctl_create": (c.c_void_p, (c.POINTER(OpDesc), c.c_int64, c.POINTER(KvDesc), *[c.c_int64] * 6, c.c_int)),
    "llmctl_adapt": (c.c_int, (c.c_void_p, c.POINTER(OpDesc), c.c_int64)),
    "llmctl_destroy": (None, (c.c_void_p,)),
    "llmctl_step": (c.c_int, (c.c_void_p, c.POINTER(StepDesc), c.POINTER(SamplingDesc))),
    "llmctl_weight_bytes": (c.c_int64, (c.c_void_p,)),
    "llmctl_profile": (None, (c.c_void_p, c.POINTER(c.c_double))),
    "llmctl_variant": (c.c_char_p, ()),
    "llmctl_refusal": (c.c_char_p, ()),
    "llmctl_create_error": (c.c_char_p, ()),
}
"""Result and arguments of the entry points."""


def abi_entries() -> dict[str, int]:
    """The numbers to agree on, by name, in the order of ``kAbi`` in ``native/abi.h``."""
    entries = {f"kind.{kind.name.lower()}": int(kind) for kind in Kind}
    entries |= {f"act.{name or 'none'}": number for name, number in ACT.items()}
    entries |= {f"dtype.{name}": number for name, number in DTYPE.items()}
    entries |= {f"kv_type.{name}": number for name, number in KV_TYPE.items()}
    for struct in STRUCTS:
        for name, kind, *_ in struct._fields_:
            field = getattr(struct, name)
            entries |= {f"{struct.__name__}.{name}.{fact}": getattr(field, fact) for fact in ("offset", "size")}
            entries[f"{struct.__name__}.{name}.type"] = type_class(kind)
        entries[f"{struct.__name__}.size"] = c.sizeof(struct)
    entries |= {"tile": TILE, "lanes": LANES, "max_act_group": MAX_ACT_GROUP, "queries": QUERIES}
    entries |= {"max_head": MAX_HEAD, "keys": KEYS, "max_kinds": MAX_KINDS, "split": SPLIT}
    entries |= {"max_splits": MAX_SPLITS, "tile_rows": TILE_ROWS, "tile_bytes": TILE_BYTES}
    entries |= {f"weight_bits.{dtype}": bits for dtype, bits in WEIGHT_BITS.items()}
    entries |= {f"kv_tile_bytes.{dtype}": KEYS * kv_token_bytes(LANES, dtype) for dtype in KV_TYPE}
    return entries | {f"{name}.signature": _signature(*types) for name, types in FUNCTIONS.items()}


class TypeClass(IntEnum):
    """What a value of a type is; ``type_class`` of ``native/abi.h``."""

    NOTHING = 0
    SIGNED = 1
    UNSIGNED = 2
    FLOAT = 3
    POINTER = 4
    STRUCT = 5


def type_class(kind: Any) -> TypeClass:
    """Of a ctypes type, or of None, a call's result that is nothing."""
    if kind is None:
        return TypeClass.NOTHING
    if issubclass(kind, c.Structure):
        return TypeClass.STRUCT
    if kind in (c.c_void_p, c.c_char_p) or hasattr(kind, "contents"):
        return TypeClass.POINTER
    if kind in (c.c_float, c.c_double):
        return TypeClass.FLOAT
    return TypeClass.SIGNED if kind(-1).value < 0 else TypeClass.UNSIGNED


def _signature(result: Any, arguments: tuple[Any, ...]) -> int:
    """``signature`` of ``native/abi.h``: result and arguments, by class, size and size of what is pointed to."""
    numbers: list[int] = []
    for kind in (result, *arguments):
        pointee = kind._type_ if hasattr(kind, "contents") else c.c_char if kind is c.c_char_p else None
        numbers += [type_class(kind), *(0 if t is None else c.sizeof(t) for t in (kind, pointee))]
    digest = _fnv(b"".join(number.to_bytes(8, "little") for number in numbers))
    return digest - 2**64 if digest >= 2**63 else digest


def abi_digest(entries: Mapping[str, int]) -> int:
    """``abi_digest`` of ``native/abi.h``: names (each with a zero behind it) and values."""
    pairs = (name.encode() + b"\0" + value.to_bytes(8, "little", signed=True) for name, value in entries.items())
    return _fnv(b"".join(pairs))


def _fnv(data: bytes) -> int:
    """64-bit FNV-1a."""
    digest = 0xCBF29CE484222325
    for byte in data:
        digest = (digest ^ byte) * 0x100000001B3 % 2**64
    return digest


def current_digest() -> str:
    """This version's, as an engine's manifest records it: a library built for another version has another."""
    return f"{abi_digest(abi_entries()):016x}"


OTHER_VERSION = "built for another version of llmctl"
_FIX = "rebuild the engine with llmctl build"


def open_library(path: Path) -> c.CDLL:
    """Load a kernel library and check that it agrees with what is declared here.

    Raises:
        EngineLoadError: not loadable on this machine, or built for another version of llmctl (the first entry that
            differs is named).
    """
    try:
        library = c.CDLL(str(path))
    except OSError as error:
        raise EngineLoadError(f"kernel library {path.name}: {error}", fix=_FIX) from error
    difference = _difference(library)
    if difference:
        raise EngineLoadError(f"kernel library {path.name}: {OTHER_VERSION}: {difference}", fix=_FIX)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _difference(library: c.CDLL) -> str | None:
    """The first entry in which a library differs from this version, in words."""
    for name in ("llmctl_abi_digest", "llmctl_abi_entry", *FUNCTIONS):
        if not hasattr(library, name):
            return f"{name}: expected a function, found none"
    expected = abi_entries()
    library.llmctl_abi_digest.restype = c.c_uint64
    digest = library.llmctl_abi_digest()
    if digest == abi_digest(expected):
        return None
    found = dict(_library_entries(library))
    for name in (*expected, *found):
        if expected.get(name) != found.get(name):
            return f"{name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}"
    for ours, theirs in zip(expected, found, strict=True):
        if ours != theirs:
            return f"the order of what is listed: expected {ours}, found {theirs}"
    return f"llmctl_abi_digest: expected {abi_digest(expected):016x}, found {digest:016x}"


def _library_entries(library: c.CDLL) -> Iterator[tuple[str, int]]:
    library.llmctl_abi_entry.restype = c.c_char_p
    library.llmctl_abi_entry.argtypes = (c.c_int64, c.POINTER(c.c_int64))
    value, index = c.c_int64(), 0
    while name := library.llmctl_abi_entry(index, c.byref(value)):
        yield name.decode(), value.value
        index += 1
