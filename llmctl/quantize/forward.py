"""The calibration forward pass: one decoder layer at a time, stopping where its linears' inputs are known.

Only one layer's weights, KV cache and activations are in memory, plus the activations between layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.checkpoint.assemble import WeightSource, assemble
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Graph, Op
from llmctl.targets.batch import packed_batch
from llmctl.targets.reference.context import Env, allocate_cache
from llmctl.targets.reference.interpreter import Interpreter

_STEP_INPUTS = (INPUT_IDS, POSITIONS)


@dataclass(frozen=True)
class Stage:
    """Linears of one layer that read the same buffer and are to be quantized, in execution order.

    Attributes:
        buffer: the buffer. linears: its readers among those to quantize.
    """

    buffer: str
    linears: tuple[Op, ...]


OnStage = Callable[[Stage, Tensor], None]


class LayerWeights(MutableMapping[str, Tensor]):
    """The graph's weights as f32 tensors, loaded when first asked for; a replaced one is what the next run uses."""

    def __init__(self, graph: Graph, source: WeightSource) -> None:
        self._graph = graph
        self._source = source
        self._loaded: dict[str, Tensor] = {}
        self.on_change: Callable[[str], None] = lambda _: None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._loaded:
            found = assemble(self._graph.weights[name], self._source)
            dense = found.dequantize() if isinstance(found, QuantizedWeight) else found.float()
            self._loaded[name] = dense.contiguous()
        return self._loaded[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._loaded[name] = value
        self.on_change(name)

    def __delitem__(self, name: str) -> None:
        self._loaded.pop(name, None)
        self.on_change(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._graph.weights)

    def __len__(self) -> int:
        return len(self._graph.weights)


class CalibrationPass:
    """Runs calibration tokens through a plain Graph layer by layer.

    Attributes:
        weights: the weights in use; assign to change what the next run computes.
    """

    def __init__(self, graph: Graph, source: WeightSource, tokens: Tensor | Sequence[Sequence[int]]) -> None:
        """Prepare a pass.

        Args:
            tokens: independent sequences; of one length as i32 ``[samples, length]``.
        """
        self.graph = graph
        self.weights = LayerWeights(graph, source)
        self._interpreter = Interpreter(graph, self.weights)
        self.weights.on_change = self._interpreter.release_weight
        self._batch = packed_batch(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
        self._cache: dict[int, Tensor] = {}
        self._context = self._interpreter.context(self._batch, self._cache)
        self._context.rows = torch.arange(self._batch.num_tokens)  # the head is calibrated on the rows of all tokens

    def stages(self, layer: int, chosen: Iterable[str]) -> list[Stage]:
        """The stages of a layer.

        Args:
            chosen: names of the weights to quantize.
        """
        wanted = set(chosen)
        by_buffer: dict[str, list[Op]] = {}
        for op in self.graph.layer_ops(layer):
            if op.kind == "linear" and op.weights[0] in wanted:
                by_buffer.setdefault(op.inputs[0], []).append(op)
        return [Stage(buffer, tuple(ops)) for buffer, ops in by_buffer.items()]

    def enter(self) -> Env:
        """Activations entering layer 0, by buffer name."""
        return self.run(-1, {})

    @torch.inference_mode()
    def run(
        self,
        layer: int,
        hidden: Env,
        stages: Iterable[Stage] = (),
        on_stage: OnStage | None = None,
        *,
        outputs: bool = True,
    ) -> Env:
        """Run a layer from the activations entering it; those leaving it.

        Args:
            on_stage: called with each stage and its input ``[tokens, width]`` before its first linear runs; weights it
                changes take effect at once.
            outputs: false stops after the last stage and returns nothing.
        """
        waiting = {stage.buffer: stage for stage in stages}

        def before(op: Op, env: Env) -> bool:
            stage = waiting.pop(op.inputs[0], None) if op.kind == "linear" else None
            if stage is not None and on_stage is not None:
                on_stage(stage, env[stage.buffer])
            return not (outputs or waiting)

        ops, leaving = self.graph.layer_ops(layer), self._leaving(layer)
        self._allocate(ops)
        program = self._interpreter.program(ops, leaving)
        env = program({**self._context.inputs(), **hidden}, self._context, before)
        return {name: env[name] for name in leaving if name in env and name not in _STEP_INPUTS} if outputs else {}

    @torch.inference_mode()
    def logits(self, hidden: Env) -> Tensor:
        """f32 ``[R, vocab]`` of any R rows of the activations that leave the last layer."""
        ops = self.graph.layer_ops(self.graph.num_layers)
        context = copy.copy(self._context)
        context.rows = torch.arange(len(next(iter(hidden.values()))))
        return self._interpreter.program(ops, (LOGITS,))(dict(hidden), context)[LOGITS]

    def forget(self, layer: int) -> None:
        """Free a layer's weights and KV cache."""
        self._cache.clear()
        for op in self.graph.layer_ops(layer):
            for name in filter(None, op.weights):
                del self.weights[name]

    def _leaving(self, layer: int) -> set[str]:
        """Buffers that ops after ``layer`` read."""
        return {name for op in self.graph.ops if op.layer > layer for name in op.inputs}

    def _allocate(self, ops: Iterable[Op]) -> None:
        wanted = {int(op.attrs["layer"]) for op in ops if op.kind == "kv_write"}
        blocks = int(self._batch.block_tables.max()) + 1
        size = self._batch.block_size
        for layer in wanted - self._cache.keys():
            self._cache |= allocate_cache(self.graph, blocks, size, torch.float32, [layer])
