"""How a quantization method lays a module's planes out among a checkpoint's tensors; the layouts of AWQ and GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from llmctl.checkpoint.quant_config import QuantizationInfo, infer_scheme
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.tensor_info import TensorInfo
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

Modules = dict[str, tuple[str, ...]]
"""Quantized module -> the suffixes of its planes."""
Load = Callable[[str], "Tensor"]
"""One plane of a module, by its suffix."""


class Layout(Protocol):
    """What is asked of a quantization method's layout on disk.

    Every method raises ValueError for planes that contradict one another or the config.
    """

    def modules(self, stored: Mapping[str, TensorInfo]) -> Modules:
        """The quantized modules among the stored tensors."""
        ...

    def describe(self, module: str, planes: Mapping[str, TensorInfo], load: Load) -> TensorInfo:
        """A module's weight, from its planes' headers and small tables."""
        ...

    def unpack(self, module: str, planes: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        """A module's weight, from its planes by suffix; ``scheme`` as ``describe`` gave it."""
        ...


def find_modules(names: Iterable[str], marker: str, suffixes: tuple[str, ...]) -> Modules:
    """The modules that have a plane ``marker``, and which of ``suffixes`` they have."""
    names = set(names)
    modules = (name.removesuffix(f".{marker}") for name in names if name.endswith(f".{marker}"))
    return {module: tuple(s for s in suffixes if f"{module}.{s}" in names) for module in sorted(modules)}


_WORDS, _INDICES, _SCALES = ("I32",), ("I32", "I64"), ("F16", "BF16", "F32")
_DTYPES: Mapping[str, tuple[str, ...]] = {
    "qweight": _WORDS, "qzeros": _WORDS, "weight_packed": _WORDS,
    "g_idx": _INDICES, "weight_g_idx": _INDICES, "weight_shape": _INDICES,
    "scales": _SCALES, "weight_scale": _SCALES, "weight_scale_inv": _SCALES,
}  # fmt: skip
"""What planes may be stored in, by suffix; bytes of anything else would be read as numbers that they are not."""


def check_dtypes(planes: Mapping[str, TensorInfo]) -> None:
    """Refuse a plane of a dtype that its method does not write.

    Raises:
        ValueError: naming the plane, what it may be, and what it is.
    """
    for suffix, plane in planes.items():
        known = _DTYPES.get(suffix, (plane.dtype,))
        if plane.dtype not in known:
            raise ValueError(f"{suffix}: expected dtype {' or '.join(known)}, found {plane.dtype}")


def total_bytes(planes: Mapping[str, TensorInfo]) -> int:
    """Size of all planes together."""
    return sum(plane.nbytes for plane in planes.values())


class WordLayout:
    """AWQ's and GPTQ's: ``qweight``, ``qzeros``, ``scales`` and perhaps ``g_idx``."""

    def __init__(self, info: QuantizationInfo) -> None:
        self._info = info

    def modules(self, stored: Mapping[str, TensorInfo]) -> Modules:
        """Those with a ``qweight``."""
        return find_modules(stored, "qweight", ("qweight", "qzeros", "scales", "g_idx"))

    def describe(self, module: str, planes: Mapping[str, TensorInfo], load: Load) -> TensorInfo:  # noqa: ARG002
        """From shapes, and GPTQ's ``g_idx``."""
        scheme, shape = infer_scheme(self._info, {suffix: plane.shape for suffix, plane in planes.items()})
        ordered = "g_idx" in planes and self._has_act_order(load("g_idx"), scheme, shape[1])
        scheme = replace(scheme, act_order=ordered)
        return TensorInfo(shape, planes["scales"].dtype, scheme, total_bytes(planes))

    def unpack(self, module: str, planes: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:  # noqa: ARG002
        """By the method's own module."""
        from llmctl.checkpoint import awq, gptq

        if self._info.method == "awq":
            return awq.unpack(planes, scheme.group_size, symmetric=scheme.symmetric)
        return gptq.unpack(planes, scheme, self._info.checkpoint_format)

    def _has_act_order(self, g_idx: Tensor, scheme: QuantScheme, columns: int) -> bool:
        from llmctl.checkpoint.gptq import effective_g_idx

        return effective_g_idx(g_idx, columns, scheme) is not None
