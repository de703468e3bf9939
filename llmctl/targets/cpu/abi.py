"""The structs of ``native/program.h`` in ctypes, and the library's entry points."""

from __future__ import annotations

import ctypes as c
from enum import IntEnum
from pathlib import Path

from llmctl.errors import EngineLoadError


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


ACT = {"": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
KV_TYPE = {"f32": 0, "bf16": 1, "s8": 2}
DTYPE = {"f32": 0, "bf16": 1, "f16": 2, "w4": 3, "w8": 4}


class Matrix(c.Structure):
    """``struct Matrix``: fp32 rows of ``ld`` elements."""

    _fields_ = (("data", c.c_void_p), ("ld", c.c_int64))


class Acts(c.Structure):
    """``struct IntActs``: int8 codes with a scale and a negated sum a group."""

    _fields_ = (
        *((name, c.c_void_p) for name in ("codes", "scales", "negated_sums")),
        *((name, c.c_int64) for name in ("k", "group")),
    )


class OpDesc(c.Structure):
    """``struct OpDesc``."""

    _fields_ = (
        *((name, c.c_int32) for name in ("kind", "act", "weight_dtype", "neox")),
        *((name, c.c_int32) for name in ("writes_kv", "on_rows")),
        ("layer", c.c_int64),
        *((name, Matrix) for name in ("x", "x2", "x3", "y", "y2")),
        *((name, Acts) for name in ("x8", "y8")),
        *((name, c.c_int64) for name in ("width", "n", "n_padded", "k", "group")),
        *((name, c.c_void_p) for name in ("w", "w_scales", "w_zeros", "bias")),
        *((name, c.c_void_p) for name in ("permutation", "x16")),
        *((name, c.c_int64) for name in ("heads", "kv_heads", "head_dim", "rotary_dim", "window")),
        *((name, c.c_void_p) for name in ("cos", "sin")),
        *((name, c.c_float) for name in ("eps", "offset", "scale", "softcap")),
    )


class KvDesc(c.Structure):
    """``struct KvDesc``."""

    _fields_ = (
        ("base", c.c_void_p),
        *((name, c.c_int64) for name in ("kv_heads", "head_dim", "padded_dim")),
        ("type", c.c_int32),
    )


class StepDesc(c.Structure):
    """``struct StepDesc``."""

    _fields_ = (
        *((name, c.c_int64) for name in ("tokens", "seqs", "rows")),
        *((name, c.c_void_p) for name in ("token_ids", "positions", "slots", "query_start", "block_tables")),
        ("max_blocks", c.c_int64),
        *((name, c.c_void_p) for name in ("logits_rows", "targets", "target_logprobs")),
    )


class SamplingDesc(c.Structure):
    """``struct SamplingDesc``."""

    _fields_ = (
        ("rows", c.c_int64),
        *((name, c.c_void_p) for name in ("temperature", "seeds", "positions", "top_k", "top_p", "min_p")),
        *((name, c.c_void_p) for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")),
        *((name, c.c_void_p) for name in ("prompt_ids", "prompt_offsets", "output_ids", "output_offsets")),
        *((name, c.c_void_p) for name in ("bias_ids", "bias_values", "bias_offsets", "allowed_mask", "num_logprobs")),
        ("max_logprobs", c.c_int64),
        *((name, c.c_void_p) for name in ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")),
    )


def open_library(path: Path) -> c.CDLL:
    """Load a kernel library and check that its structs are the ones declared here.

    Raises:
        EngineLoadError: not loadable on this machine, or built from another version of the structs.
    """
    try:
        library = c.CDLL(str(path))
        sizes = (c.c_int64 * 4)()
        library.llmctl_abi(sizes)
    except (OSError, AttributeError) as error:
        raise EngineLoadError(
            f"kernel library {path.name}: {error}", fix="rebuild the engine with llmctl build"
        ) from error
    expected = [c.sizeof(struct) for struct in (OpDesc, KvDesc, StepDesc, SamplingDesc)]
    if list(sizes) != expected:
        raise EngineLoadError(
            f"kernel library {path.name}: built for another version (struct sizes {list(sizes)}, expected {expected})",
            fix="rebuild the engine with llmctl build",
        )
    library.llmctl_create.restype = c.c_void_p
    library.llmctl_create.argtypes = (
        c.POINTER(OpDesc),
        c.c_int64,
        c.POINTER(KvDesc),
        *[c.c_int64] * 6,
        c.c_int,
    )
    library.llmctl_destroy.argtypes = (c.c_void_p,)
    library.llmctl_step.argtypes = (c.c_void_p, c.POINTER(StepDesc), c.POINTER(SamplingDesc))
    library.llmctl_step.restype = c.c_int
    library.llmctl_profile.argtypes = (c.c_void_p, c.POINTER(c.c_double))
    library.llmctl_variant.restype = c.c_char_p
    return library
