"""GPTQ's layout, versions 1 and 2, at 2, 3, 4 and 8 bits.

With K = in, N = out, G groups: ``qweight`` int32 [K*bits/32, N] packed along K, ``qzeros`` int32 [G, N*bits/32] packed
along N, ``scales`` float16 [G, N], ``g_idx`` int32 [K]; packing as ``bits.py``. Version 1 (``gptq``) stores zero - 1,
version 2 (``gptq_v2``) the zero itself. The format tag lies in some published checkpoints, so a symmetric weight's
version is read off its data: every stored zero is 2**(bits-1) - 1 in version 1 and 2**(bits-1) in version 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmctl.checkpoint.awq import check_integers, half_scales, read_scales
from llmctl.checkpoint.bits import pack_words, unpack_words, values_per_period
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = ("gptq", "gptq_v2")


def check_packable(shape: tuple[int, int], scheme: QuantScheme) -> None:
    """Refuse a weight [N, K] that the layout cannot hold.

    Raises:
        ValueError: N or K is not a whole number of packing periods (8 at 4 bits, 32 at 3 bits, 4 at 8 bits), or codes
            that are not integers with integer zeros.
    """
    check_integers(scheme)
    period = values_per_period(scheme.bits)
    for what, width in zip(("output", "input"), shape, strict=True):
        if width % period:
            raise ValueError(
                f"GPTQ's {scheme.bits}-bit layout needs an {what} width that is a multiple of {period}, found {width}"
            )


def plane_specs(shape: tuple[int, int], scheme: QuantScheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What ``pack`` makes of a weight [N, K]: suffix -> (safetensors dtype, shape)."""
    rows, columns = shape
    groups, bits = scheme.groups(columns), scheme.bits
    return {
        "qweight": ("I32", (columns * bits // 32, rows)),
        "qzeros": ("I32", (groups, rows * bits // 32)),
        "scales": ("F16", (groups, rows)),
        "g_idx": ("I32", (columns,)),
    }


def pack(weight: QuantizedWeight, checkpoint_format: str = "gptq") -> dict[str, Tensor]:
    """The tensors of one module, by suffix: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

    Raises:
        ValueError: as ``check_packable``; a zero point of 0 in version 1, which would have to store -1; scales that
            are not finite in float16; an unknown ``checkpoint_format``.
    """
    import torch

    _check_format(checkpoint_format)
    check_packable(weight.shape, weight.scheme)
    zeros = weight.zeros.T
    if checkpoint_format == "gptq":
        if bool((zeros == 0).any()):
            raise ValueError("GPTQ version 1 stores zero - 1 and cannot hold a zero point of 0; use gptq_v2")
        zeros = zeros - 1
    return {
        "qweight": pack_words(weight.codes, weight.scheme.bits).T.contiguous(),
        "qzeros": pack_words(zeros.contiguous(), weight.scheme.bits),
        "scales": half_scales(weight.scales),
        "g_idx": weight.group_index().to(torch.int32),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: QuantScheme, checkpoint_format: str = "gptq") -> QuantizedWeight:
    """The weight held by ``qweight``, ``qzeros``, ``scales`` and, if present, ``g_idx``.

    Args:
        scheme: bits, group size and symmetry as configured; ``act_order`` is read off ``g_idx``.
        checkpoint_format: "gptq" or "gptq_v2"; believed for asymmetric weights only.

    Raises:
        ValueError: shapes that contradict one another, a g_idx out of range, or "symmetric" with varying zero points.
    """
    _check_format(checkpoint_format)
    codes = unpack_words(tensors["qweight"].T, scheme.bits)
    g_idx = effective_g_idx(tensors.get("g_idx"), codes.shape[1], scheme)
    return QuantizedWeight(
        codes=codes,
        scales=read_scales(tensors["scales"]),
        zeros=_read_zeros(tensors["qzeros"], scheme, checkpoint_format).T.contiguous(),
        scheme=QuantScheme(scheme.bits, scheme.group_size, scheme.symmetric, act_order=g_idx is not None),
        g_idx=g_idx,
    )


def effective_g_idx(g_idx: Tensor | None, columns: int, scheme: QuantScheme) -> Tensor | None:
    """``g_idx`` int32 [K], or None where it only says ``k // group_size`` (or is absent or empty).

    Raises:
        ValueError: wrong length or a group out of range.
    """
    import torch

    if g_idx is None or g_idx.numel() == 0:
        return None
    if tuple(g_idx.shape) != (columns,):
        raise ValueError(f"g_idx: expected {columns} entries, found shape {tuple(g_idx.shape)}")
    groups = scheme.groups(columns)
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(f"g_idx: groups are 0 to {groups - 1}, found {int(g_idx.min())} to {int(g_idx.max())}")
    size = columns if scheme.group_size == -1 else scheme.group_size
    if torch.equal(g_idx.long(), torch.arange(columns) // size):
        return None
    return g_idx.to(torch.int32)


def _read_zeros(qzeros: Tensor, scheme: QuantScheme, checkpoint_format: str) -> Tensor:
    stored = unpack_words(qzeros, scheme.bits)
    middle = 1 << (scheme.bits - 1)
    if scheme.symmetric:
        if bool((stored == middle - 1).all()):
            return stored + 1
        if bool((stored == middle).all()):
            return stored
        raise ValueError(f"sym is true, but the stored zero points are not all {middle - 1} (v1) or all {middle} (v2)")
    # A version 1 writer stores a zero point of 0 as -1, that is 2**bits - 1: wrap, as ExLlama's kernels do.
    return stored if checkpoint_format == "gptq_v2" else (stored + 1) & ((1 << scheme.bits) - 1)


def _check_format(checkpoint_format: str) -> None:
    if checkpoint_format not in FORMATS:
        raise ValueError(f"checkpoint_format: expected one of {FORMATS}, found '{checkpoint_format}'")
