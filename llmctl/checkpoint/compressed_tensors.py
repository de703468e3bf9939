"""The compressed-tensors format: pack-quantized, int-quantized and float-quantized weights.

With N = out, K = in. Packed: ``weight_packed`` int32 [N, ceil(K*bits/32)] along K as ``bits.py``, ``weight_shape``
int64 [2], and asymmetric ``weight_zero_point`` int32 [ceil(N*bits/32), G] along N. Unpacked: ``weight`` int8 or
float8_e4m3 [N, K], and asymmetric ``weight_zero_point`` int8 [N, G]. Both with ``weight_scale`` and, with act-order,
``weight_g_idx`` int32 [K]. Codes and zero points are signed; packed ones are stored + 2**(bits-1).
``w = (code - zero) * scale``.

Source: compressed_tensors.compressors (pack_quantized, naive_quantized) and utils.match, version 0.20.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmctl.checkpoint.awq import widened
from llmctl.checkpoint.bits import unpack_words
from llmctl.checkpoint.fp8 import check_codes, scale_scheme, spread_scales
from llmctl.checkpoint.gptq import effective_g_idx
from llmctl.checkpoint.layout import Load, Modules, find_modules, total_bytes
from llmctl.checkpoint.name_patterns import NameMatcher, check_patterns
from llmctl.checkpoint.quant_config import read_flag
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.tensor_info import TensorInfo
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_BITS = {"int": (4, 8), "float": (8,)}
_PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_PLAIN = ("weight", "weight_scale", "weight_zero_point", "weight_g_idx")


@dataclass(frozen=True)
class Group:
    """One config group: the modules that it is for, and how their weights are quantized.

    ``block``: rows and columns of a block, where scales are by block.
    """

    targets: tuple[str, ...]
    scheme: QuantScheme
    block: tuple[int, int] | None


def parse_groups(config: Mapping[str, Any], where: str) -> tuple[Group, ...]:
    """The config groups that have weights.

    Raises:
        UnsupportedModelError: a format or weights that are not read.
        CheckpointError: a key that is missing or of the wrong type; a pattern that is no regular expression.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}: expected an object config_groups")
    found = []
    for name, group in groups.items():
        here = f"{where}: config_groups.{name}"
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            raise CheckpointError(f"{here}: expected an object with a list targets")
        layout = str(group.get("format") or config.get("format") or "")
        if layout not in (*FORMATS, "dense", "mixed-precision", ""):
            raise UnsupportedModelError(
                f"{here}: format '{layout}' is not read; known: {', '.join(FORMATS)}",
                fix="quantize the 16-bit checkpoint to one of these (llmctl quantize, or llm-compressor's W4A16)",
            )
        if isinstance(group.get("weights"), dict):
            targets = tuple(str(target) for target in group["targets"])
            check_patterns(targets, here)
            found.append(Group(targets, _weight_scheme(group["weights"], here), _block(group["weights"], here)))
    return tuple(found)


def _weight_scheme(weights: Mapping[str, Any], where: str) -> QuantScheme:
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    strategy = str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"))
    known = strategy in ("tensor", "channel", "group", "block")
    if not known or type(bits) is not int or bits not in _BITS.get(str(kind), ()):
        raise UnsupportedModelError(
            f"{where}: weights of type {kind} with {bits} bits by {strategy} are not read; known: int with 4 or 8 bits "
            "and float with 8 bits, by tensor, channel, group or block"
        )
    size, ordered = weights.get("group_size"), _orders_columns(weights.get("actorder"), where)
    if strategy == "group" and not (type(size) is int and size > 0):
        raise CheckpointError(f"{where}: group_size: expected a positive integer, found {size!r}")
    symmetric = read_flag(weights, "symmetric", True, where)
    columns = size if strategy == "group" and type(size) is int else -1
    if kind == "float":
        if not symmetric:
            raise UnsupportedModelError(f"{where}: asymmetric float weights are not read")
        return QuantScheme(8, columns, True, ordered, book="fp8_e4m3")
    return QuantScheme(bits, columns, symmetric, ordered)


def _orders_columns(order: Any, where: str) -> bool:
    """Whether ``actorder`` lets any column belong to any group; quantizing in another order ("weight") does not."""
    known = {"group": True, "dynamic": True, "weight": False, "static": False}
    if order is None or isinstance(order, bool):
        return bool(order)
    if str(order).lower() not in known:
        raise CheckpointError(f"{where}: actorder: expected {' or '.join(known)}, found {reprlib.repr(order)}")
    return known[str(order).lower()]


