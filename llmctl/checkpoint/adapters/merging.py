"""A checkpoint with adapters merged into its weights, computed as they are asked for: dense, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmctl.checkpoint.adapters.adapter import Adapter, LowRank
from llmctl.checkpoint.adapters.base_tensors import base_tensors
from llmctl.checkpoint.adapters.reading import FILES
from llmctl.checkpoint.adapters.settings import LARGEST
from llmctl.checkpoint.hf_folder import QUANTIZATION_KEYS
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.safetensors_io import spec_nbytes, torch_dtype_name
from llmctl.checkpoint.tensor_info import TensorInfo
from llmctl.errors import CheckpointError, UsageError
from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import Graph

if TYPE_CHECKING:
    from torch import Tensor

_WIDE = DTYPES["float32"]


@dataclass(frozen=True)
class Weighted:
    """An adapter, and what its products are multiplied by besides their own scale."""

    adapter: Adapter
    weight: float = 1.0

    @property
    def described(self) -> str:
        """In a few words: folder, weight, rank, how much of the model it changes."""
        adapter = self.adapter
        found = [f"weight {self.weight:g}"]
        if adapter.parts:
            kind = "DoRA" if adapter.magnitudes else "LoRA"
            found.append(f"{kind} of {len(adapter.parts)} modules, rank {adapter.rank}")
        if adapter.replaced:
            found.append(f"{len(adapter.replaced)} whole tensors")
        return f"{adapter.path}: {', '.join(found)}"


def merged_checkpoint(base: Checkpoint, graph: Graph, adapters: Sequence[Weighted]) -> tuple[Checkpoint, bool]:
    """``base`` plus the weighted sum of what adapters add; a quantized base is dequantized.

    Weights that an adapter changes and those that were quantized are float32, the others as they are stored. Where
    embeddings are changed that the output head shares, the head keeps what it had: PEFT's forward changes the one only.

    Args:
        graph: of the base, before any pass.

    Returns:
        The checkpoint, and whether the head has become a tensor of its own.

    Raises:
        UsageError: adapters that cannot be added up.
    """
    _check_together(adapters)
    source = _MergedSource(base, graph, adapters)
    config = {key: value for key, value in base.config_with_dtype.items() if key not in QUANTIZATION_KEYS}
    if source.untied:
        config["tie_word_embeddings"] = False
    files = {adapter.adapter.path / name for adapter in adapters for name in FILES}
    return base.over(source, config, files), source.untied


def _check_together(adapters: Sequence[Weighted]) -> None:
    """Refuse sums that mean nothing: infinities, a share of a replaced tensor, two adapters of which one replaces."""
    touched: dict[str, str] = {}  # tensor -> the adapter that changes it
    setters: dict[str, str] = {}
    for one in adapters:
        adapter, name = one.adapter, str(one.adapter.path)
        sets = {*adapter.replaced, *(f"{module}.weight" for module in adapter.magnitudes)}
        if sets and one.weight != 1:
            what = "DoRA" if adapter.magnitudes else "modules_to_save or biases"
            raise UsageError(
                f"adapter {name}: weight {one.weight:g}: {what} can only be merged whole", fix=f"name {name} alone"
            )
        for part in adapter.parts:
            if abs(part.scale * one.weight) > LARGEST:
                raise UsageError(f"adapter {name}: weight {one.weight:g} makes values beyond float32 of its products")
        own = sets | {f"{part.module}.weight" for part in adapter.parts}
        for tensor in sorted(own):
            other = touched.get(tensor) if tensor in sets else setters.get(tensor)
            if other is not None:
                raise UsageError(
                    f"adapters {other} and {name} both change '{tensor}', and one of them replaces it",
                    fix="merge one after the other",
                )
            touched[tensor] = name
            if tensor in sets:
                setters[tensor] = name


class _MergedSource:
    """A ``TensorSource`` over a checkpoint and its adapters."""

    def __init__(self, base: Checkpoint, graph: Graph, adapters: Sequence[Weighted]) -> None:
        self._base = base
        known = base_tensors(graph)
        self._turned = known.turned
        self._tables = {f"{module}.weight" for module in known.tables}
        self._added: dict[str, list[tuple[LowRank, float]]] = {}
        self._magnitudes: dict[str, Tensor] = {}
        self._replaced: dict[str, Tensor] = {}
        for one in adapters:
            for part in one.adapter.parts:
                self._added.setdefault(f"{part.module}.weight", []).append((part, one.weight))
            self._magnitudes |= {f"{m}.weight": norms for m, norms in one.adapter.magnitudes.items()}
            self._replaced |= one.adapter.replaced
        self._head = f"{known.head}.weight"
        self._embeddings = next(p.tensor for p in graph.weights["embed.weight"].parts)
        changed = {self._head, self._embeddings} & {*self._added, *self._replaced}
        self.untied = bool(changed) and not any(
            part.tensor == self._head for weight in graph.weights.values() for part in weight.parts
        )

    def entries(self) -> Mapping[str, TensorInfo]:
        names = {*self._base.names(), *((self._head,) if self.untied else ())}
        return {name: self._entry(name) for name in names}

    def load(self, name: str) -> Tensor:
        import torch

        value = self._replaced.get(name)
        added = self._added.get(name, ())
        if value is None:
            value = self._dense(name)
        if not added:
            return value
        # Summed in the orientation that adapters have.
        turned = name in self._turned
        total = (value.T if turned else value).to(torch.float32, copy=True)
        for part, weight in added:
            total.addmm_(part.b, part.a, alpha=part.scale * weight)
        norms = self._magnitudes.get(name)
        if norms is not None:
            axis = 0 if name in self._tables else 1
            total *= norms.unsqueeze(axis) / total.norm(dim=axis, keepdim=True)
        if not bool(total.isfinite().all()):
            raise CheckpointError(f"{self._base.path}: tensor '{name}': merged values are not finite")
        return total.T.contiguous() if turned else total

    def release(self) -> None:
        self._base.release()

    def _entry(self, name: str) -> TensorInfo:
        replaced = self._replaced.get(name)
        stored = self._stored(name)
        info = self._base.describe(stored)
        shape, code = info.shape, info.dtype
        if info.quant is not None:
            shape, code = shape[::-1] if name in self._turned else shape, _WIDE.safetensors
        if replaced is not None:
            code = torch_dtype_name(replaced.dtype)
        if name in self._added:
            code = _WIDE.safetensors
        return TensorInfo(shape, code, None, spec_nbytes((code, shape, b"")))

    def _stored(self, name: str) -> str:
        """What the base has under a name; of a head that it does not store, the embeddings."""
        return name if self._base.has(name) else self._embeddings

    def _dense(self, name: str) -> Tensor:
        found = self._base.weight(self._stored(name))
        if not isinstance(found, QuantizedWeight):
            return found
        dense = found.dequantize()
        return dense.T.contiguous() if name in self._turned else dense
