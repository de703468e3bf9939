"""float8_e4m3 weights with scales a tensor, channel or block, and how scales of any of these lie.

``weight`` float8_e4m3 [N, K] with ``weight_scale`` of one number, [N] or [N, 1] (ModelOpt, AutoFP8), or with
``weight_scale_inv`` [ceil(N/128), ceil(K/128)] (DeepSeek's, transformers' FineGrainedFP8; a factor in spite of its
name): ``w = float(code) * scale``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llmctl.checkpoint.awq import widened
from llmctl.checkpoint.layout import Load, Modules, find_modules, total_bytes
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.tensor_info import TensorInfo
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

SCHEME = QuantScheme(8, -1, True, book="fp8_e4m3")
_SCALES = ("weight_scale_inv", "weight_scale")


class Fp8Layout:
    """Block, channel and tensor scales beside float8_e4m3 weights.

    Args:
        block: rows and columns of a block, where the config names them.
    """

    def __init__(self, block: tuple[int, int] | None) -> None:
        self._block = block

    def modules(self, stored: Mapping[str, TensorInfo]) -> Modules:
        """Those with a scale of either name."""
        found: Modules = {}
        for scale in _SCALES:
            found |= find_modules(stored, scale, ("weight", scale))
        return found

    def describe(self, module: str, planes: Mapping[str, TensorInfo], load: Load) -> TensorInfo:  # noqa: ARG002
        """From shapes."""
        weight = planes.get("weight")
        if weight is None or weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
            found = "none" if weight is None else f"{weight.dtype} {list(weight.shape)}"
            raise ValueError(f"weight: expected a matrix of F8_E4M3 beside its scale, found {found}")
        shape, scales = (weight.shape[0], weight.shape[1]), planes[_scale_of(planes)]
        scheme = scale_scheme(SCHEME, shape, scales.shape, self._block)
        return TensorInfo(shape, scales.dtype, scheme, total_bytes(planes))

    def unpack(self, module: str, planes: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:  # noqa: ARG002
        """Codes as they are."""
        import torch

        codes = planes["weight"].view(torch.uint8)
        check_codes(codes)
        scales = spread_scales(widened(planes[_scale_of(planes)]), codes.shape[0], scheme)
        return QuantizedWeight(codes, scales, torch.zeros(scales.shape, dtype=torch.uint8), scheme)


def _scale_of(planes: Mapping[str, object]) -> str:
    return next(suffix for suffix in _SCALES if suffix in planes)


def scale_scheme(
    scheme: QuantScheme, shape: tuple[int, int], scales: tuple[int, ...], block: tuple[int, int] | None = None
) -> QuantScheme:
    """A scheme with the blocks that the shape of a weight's stored scales implies.

    Args:
        scheme: as configured; its group size is what columns of groups have.
        shape: (N, K). scales: one number, [N], [N, G], or a number a block.
        block: rows and columns of a block, where the config names them.

    Raises:
        ValueError: scales that fit nothing.
    """
    rows, columns = shape
    whole_rows = math.prod(scales) == 1 or scales in ((rows,), (rows, 1))
    if whole_rows and scheme.groups(columns) == 1:
        return replace(scheme, group_size=-1)
    if scales == (rows, scheme.groups(columns)):
        return scheme
    tall, wide = block or (128, 128)
    blocks = (-(-rows // tall), -(-columns // wide))
    if scheme.symmetric and scales == blocks:
        return replace(scheme, group_size=wide, block_rows=tall)
    raise ValueError(
        f"scales: expected shape [1], [{rows}, 1], [{rows}, {scheme.groups(columns)}] or, for blocks of "
        f"{tall} x {wide}, {list(blocks)}, found {list(scales)}"
    )


def spread_scales(stored: Tensor, rows: int, scheme: QuantScheme) -> Tensor:
    """Stored scales (or zeros) as [B, G]: that of a whole tensor becomes each row's, so that tensors can be stacked."""
    if scheme.block_rows > 1:
        return stored.contiguous()
    return (stored.reshape(1, 1).expand(rows, 1) if stored.numel() == 1 else stored.reshape(rows, -1)).contiguous()


def check_codes(codes: Tensor) -> None:
    """Refuse NaN, which float8_e4m3 has two codes for.

    Raises:
        ValueError: there is one.
    """
    if bool((codes & 0x7F == 0x7F).any()):
        raise ValueError("weight: NaN among the float8 codes")