def _block(weights: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    block = weights.get("block_structure")
    if weights.get("strategy") != "block":
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise CheckpointError(f"{where}: block_structure: expected two positive integers, found {block!r}")
    return block[0], block[1]


class CompressedLayout:
    """The format's planes; which group a module belongs to is found by the config's targets."""

    def __init__(self, groups: tuple[Group, ...], ignored: tuple[str, ...]) -> None:
        self._groups = groups
        self._ignored = ignored
        self._matcher = NameMatcher()

    def modules(self, stored: Mapping[str, TensorInfo]) -> Modules:
        """Those with a ``weight_scale``."""
        found = find_modules(stored, "weight_scale", _PACKED)
        plain = find_modules(stored, "weight_scale", _PLAIN)
        return {m: suffixes if "weight_packed" in suffixes else plain[m] for m, suffixes in found.items()}

    def describe(self, module: str, planes: Mapping[str, TensorInfo], load: Load) -> TensorInfo:
        """From shapes, the config, ``weight_shape`` and ``weight_g_idx``."""
        group = self._configured((module, planes["weight_scale"].stored.removesuffix(".weight_scale")))
        scheme = group.scheme
        shape = _packed_shape(planes, load, scheme.bits) if "weight_packed" in planes else _plain_shape(planes, scheme)
        scales = planes["weight_scale"]
        scheme = scale_scheme(scheme, shape, scales.shape, group.block)
        if ("weight_zero_point" not in planes) and not scheme.symmetric:
            raise ValueError("the config says asymmetric, but there is no weight_zero_point")
        if "weight_zero_point" in planes and not scheme.book:
            _check_zeros(planes["weight_zero_point"], scales, shape, scheme)
        if scheme.act_order and scheme.groups(shape[1]) > 1 and "weight_g_idx" not in planes:
            raise ValueError("the config says actorder group, but there is no weight_g_idx")
        index = load("weight_g_idx") if "weight_g_idx" in planes else None
        ordered = effective_g_idx(None if index is None else index.int(), shape[1], scheme) is not None
        return TensorInfo(shape, scales.dtype, replace(scheme, act_order=ordered), total_bytes(planes))

    def unpack(self, module: str, planes: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:  # noqa: ARG002
        """Codes and zero points made unsigned, scales spread over rows."""
        import torch

        packed = planes.get("weight_packed")
        if packed is not None:
            columns = int(planes["weight_shape"][1])
            codes = unpack_words(packed, scheme.bits)[:, :columns].contiguous()
        elif scheme.book:
            codes = planes["weight"].view(torch.uint8)
            check_codes(codes)
        else:
            codes = _unsigned(planes["weight"], scheme.bits)
        scales = spread_scales(widened(planes["weight_scale"]), codes.shape[0], scheme)
        index = planes.get("weight_g_idx")
        return QuantizedWeight(
            codes,
            scales,
            _zeros(planes.get("weight_zero_point"), scales, scheme),
            scheme,
            index.to(torch.int32) if scheme.act_order and index is not None else None,
        )

    def _configured(self, names: tuple[str, ...]) -> Group:
        """``names``: the module's in the full causal model, and its own in the file; a config may have either."""
        if any(self._matcher.matches(names, entry) for entry in self._ignored):
            raise ValueError("has a weight_scale, though the config's ignore list names it")
        for group in self._groups:
            if any(target == "Linear" or self._matcher.matches(names, target) for target in group.targets):
                return group
        raise ValueError("has a weight_scale, but no config group's targets name it")


def _packed_shape(planes: Mapping[str, TensorInfo], load: Load, bits: int) -> tuple[int, int]:
    if "weight_shape" not in planes or planes["weight_shape"].shape != (2,):
        raise ValueError("weight_packed needs a weight_shape of two integers")
    rows, columns = (int(n) for n in load("weight_shape"))
    expected, found = (rows, -(-columns * bits // 32)), planes["weight_packed"].shape
    if found != expected:
        raise ValueError(f"weight_packed: expected shape {list(expected)}, found {list(found)}")
    return rows, columns


def _plain_shape(planes: Mapping[str, TensorInfo], scheme: QuantScheme) -> tuple[int, int]:
    weight, dtype = planes.get("weight"), "F8_E4M3" if scheme.book else "I8"
    if weight is None or len(weight.shape) != 2 or weight.dtype != dtype:
        found = "none" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"weight: expected a matrix of {dtype} or a weight_packed, found {found}")
    return weight.shape[0], weight.shape[1]


def _check_zeros(zeros: TensorInfo, scales: TensorInfo, shape: tuple[int, int], scheme: QuantScheme) -> None:
    packed = (-(-shape[0] * scheme.bits // 32), scheme.groups(shape[1]))
    fits = zeros.shape == packed if zeros.dtype == "I32" else math.prod(zeros.shape) == math.prod(scales.shape)
    if zeros.dtype not in ("I8", "I32") or not fits:
        raise ValueError(
            f"weight_zero_point: expected I32 {list(packed)} or I8 {list(scales.shape)}, "
            f"found {zeros.dtype} {list(zeros.shape)}"
        )


def _unsigned(signed: Tensor, bits: int) -> Tensor:
    """Signed integers of up to 8 bits as codes from 0 on.

    Raises:
        ValueError: one that needs more bits.
    """
    import torch

    codes = signed.to(torch.int16) + (1 << (bits - 1))
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise ValueError(f"an integer does not fit {bits} bits")
    return codes.to(torch.uint8)


def _zeros(stored: Tensor | None, scales: Tensor, scheme: QuantScheme) -> Tensor:
    """Zero points uint8 [B, G]."""
    import torch

    middle = 0 if scheme.book else 1 << (scheme.bits - 1)
    if stored is None or scheme.book:
        return torch.full(scales.shape, middle, dtype=torch.uint8)
    rows = scales.shape[0]
    if stored.dtype == torch.int32:
        zeros = unpack_words(stored.T.contiguous(), scheme.bits)[:, :rows].T.contiguous()
    else:
        zeros = spread_scales(_unsigned(stored, scheme.bits), rows, scheme)
    if scheme.symmetric and bool((zeros != middle).any()):
        raise ValueError("the config says symmetric, but the stored zero points are not all 0")
    return zeros
