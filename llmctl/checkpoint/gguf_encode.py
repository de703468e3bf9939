"""Codes as ggml's blocks of 32 columns: Q4_0, Q4_1 and Q8_0. A weight whose groups are larger repeats their scales.

``gguf_blocks.py`` says what the blocks are, and reads them.

Source: ggml-common.h (block_q4_0, block_q4_1, block_q8_0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
PLANE = "blocks"


def block_type(scheme: QuantScheme) -> str:
    """ggml's name of the type for weights of a scheme.

    Raises:
        ValueError: there is none that holds them as they are.
    """
    if scheme.book:
        raise ValueError(f"GGUF is written for integers, not for {scheme.book}")
    if scheme.act_order:
        raise ValueError("GGUF has no act-order groups")
    if scheme.group_size != -1 and scheme.group_size % COLUMNS:
        raise ValueError(f"GGUF's blocks are of {COLUMNS} columns, found groups of {scheme.group_size}")
    if scheme.symmetric:
        return "Q4_0" if scheme.bits <= 4 else "Q8_0"
    if scheme.bits > 4:
        raise ValueError("GGUF has no type for asymmetric weights of 8 bits")
    return "Q4_1"


def check_packable(shape: tuple[int, int], scheme: QuantScheme) -> None:
    """Refuse a weight [N, K] that no type holds.

    Raises:
        ValueError: as ``block_type``; or K is not a multiple of 32, or of the group size.
    """
    block_type(scheme)
    if shape[1] % COLUMNS:
        raise ValueError(f"GGUF's blocks are of {COLUMNS} columns, found an input width of {shape[1]}")
    if scheme.group_size != -1 and shape[1] % scheme.group_size:
        raise ValueError(f"group size {scheme.group_size} does not divide the input width {shape[1]}")


def plane_specs(weight: QuantizedWeight) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What ``pack`` makes of a weight [N, K]."""
    rows, columns = weight.shape
    return {PLANE: ("U8", (rows, columns // COLUMNS * BLOCK_BYTES[block_type(weight.scheme)]))}


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The blocks of a weight [N, K], u8 [N, bytes of a row]. Scales and minimums are rounded to float16.

    Raises:
        ValueError: as ``check_packable``; scales or minimums that are not finite in float16.
    """
    import torch

    check_packable(weight.shape, weight.scheme)
    weight, kind = weight.by_row(), block_type(weight.scheme)
    rows = weight.shape[0]
    codes = weight.codes.reshape(rows, -1, COLUMNS)
    group = weight.group_index()[::COLUMNS]
    floats = [weight.scales[:, group]]
    if kind == "Q4_1":
        floats.append(minimums(weight)[:, group])
    else:  # the zero of a narrower code is not the type's own
        codes = codes + ((8 if kind == "Q4_0" else 128) - (1 << (weight.scheme.bits - 1)))
    if kind == "Q8_0":
        codes = codes ^ 128
    else:
        codes = codes[..., :16] | codes[..., 16:] << 4
    halves = torch.stack(floats, dim=-1).half()
    if not bool(halves.isfinite().all()):
        raise ValueError("scales or minimums: not finite in float16")
    return {PLANE: torch.cat([halves.view(torch.uint8), codes], dim=-1).reshape(rows, -1).contiguous()}


def minimums(weight: QuantizedWeight) -> Tensor:
    """What code 0 stands for, float32 [B, G]."""
    if weight.minimums is not None:
        return weight.minimums.float()
    return -weight.zeros.float() * weight.scales.float()
