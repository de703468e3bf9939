"""Write the compressed-tensors format: a weight's planes, and the config that says which module has what.

What the planes are is said in ``compressed_tensors.py``, which reads them. Scales keep their values: they are stored in
the first of float16, bfloat16 and float32 that holds all of a weight's.

Source: compressed_tensors.compressors (pack_quantized, naive_quantized) and quantization.quant_config, version 0.20,
which has no act-order groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmctl.checkpoint.bits import pack_words, values_per_period
from llmctl.checkpoint.compressed_tensors import METHOD
from llmctl.checkpoint.exact import exact_dtype
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

_BOOK = "fp8_e4m3"
_BITS = (4, 8)


def check_packable(shape: tuple[int, int], scheme: QuantScheme) -> None:
    """Refuse a weight [N, K] that the format cannot hold.

    Raises:
        ValueError: minimums, a code book other than float8's, bits other than 4 and 8, act-order, blocks of integers,
            groups of float8, or a group size that does not divide K.
    """
    if scheme.minimum:
        raise ValueError("compressed-tensors has integer zeros, no minimums")
    if scheme.book not in ("", _BOOK):
        raise ValueError(f"compressed-tensors has no {scheme.book} weights")
    if scheme.bits not in _BITS:
        raise ValueError(f"compressed-tensors is read at 4 and 8 bits, found {scheme.bits}")
    if scheme.act_order:  # read here, and by versions before 0.20, which refuses the config
        raise ValueError("compressed-tensors has no act-order groups any more; write them in GPTQ's layout")
    if scheme.block_rows > 1 and not scheme.book:
        raise ValueError("compressed-tensors' blocks are of float8 weights")
    if scheme.book and scheme.block_rows == 1 and scheme.groups(shape[1]) > 1:
        raise ValueError(f"float8 weights have a scale a row or a block, found groups of {scheme.group_size}")
    if scheme.block_rows == 1 and scheme.group_size != -1 and shape[1] % scheme.group_size:
        raise ValueError(f"group size {scheme.group_size} does not divide the input width {shape[1]}")


def check_int8(shape: tuple[int, int], scheme: QuantScheme) -> None:
    """Refuse a weight [N, K] that cannot be multiplied with int8 activations.

    Raises:
        ValueError: as said.
    """
    check_packable(shape, scheme)
    whole_rows = scheme.groups(shape[1]) == 1
    if scheme.bits != 8 or scheme.book or not scheme.symmetric or not whole_rows:
        raise ValueError("W8A8 has 8 bits, symmetric, one scale a row; write it as compressed-tensors")


def plane_specs(weight: QuantizedWeight, *, plain: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What ``pack`` makes of a weight [N, K]: suffix -> (safetensors dtype, shape)."""
    (rows, columns), scheme = weight.shape, weight.scheme
    scales = {"weight_scale": (DTYPES[exact_dtype(weight.scales)].safetensors, tuple(weight.scales.shape))}
    if scheme.book or plain:
        return {"weight": ("F8_E4M3" if scheme.book else "I8", (rows, columns)), **scales}
    specs: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("I32", (rows, -(-columns * scheme.bits // 32))),
        "weight_shape": ("I64", (2,)),
        **scales,
    }
    if not scheme.symmetric:
        specs["weight_zero_point"] = ("I32", (-(-rows * scheme.bits // 32), scheme.groups(columns)))
    return specs


def pack(weight: QuantizedWeight, *, plain: bool = False) -> dict[str, Tensor]:
    """The tensors of one module, by suffix.

    Args:
        plain: integers of 8 bits as they are, one a byte.

    Raises:
        ValueError: as ``check_packable`` or, plain, ``check_int8``.
    """
    import torch

    scheme = weight.scheme
    (check_int8 if plain else check_packable)(weight.shape, scheme)
    small = small_planes(weight)
    if scheme.book:
        return {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale": small["weight_scale"]}
    if plain:
        return {"weight": (weight.codes ^ 128).view(torch.int8), "weight_scale": small["weight_scale"]}
    planes = {"weight_packed": _pack_padded(weight.codes, scheme.bits), **small}
    if not scheme.symmetric:
        planes["weight_zero_point"] = _pack_padded(weight.zeros.T, scheme.bits).T.contiguous()
    return planes


def small_planes(weight: QuantizedWeight) -> dict[str, Tensor]:
    """``weight_scale`` and ``weight_shape``."""
    import torch

    stored = weight.scales.to(getattr(torch, exact_dtype(weight.scales))).contiguous()
    return {"weight_scale": stored, "weight_shape": torch.tensor(weight.shape)}


def _pack_padded(values: Tensor, bits: int) -> Tensor:
    """Codes u8 [n, m] packed along the last axis; codes that fill up the last word are 0."""
    import torch

    words = -(-values.shape[1] * bits // 32)
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % values_per_period(bits)))
    return pack_words(padded.contiguous(), bits)[:, :words].contiguous()


def config(
    scheme: QuantScheme, others: Mapping[str, QuantScheme], ignored: tuple[str, ...], layout: str | None = None
) -> dict[str, Any]:
    """``quantization_config``: a group for every scheme, that of most modules last, for every ``Linear``.

    Args:
        others: module -> its scheme, where it is not ``scheme``.
        layout: the format of all groups; None for what each one's scheme has.
    """
    targets: dict[QuantScheme, list[str]] = {}
    for module, other in others.items():
        targets.setdefault(other, []).append(module)
    groups = [_group(other, sorted(modules), layout) for other, modules in targets.items()]
    groups.append(_group(scheme, ["Linear"], layout))
    formats = {group["format"] for group in groups}
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }


def _group(scheme: QuantScheme, targets: list[str], layout: str | None) -> dict[str, Any]:
    own = "float-quantized" if scheme.book else "pack-quantized"
    by_token = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "int"}
    return {
        "format": layout or own,
        "input_activations": by_token if layout == "int-quantized" else None,
        "output_activations": None,
        "targets": targets,
        "weights": _weights(scheme),
    }


def _weights(scheme: QuantScheme) -> dict[str, Any]:
    strategy = "block" if scheme.block_rows > 1 else "channel" if scheme.group_size == -1 else "group"
    return {
        "actorder": None,
        "block_structure": [scheme.block_rows, scheme.group_size] if strategy == "block" else None,
        "dynamic": False,
        "group_size": scheme.group_size if strategy == "group" else None,
        "num_bits": scheme.bits,
        "strategy": strategy,
        "symmetric": scheme.symmetric,
        "type": "float" if scheme.book else "int",
    }
