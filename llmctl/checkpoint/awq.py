"""AutoAWQ's GEMM layout (version "gemm", 4 bits).

With K = in, N = out, G = K / group_size: ``qweight`` int32 [K, N/8], ``qzeros`` int32 [G, N/8], ``scales``
float16 [G, N]. Nibble i of word c holds column ``8*c + ORDER[i]``. Zero points are stored as they are:
``w = (code - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmctl.checkpoint.bits import pack_words, unpack_words
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)
SUFFIXES = ("qweight", "qzeros", "scales")
BITS = 4


def check_packable(shape: tuple[int, int], scheme: QuantScheme) -> None:
    """Refuse a weight [N, K] that the layout cannot hold.

    Raises:
        ValueError: bits other than 4, act-order, N not a multiple of 8, a group size that does not divide K, or codes
            that are not integers with integer zeros.
    """
    rows, columns = shape
    check_integers(scheme)
    if scheme.bits != BITS:
        raise ValueError(f"AutoAWQ's layout has 4 bits only, found {scheme.bits}; write it in GPTQ's layout")
    if scheme.act_order:
        raise ValueError("AutoAWQ's layout has no g_idx; act-order weights go in GPTQ's layout")
    if rows % 8:
        raise ValueError(f"AutoAWQ's layout needs an output width that is a multiple of 8, found {rows}")
    if scheme.group_size != -1 and columns % scheme.group_size:
        raise ValueError(f"group size {scheme.group_size} does not divide the input width {columns}")


def check_integers(scheme: QuantScheme) -> None:
    """Refuse what AWQ's and GPTQ's planes cannot say.

    Raises:
        ValueError: a code book, minimums, or a scale for several rows.
    """
    if scheme.book or scheme.minimum or scheme.block_rows > 1:
        found = scheme.book or ("minimums" if scheme.minimum else f"blocks of {scheme.block_rows} rows")
        raise ValueError(f"AWQ's and GPTQ's layouts have integers with integer zeros only, found {found}")


def plane_specs(shape: tuple[int, int], scheme: QuantScheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What ``pack`` makes of a weight [N, K]: suffix -> (safetensors dtype, shape)."""
    rows, columns = shape
    groups = scheme.groups(columns)
    return {
        "qweight": ("I32", (columns, rows // 8)),
        "qzeros": ("I32", (groups, rows // 8)),
        "scales": ("F16", (groups, rows)),
    }


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one module, by suffix: ``qweight``, ``qzeros``, ``scales``.

    Raises:
        ValueError: as ``check_packable``; or a scale that is not finite in float16.
    """
    check_packable(weight.shape, weight.scheme)
    return {
        "qweight": _pack_columns(weight.codes.T),
        "qzeros": _pack_columns(weight.zeros.T),
        "scales": half_scales(weight.scales),
    }


def unpack(tensors: Mapping[str, Tensor], group_size: int, *, symmetric: bool = False) -> QuantizedWeight:
    """The weight held by ``qweight``, ``qzeros`` and ``scales``.

    Raises:
        ValueError: shapes that contradict one another, or "symmetric" with zero points other than 8.
    """
    qweight, qzeros, scales = (tensors[suffix] for suffix in SUFFIXES)
    zeros = _unpack_columns(qzeros).T.contiguous()
    if symmetric and bool((zeros != 1 << (BITS - 1)).any()):
        raise ValueError("zero_point is false, but the zero points are not all 8")
    return QuantizedWeight(
        codes=_unpack_columns(qweight).T.contiguous(),
        scales=read_scales(scales),
        zeros=zeros,
        scheme=QuantScheme(BITS, group_size, symmetric),
    )


def half_scales(scales: Tensor) -> Tensor:
    """Scales [N, G] as stored: float16 [G, N].

    Raises:
        ValueError: not finite in float16.
    """
    stored = scales.T.half().contiguous()
    if not bool(stored.isfinite().all()):
        raise ValueError("scales: not finite in float16")
    return stored


def read_scales(stored: Tensor) -> Tensor:
    """Stored scales [G, N] as [N, G], widened."""
    return widened(stored.T.contiguous())


def widened(scales: Tensor) -> Tensor:
    """float16 stays, anything else becomes float32."""
    import torch

    return scales if scales.dtype == torch.float16 else scales.float()


def _pack_columns(matrix: Tensor) -> Tensor:
    lanes = matrix.unflatten(-1, (-1, 8))[..., list(ORDER)]
    return pack_words(lanes.flatten(-2), BITS)


def _unpack_columns(words: Tensor) -> Tensor:
    lanes = unpack_words(words, BITS).unflatten(-1, (-1, 8))[..., list(INVERSE)]
    return lanes.flatten(-2)
