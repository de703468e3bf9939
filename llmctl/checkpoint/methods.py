"""Quantization methods of Hugging Face checkpoints: which are read, and what to use in place of the others.

``docs/formats.md`` shows these tables; a test holds it to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.checkpoint import bitsandbytes as bnb
from llmctl.checkpoint import compressed_tensors as ct
from llmctl.checkpoint.fp8 import SCHEME, Fp8Layout
from llmctl.checkpoint.layout import Layout, WordLayout
from llmctl.checkpoint.name_patterns import check_patterns
from llmctl.checkpoint.quant_config import QuantizationInfo, parse_words, read_flag, read_names
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.graph import QuantScheme

Read = tuple[QuantizationInfo, Layout]


@dataclass(frozen=True)
class Method:
    """A method that is read.

    Attributes:
        files: what a checkpoint holds, for users.
        becomes: what an engine holds, for users.
        read: (quantization config, its file) -> settings and layout.
    """

    files: str
    becomes: str
    read: Callable[[Mapping[str, Any], str], Read]


def _words(config: Mapping[str, Any], where: str) -> Read:
    info = parse_words(config, where)
    return info, WordLayout(info)


def _compressed(config: Mapping[str, Any], where: str) -> Read:
    groups = ct.parse_groups(config, where)
    if not groups:
        raise CheckpointError(f"{where}: no config group quantizes weights")
    ignored = read_names(config, ("ignore",), where)
    check_patterns(ignored, f"{where}: ignore")
    info = QuantizationInfo(ct.METHOD, groups[0].scheme, ignored, str(config.get("format", "")))
    return info, ct.CompressedLayout(groups, ignored)


def _fp8(config: Mapping[str, Any], where: str) -> Read:
    fmt = str(config.get("fmt") or "e4m3").lower()
    if fmt not in ("e4m3", "float8_e4m3fn"):
        raise UnsupportedModelError(f"{where}: fp8 weights in {fmt} are not read; known: e4m3")
    block = config.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise CheckpointError(f"{where}: weight_block_size: expected two positive integers, found {block!r}")
    ignored = read_names(config, ("modules_to_not_convert", "ignored_layers"), where)
    info = QuantizationInfo("fp8", SCHEME, ignored, fmt)
    return info, Fp8Layout((block[0], block[1]) if block else None)


def _modelopt(config: Mapping[str, Any], where: str) -> Read:
    algorithm = str(config.get("quant_algo") or "").upper()
    if algorithm == "NVFP4":
        raise refusal("nvfp4", where)
    if algorithm != "FP8":
        raise UnsupportedModelError(f"{where}: ModelOpt's quant_algo '{algorithm}' is not read; known: FP8")
    ignored = read_names(config, ("exclude_modules", "ignore"), where)
    return QuantizationInfo("modelopt", SCHEME, ignored, "FP8"), Fp8Layout(None)


def _bitsandbytes(config: Mapping[str, Any], where: str) -> Read:
    four, eight = (read_flag(config, f"load_in_{bits}bit", False, where) for bits in (4, 8))
    if four == eight:
        found = "both" if four else "neither"
        raise CheckpointError(f"{where}: expected one of load_in_4bit and load_in_8bit to be true, found {found}")
    ignored = read_names(config, ("llm_int8_skip_modules",), where)
    if eight:
        return QuantizationInfo(bnb.METHOD, bnb.INT8_SCHEME, ignored, "int8"), bnb.EightBitLayout()
    book = str(config.get("bnb_4bit_quant_type") or "fp4").lower()  # transformers' default
    if book not in bnb.BOOKS:
        raise UnsupportedModelError(f"{where}: bitsandbytes' '{book}' is not read; known: {', '.join(bnb.BOOKS)}")
    return QuantizationInfo(bnb.METHOD, QuantScheme(4, 64, True, book=book), ignored, book), bnb.FourBitLayout()


METHODS: Mapping[str, Method] = {
    "awq": Method("AutoAWQ's GEMM layout, 4 bits", "the same codes, zeros and scales", _words),
    "gptq": Method("GPTQ versions 1 and 2, act-order, mixed bits", "the same codes, zeros and scales", _words),
    ct.METHOD: Method(
        "pack-quantized w4a16 and w8a16, int-quantized w8a8 (static scales of activations are not used), "
        "float-quantized fp8; by tensor, channel, group or block",
        "the same codes, zeros and scales; a tensor's one scale is written out for its rows",
        _compressed,
    ),
    "fp8": Method(
        "float8_e4m3 weights with 128 x 128 blocks (`weight_scale_inv`), or a scale a channel or tensor",
        "the same 8-bit codes and scales",
        _fp8,
    ),
    "modelopt": Method(
        "ModelOpt's FP8 (`hf_quant_config.json`), a scale a tensor", "the same 8-bit codes and scales", _modelopt
    ),
    bnb.METHOD: Method(
        "NF4 and FP4, doubly quantized or not, in blocks that divide rows; LLM.int8()",
        "the same codes; scales of double quantization as stored, or (cuda) multiplied out",
        _bitsandbytes,
    ),
}
"""By ``quant_method``."""

NOTES: Mapping[tuple[str, int], str] = {
    (bnb.METHOD, 8): "what LLM.int8() does with outlying activations, 16 bits for them alone, is not done: all are "
    "computed alike",
}
"""``quant_method`` and bits -> what an engine does otherwise than its owner; ``build`` and ``inspect`` say it."""

FROM_16 = "quantize the 16-bit checkpoint it was made from: llmctl quantize"
REFUSED: Mapping[str, tuple[str, str]] = {
    "aqlm": ("AQLM's additive code books", FROM_16),
    "bitnet": ("BitNet's ternary weights", "the model's bfloat16 checkpoint"),
    "eetq": ("EETQ's int8 layout", f"{FROM_16} --bits 8 --symmetric"),
    "exl2": ("ExLlamaV2's mixed bits", FROM_16),
    "exl3": ("ExLlamaV3's trellis codes", FROM_16),
    "fbgemm_fp8": ("FBGEMM's fp8 layout", "the model's compressed-tensors FP8 checkpoint, or its 16-bit one"),
    "higgs": ("HIGGS' vector code books", FROM_16),
    "hqq": ("HQQ's float zero points", FROM_16),
    "mlx": ("MLX's layout", f"{FROM_16}, or a GGUF of the model"),
    "mxfp4": ("MXFP4 blocks", "the model's bfloat16 checkpoint"),
    "nvfp4": ("NVFP4 blocks", "the model's FP8 or bfloat16 checkpoint"),
    "quanto": ("quanto's layout", FROM_16),
    "spqr": ("SpQR's outliers", FROM_16),
    "torchao": ("torchao's tensor subclasses", f"{FROM_16}, or its compressed-tensors export"),
    "vptq": ("VPTQ's vector code books", FROM_16),
}
"""``quant_method`` -> what it is, and what to use instead."""


def refusal(method: str, where: str) -> UnsupportedModelError:
    """The error for a method of ``REFUSED``."""
    what, instead = REFUSED[method]
    return UnsupportedModelError(f"{where}: {what} ({method}) are not read", fix=instead)


def read_method(config: Mapping[str, Any], where: str) -> Read:
    """Settings and layout of a ``quantization_config`` (or what stands for it).

    Args:
        where: the file, for error messages.

    Raises:
        UnsupportedModelError: another quantization method or layout.
        CheckpointError: a key that is missing or of the wrong type.
    """
    method = str(config.get("quant_method") or _unnamed(config)).lower()
    if method in REFUSED:
        raise refusal(method, where)
    if method not in METHODS:
        raise UnsupportedModelError(
            f"{where}: quantization method '{method or 'unnamed'}' is not read; known: {', '.join(METHODS)}"
        )
    return METHODS[method].read(config, where)


def _unnamed(config: Mapping[str, Any]) -> str:
    """The method of settings by writers that did not name it yet."""
    if "desc_act" in config:
        return "gptq"
    return bnb.METHOD if "load_in_4bit" in config or "load_in_8bit" in config else ""
