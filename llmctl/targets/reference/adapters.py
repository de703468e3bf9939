"""Adapters in slots, as torch has them: for each op one tensor of all slots, where the kernels look a row's up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from llmctl.checkpoint.adapters.adapter import Adapter
from llmctl.engine.step import LoraLimits
from llmctl.graph.graph import Graph
from llmctl.targets.lora import check_representable, lora_ops, parts_of
from llmctl.targets.reference.kernels import AdapterWeights

Prepared = Mapping[str, "tuple[Tensor, Tensor, float]"]
"""By op: a [rank, in] and b [rows, rank], padded to the slot, and the scale."""


class StackedAdapters:
    """Implements ``engine.step.AdapterHost`` over torch tensors.

    Attributes:
        weights: by op, all slots; those that were never filled are zeros.

    Args:
        graph: a ``lora_graph``. dtype, device: of the matrices. active: entered around what is done there.
    """

    def __init__(
        self,
        graph: Graph,
        lora: LoraLimits,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        active: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._graph, self._lora, self._dtype = graph, lora, dtype
        self._active = active
        self._modules = {op.name: str(op.attrs["module"]) for op in lora_ops(graph)}
        self._pinned = torch.device(device).type == "cuda"
        self.weights: dict[str, AdapterWeights] = {}
        for op in lora_ops(graph):
            rank, rows, columns = op.attrs["rank"], op.attrs["rows"], graph.buffers[op.inputs[0]].width
            self.weights[op.name] = AdapterWeights(
                torch.zeros(lora.slots, rank, columns, dtype=dtype, device=device),
                torch.zeros(lora.slots, rows, rank, dtype=dtype, device=device),
                torch.zeros(lora.slots, device=device),
            )

    def prepare(self, adapter: Adapter) -> Prepared:
        """Part of ``AdapterHost``."""
        prepared = {}
        for name, part in parts_of(self._graph, adapter, self._lora).items():
            slots = self.weights[name]
            a, b = (torch.zeros(t.shape[1:], dtype=self._dtype, pin_memory=self._pinned) for t in (slots.a, slots.b))
            a[: len(part.a)], b[:, : part.b.shape[1]] = part.a, part.b
            check_representable(adapter, self._modules[name], a, b)
            prepared[name] = (a, b, part.scale)
        return prepared

    def put(self, slot: int, prepared: Prepared) -> None:
        """Part of ``AdapterHost``."""
        with self._active(), torch.inference_mode():
            for name, weights in self.weights.items():
                a, b, scale = prepared.get(name, (None, None, 0.0))
                for stacked, own in ((weights.a, a), (weights.b, b)):
                    if own is None:
                        stacked[slot].zero_()
                    else:
                        stacked[slot].copy_(own, non_blocking=True)
                weights.scales[slot] = scale
