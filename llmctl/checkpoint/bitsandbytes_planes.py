"""Write bitsandbytes' NF4 and FP4: a weight's planes, and the config that names its linears.

What the planes are is said in ``bitsandbytes.py``, which reads them. A ``quant_state`` names float16 as the dtype that
a weight is decoded to; readers cast that to the dtype they compute in.

Double quantization rounds the scales of a whole weight: less their mean, in blocks of 256, to 8 bits of a map whose
steps shrink towards 0 (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2).

Source: bitsandbytes.functional (quantize_4bit, create_dynamic_map, QuantState.as_dict), version 0.50.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmctl.checkpoint.bitsandbytes import ABSMAX, BOOKS, MAP, METHOD, NESTED, NESTED_BLOCK, NESTED_MAP, STATE
from llmctl.checkpoint.nested import MappedFloats, of_tensor, usual_values
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.code_books import CODE_BOOKS
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SMALLEST = 1e-38


def check_packable(shape: tuple[int, int], scheme: QuantScheme) -> None:
    """Refuse a weight [N, K] that the format cannot hold.

    Raises:
        ValueError: another code book, or blocks that bitsandbytes has not or that do not divide a row.
    """
    if scheme.book not in BOOKS or scheme.block_rows != 1 or scheme.act_order:
        raise ValueError(f"bitsandbytes' 4 bits are codes of {' and '.join(BOOKS)}")
    if scheme.group_size not in BLOCKS:
        raise ValueError(f"bitsandbytes' blocks have {', '.join(map(str, BLOCKS))} values, found {scheme.group_size}")
    if shape[1] % scheme.group_size:
        raise ValueError(f"blocks of {scheme.group_size} do not divide the input width {shape[1]}")


def nest_scales(scales: Tensor) -> MappedFloats:
    """Double quantization of float32 scales [N, G], in row-major order; all have one offset."""
    import torch

    flat = scales.reshape(-1).float()
    offset = flat.mean()
    blocks = torch.nn.functional.pad(flat - offset, (0, -len(flat) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(dim=-1).clamp(min=_SMALLEST)
    scaled = (blocks * (1.0 / largest).unsqueeze(-1)).clamp(-1, 1).reshape(-1)
    values = usual_values()
    codes = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2).to(torch.uint8)[: len(flat)]
    return of_tensor(codes.reshape(scales.shape), largest, offset.expand(len(largest)), NESTED_BLOCK, values)


def with_nested_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight that a reader has of what ``pack(double=True)`` writes."""
    return replace(weight, scales=nest_scales(weight.scales).floats())


def plane_specs(weight: QuantizedWeight, *, double: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What ``pack`` makes of a weight [N, K]: suffix -> (safetensors dtype, shape)."""
    (rows, columns), blocks = weight.shape, weight.scales.numel()
    nested = nest_scales(weight.scales) if double else None
    specs: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("U8", (rows * columns // 2, 1)),
        ABSMAX: ("U8" if double else "F32", (blocks,)),
        MAP: ("F32", (16,)),
        STATE + weight.scheme.book: ("U8", (len(_state(weight, nested)),)),
    }
    if double:
        specs |= {NESTED: ("F32", (-(-blocks // NESTED_BLOCK),)), NESTED_MAP: ("F32", (256,))}
    return specs


def pack(weight: QuantizedWeight, *, double: bool = False) -> dict[str, Tensor]:
    """The tensors of one module, by suffix.

    Args:
        double: round the scales; else they are stored as they are.

    Raises:
        ValueError: as ``check_packable``.
    """
    import torch

    check_packable(weight.shape, weight.scheme)
    codes = weight.codes.reshape(-1, 2)
    planes = {"weight": (codes[:, :1] << 4 | codes[:, 1:]).contiguous(), **small_planes(weight, double=double)}
    nested = nest_scales(weight.scales) if double else None
    if nested is not None:
        planes[ABSMAX] = nested.codes.reshape(-1)
    planes[STATE + weight.scheme.book] = torch.tensor(list(_state(weight, nested)), dtype=torch.uint8)
    return planes


def small_planes(weight: QuantizedWeight, *, double: bool = False) -> dict[str, Tensor]:
    """Those of float32."""
    import torch

    book = {MAP: torch.tensor(CODE_BOOKS[weight.scheme.book].values)}
    if double:
        nested = nest_scales(weight.scales)
        return {**book, NESTED: nested.supers, NESTED_MAP: nested.values}
    return {**book, ABSMAX: weight.scales.reshape(-1).float()}


def _state(weight: QuantizedWeight, nested: MappedFloats | None) -> bytes:
    state: dict[str, Any] = {
        "quant_type": weight.scheme.book,
        "blocksize": weight.scheme.group_size,
        "dtype": "float16",
        "shape": list(weight.shape),
    }
    if nested is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(nested.offsets[0])
    return json.dumps(state).encode()


def config(scheme: QuantScheme, ignored: tuple[str, ...], dtype: str, *, double: bool = False) -> dict[str, Any]:
    """``quantization_config``.

    Args:
        dtype: that readers are to compute in.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": scheme.book,
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(ignored) or None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": METHOD,
    }
