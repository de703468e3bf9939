"""Which tensors a quantized checkpoint has, each with a function that makes its data when its turn comes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from llmctl.checkpoint.dense_tensors import DenseTensors
from llmctl.checkpoint.output_format import AS_STORED, OutputFormat
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.safetensors_io import TensorSpec
from llmctl.graph.dtypes import HALF_DTYPES

if TYPE_CHECKING:
    from torch import Tensor


class OutputPlan:
    """A source's tensors with some linears quantized and some dense tensors replaced.

    Attributes:
        settings: as given. dtype: what config.json calls the dtype of the dense tensors; dense: these.

    Raises:
        ValueError: a quantized module that the source does not have; settings that the format cannot express.
    """

    def __init__(
        self,
        source: Checkpoint,
        quantized: Mapping[str, QuantizedWeight],
        replaced: Mapping[str, Tensor],
        settings: OutputFormat,
        left_out: Collection[str],
    ) -> None:
        self._source, self._quantized, self._replaced = source, quantized, replaced
        self.settings = settings
        self.config = settings.quantization_config()
        self.dtype = self._named_dtype()
        self.dense = DenseTensors(source, replaced, None if settings.dtype == AS_STORED else self.dtype)
        self._stored = frozenset(source.names()).difference(left_out)
        # A Mapping's default `in` loads the value, so names are looked up here.
        self._modules = frozenset(quantized)
        missing = [m for m in self._modules if f"{m}.weight" not in self._stored and m != "lm_head"]
        if missing:
            raise ValueError(f"quantized module '{min(missing)}' has no weight in {source.path}")
        self._packed = functools.lru_cache(maxsize=1)(self._pack)

    def _named_dtype(self) -> str:
        named = self._source.dtype
        if self.settings.dtype == AS_STORED:
            return named
        return self.settings.dtype or (named if named in HALF_DTYPES else "float16")

    @property
    def head_quantized(self) -> bool:
        """Whether the head is among the quantized modules."""
        return "lm_head" in self._modules

    @property
    def has_head(self) -> bool:
        """Whether the new checkpoint has a head of its own, whatever the source's config says."""
        return self.head_quantized or "lm_head.weight" in {*self._stored, *self._replaced}

    def names(self) -> list[str]:
        """All weight names, sorted; a quantized module is its ``.weight``."""
        return sorted({*self._stored, *self._replaced, *(f"{m}.weight" for m in self._modules)})

    def weight(self, name: str) -> QuantizedWeight | None:
        """The quantized weight of a name, checked; None for a dense one.

        Raises:
            ValueError: the format cannot hold it, or its scheme is not the settings'.
        """
        module = name.removesuffix(".weight")
        if name == module or module not in self._modules:
            return None
        weight = self._quantized[module]
        self._check(module, weight)
        return weight

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of a folder of safetensors, planes of quantized modules included; errors as ``weight``."""
        specs: dict[str, TensorSpec] = {}
        for name in self.names():
            weight = self.weight(name)
            if weight is None:
                specs[name] = self.dense.spec(name)
            else:
                module = name.removesuffix(".weight")
                planes = self.settings.row.specs(weight)
                small = self.settings.row.small(weight).keys()
                specs |= {
                    f"{module}.{suffix}": (dtype, shape, self._plane(module, suffix, suffix in small))
                    for suffix, (dtype, shape) in planes.items()
                }
        return specs

    def _check(self, module: str, weight: QuantizedWeight) -> None:
        found, wanted = weight.scheme, self.settings.scheme_of(module)
        fields = ("bits", "group_size", "symmetric", "book", "minimum", "block_rows")
        same = all(getattr(found, name) == getattr(wanted, name) for name in fields)
        if not same or (found.act_order and not wanted.act_order):
            raise ValueError(f"'{module}': expected {wanted}, found {found}")
        self.settings.check(module, weight.shape)

    def _plane(self, module: str, suffix: str, small: bool) -> Callable[[], Tensor]:
        return lambda: self._packed(module, small)[suffix]

    def _pack(self, module: str, small: bool) -> dict[str, Tensor]:
        row = self.settings.row
        try:
            return (row.small if small else row.pack)(self._quantized[module])
        except ValueError as error:
            raise ValueError(f"'{module}': {error}") from error
