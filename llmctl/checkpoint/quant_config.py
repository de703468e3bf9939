"""``quantization_config`` as one plain record; how AWQ and GPTQ fill it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.graph import QuantScheme


@dataclass(frozen=True)
class QuantizationInfo:
    """What a checkpoint says about its quantization. Modules without a method's planes are dense whatever this says.

    Attributes:
        method: its name in ``methods.METHODS``, or "gguf".
        scheme: the settings most modules have; ``Checkpoint.describe`` gives each module's own.
        ignored: modules the config lists as not converted (information only).
        checkpoint_format: the layout's name in that method, e.g. "gemm" for AWQ, "gptq" or "gptq_v2" for GPTQ.
    """

    method: str
    scheme: QuantScheme
    ignored: tuple[str, ...] = ()
    checkpoint_format: str = ""


def parse_words(config: Mapping[str, Any], where: str) -> QuantizationInfo:
    """Read the ``quantization_config`` (or ``quantize_config.json``) of AWQ or GPTQ.

    Args:
        where: the file, for error messages.

    Raises:
        UnsupportedModelError: another layout.
        CheckpointError: a key that is missing or of the wrong type.
    """
    try:
        bits = int(config.get("bits", config.get("w_bit", 0)))
        group_size = int(config.get("group_size", config.get("q_group_size", 0)))
    except (TypeError, ValueError, OverflowError):
        bits = group_size = 0
    if bits <= 0 or not (group_size == -1 or group_size > 0):
        raise CheckpointError(
            f"{where}: expected integers bits and group_size, "
            f"found {config.get('bits')!r} and {config.get('group_size')!r}"
        )
    ignored = read_names(config, ("modules_to_not_convert",), where)
    read = _awq if str(config.get("quant_method")).lower() == "awq" else _gptq
    return read(config, bits, group_size, ignored, where)


def read_names(config: Mapping[str, Any], keys: Iterable[str], where: str) -> tuple[str, ...]:
    """The names under the first of ``keys`` that has some: a list, or one alone.

    Raises:
        CheckpointError: something else stands there.
    """
    key = next((key for key in keys if config.get(key)), None)
    if key is None:
        return ()
    found = config[key]
    if not isinstance(found, str | list | tuple):
        raise CheckpointError(f"{where}: {key}: expected names, found {found!r}")
    return (found,) if isinstance(found, str) else tuple(str(name) for name in found)


def read_flag(config: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    """A key that is true or false; ``default`` where it is absent or null.

    Raises:
        CheckpointError: something else stands there.
    """
    found = config.get(key)
    if found is None:
        return default
    if not isinstance(found, bool):
        raise CheckpointError(f"{where}: {key}: expected true or false, found {reprlib.repr(found)}")
    return found


def _awq(
    config: Mapping[str, Any], bits: int, group_size: int, ignored: tuple[str, ...], where: str
) -> QuantizationInfo:
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm" or bits != 4:
        raise UnsupportedModelError(f"{where}: AWQ {version} at {bits} bits is not read; known: gemm at 4 bits")
    symmetric = not read_flag(config, "zero_point", True, where)
    return QuantizationInfo("awq", QuantScheme(bits, group_size, symmetric), ignored, "gemm")


def _gptq(
    config: Mapping[str, Any], bits: int, group_size: int, ignored: tuple[str, ...], where: str
) -> QuantizationInfo:
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2") or bits not in (2, 3, 4, 8):
        raise UnsupportedModelError(
            f"{where}: GPTQ layout '{layout}' at {bits} bits is not read; known: gptq, gptq_v2 at 2, 3, 4, 8 bits"
        )
    static = read_flag(config, "static_groups", False, where)
    act_order = read_flag(config, "desc_act", False, where) and not static
    scheme = QuantScheme(bits, group_size, read_flag(config, "sym", True, where), act_order)
    return QuantizationInfo("gptq", scheme, ignored, layout)


def infer_scheme(info: QuantizationInfo, shapes: Mapping[str, tuple[int, ...]]) -> tuple[QuantScheme, tuple[int, int]]:
    """A module's own bits and group size, and its logical shape (N, K), from the shapes of its planes by suffix.

    The configured values are kept where the shapes agree with them; modules quantized otherwise (mixed precision) are
    recognised. ``act_order`` is as configured: only ``g_idx``'s contents can tell.

    Raises:
        ValueError: a missing plane, or shapes that no setting explains.
    """
    for suffix in ("qweight", "qzeros", "scales"):
        if len(shapes.get(suffix, ())) != 2:
            raise ValueError(f"expected a matrix '{suffix}', found {shapes.get(suffix, 'none')}")
    groups, rows = shapes["scales"]
    if info.method == "awq":
        bits, columns = 4, shapes["qweight"][0]
        expected = {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8)}
    else:
        words = shapes["qweight"][0]
        if len(shapes.get("g_idx", (0,))) != 1:
            raise ValueError(f"g_idx: expected one axis, found shape {list(shapes['g_idx'])}")
        (columns,) = shapes.get("g_idx") or (0,)
        columns = columns or words * 32 // info.scheme.bits
        bits = words * 32 // columns
        expected = {"qweight": (columns * bits // 32, rows), "qzeros": (groups, rows * bits // 32)}
    for suffix, shape in expected.items():
        if tuple(shapes[suffix]) != shape:
            raise ValueError(f"{suffix}: expected shape {list(shape)}, found {list(shapes[suffix])}")
    scheme = QuantScheme(bits, _group_size(info, columns, groups), info.scheme.symmetric, info.scheme.act_order)
    return scheme, (rows, columns)


def _group_size(info: QuantizationInfo, columns: int, groups: int) -> int:
    if info.scheme.groups(columns) == groups:
        return info.scheme.group_size
    if groups == 1:
        return -1
    if groups and columns % groups == 0:
        return columns // groups
    raise ValueError(f"{groups} groups over {columns} columns do not fit group size {info.scheme.group_size}")
