"""Element types: one row each, with every spelling that a file format, a library or a kernel has for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        name: what options and configs call it. nbytes: of an element.
        safetensors: its code there. torch: torch's attribute. numpy: what it is mapped as, which has no bfloat16.
        tag: what kernels call it, in entry points and signatures; "" when none reads it.
    """

    name: str
    nbytes: int
    safetensors: str
    torch: str
    numpy: str
    tag: str = ""


_ROWS = (
    DType("bool", 1, "BOOL", "bool", "bool"),
    DType("uint8", 1, "U8", "uint8", "uint8", "u8"),
    DType("int8", 1, "I8", "int8", "int8", "s8"),
    DType("fp8_e5m2", 1, "F8_E5M2", "float8_e5m2", "uint8"),
    DType("fp8_e4m3", 1, "F8_E4M3", "float8_e4m3fn", "uint8", "e4m3"),
    DType("int16", 2, "I16", "int16", "int16"),
    DType("uint16", 2, "U16", "uint16", "uint16"),
    DType("float16", 2, "F16", "float16", "float16", "f16"),
    DType("bfloat16", 2, "BF16", "bfloat16", "uint16", "bf16"),
    DType("int32", 4, "I32", "int32", "int32", "i32"),
    DType("uint32", 4, "U32", "uint32", "uint32", "u32"),
    DType("float32", 4, "F32", "float32", "float32", "f32"),
    DType("float64", 8, "F64", "float64", "float64"),
    DType("int64", 8, "I64", "int64", "int64", "i64"),
    DType("uint64", 8, "U64", "uint64", "uint64", "u64"),
)

DTYPES = {row.name: row for row in _ROWS}
"""By name, in the order in which safetensors ranks them: narrowest first."""
BY_SAFETENSORS = {row.safetensors: row for row in _ROWS}
BY_TORCH = {row.torch: row for row in _ROWS}
BY_TAG = {row.tag: row for row in _ROWS if row.tag}

HALF_DTYPES = ("float16", "bfloat16")
COMPUTE_DTYPES = ("float32", *HALF_DTYPES)
"""What a model may compute in."""
FLOAT_DTYPES = (*COMPUTE_DTYPES, "float64")
"""What a dense weight may be stored in."""
KV_DTYPES = (*COMPUTE_DTYPES, "int8", "fp8_e4m3")
"""What a KV cache may be made of."""
KV_SPELLINGS = {**{name: name for name in KV_DTYPES}, "fp8": "fp8_e4m3"}
"""A KV cache's dtype by every name that options have for it."""
KV_NAMES = (*(name for name in KV_DTYPES if name != "fp8_e4m3"), "fp8")
"""The shortest name of each."""


def kv_name(dtype: str) -> str:
    """The shortest name that options have for a KV cache's dtype."""
    return KV_NAMES[KV_DTYPES.index(dtype)]
