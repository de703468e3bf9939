"""The forward pass over whole sequences, one decoder layer at a time, stopping where its linears' inputs are known.

Calibration and evaluation run models through it. Only one layer's weights are in
memory, with the KV cache and activations of some of the sequences, plus the activations between layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.checkpoint.assemble import WeightSource, assemble
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.experts import as_linears
from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, PRODUCTS, Graph, Op
from llmctl.targets.batch import packed_batch
from llmctl.targets.reference.context import Env, allocate_cache
from llmctl.targets.reference.interpreter import Interpreter, Program

_STEP_INPUTS = (INPUT_IDS, POSITIONS)
_CHUNK_TOKENS = 2048  # an MLP's activations of so many are 90 MB each in a model of 7 billion weights


@dataclass(frozen=True)
class Stage:
    """Linears of one layer that read the same rows of a buffer and are chosen, in execution order.

    Attributes:
        buffer: the buffer. linears: its readers among those chosen.
        experts: of an expert's linears, the buffer that says which rows are theirs; "": all are.
        expert: its index.
    """

    buffer: str
    linears: tuple[Op, ...]
    experts: str = ""
    expert: int = -1

    @property
    def name(self) -> str:
        """Of the rows."""
        return f"{self.buffer}[{self.expert}]" if self.experts else self.buffer


OnStage = Callable[[Stage, Tensor], None]


class LayerWeights(MutableMapping[str, Tensor]):
    """The graph's weights as f32 tensors, loaded when first asked for; a replaced one is what the next run uses."""

    def __init__(self, graph: Graph, source: WeightSource, device: torch.device | str = "cpu") -> None:
        self._graph = graph
        self._source = source
        self._device = torch.device(device)
        self._loaded: dict[str, Tensor] = {}
        self.on_change: Callable[[str], None] = lambda _: None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._loaded:
            found = assemble(self._graph.weights[name], self._source)
            dense = found.dequantize() if isinstance(found, QuantizedWeight) else found.to(self._device).float()
            self._loaded[name] = dense.to(self._device).contiguous()
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


class LayerwisePass:
    """Runs tokens through a plain Graph layer by layer, a chunk of sequences at a time.

    Whole, for all tokens, are only the activations between layers and the input of the stage at hand.

    Attributes:
        weights: the weights in use; assign to change what the next run computes.
    """

    def __init__(
        self,
        graph: Graph,
        source: WeightSource,
        tokens: Tensor | Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare a pass.

        Args:
            tokens: independent sequences; of one length as i32 ``[samples, length]``.
            device: where weights and activations are.
        """
        self.graph = graph
        self.weights = LayerWeights(graph, source, device)
        self._interpreter = Interpreter(graph, self.weights, device=device)
        self.weights.on_change = self._interpreter.release_weight
        sequences = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        self._chunks: list[_Chunk] = []
        for part in _parts(sequences):
            start = self._chunks[-1].rows.stop if self._chunks else 0
            self._chunks.append(_Chunk(self._interpreter, part, start))

    def stages(self, layer: int, chosen: Iterable[str], *, by_rows: bool = True) -> list[Stage]:
        """The stages of a layer.

        Args:
            chosen: names of the weights that matter.
            by_rows: experts that read one row a token have a stage each, of the rows that chose them; else one
                together, of all rows.
        """
        wanted = set(chosen)
        found: dict[tuple[str, str, int], list[Op]] = {}
        for op in self.graph.layer_ops(layer):
            for expert, linear in enumerate(as_linears(op)):
                if linear.weights[0] not in wanted:
                    continue
                own = op.kind != "linear" and (by_rows or self._rows_a_token(op) > 1)
                key = (op.inputs[0], op.inputs[1], expert) if own else (op.inputs[0], "", -1)
                found.setdefault(key, []).append(linear)
        return [Stage(buffer, tuple(ops), experts, expert) for (buffer, experts, expert), ops in found.items()]

    def _rows_a_token(self, op: Op) -> int:
        """Rows of a product's input that a token has."""
        return self.graph.buffers[op.inputs[0]].width // self.graph.weights[op.weights[0]].shape[1]

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
        ops, leaving = self.graph.layer_ops(layer), self._leaving(layer)
        at: dict[int, list[Stage]] = {}
        for stage in stages:
            kinds = ("grouped_linear",) if stage.experts else PRODUCTS
            first = next(i for i, op in enumerate(ops) if op.kind in kinds and op.inputs[0] == stage.buffer)
            at.setdefault(first, []).append(stage)
        ends = sorted(at) + ([len(ops)] if outputs else [])
        envs = [{**chunk.context.inputs(), **chunk.take(hidden)} for chunk in self._chunks]
        start = 0
        for end in ends:
            later = {name for op in ops[end:] for name in op.inputs}
            program = self._interpreter.program(ops[start:end], later | leaving)
            attends = any(op.kind == "attention" for op in ops[end:])
            for chunk, env in zip(self._chunks, envs, strict=True):
                chunk.run(program, env, ops[start:end], keep_cache=attends)
            if end in at and on_stage is not None:
                self._show(at[end], envs, on_stage)
            start = end
        made = [name for name in sorted(leaving) if name in envs[0] and name not in _STEP_INPUTS] if outputs else []
        return {name: self._whole(name, envs) for name in made}

    @torch.inference_mode()
    def logits(self, hidden: Env) -> Tensor:
        """f32 ``[R, vocab]`` of any R rows of the activations that leave the last layer."""
        ops = self.graph.layer_ops(self.graph.num_layers)
        context = copy.copy(self._chunks[0].context)
        context.rows = torch.arange(len(next(iter(hidden.values()))), device=context.device)
        return self._interpreter.program(ops, (LOGITS,))(dict(hidden), context)[LOGITS]

    def _show(self, stages: Sequence[Stage], envs: Sequence[Env], on_stage: OnStage) -> None:
        """Call ``on_stage`` with each of the stages that start at one op, and its rows."""
        whole: Env = {}
        for name in dict.fromkeys(name for stage in stages for name in (stage.buffer, stage.experts) if name):
            whole[name] = self._whole(name, envs)
        for stage in stages:
            x = whole[stage.buffer]
            if stage.experts:
                chosen, width = whole[stage.experts], self.graph.weights[stage.linears[0].weights[0]].shape[1]
                x = x.view(len(x), -1, width).expand(*chosen.shape, width)[chosen == stage.expert]
            on_stage(stage, x)

    def forget(self, layer: int) -> None:
        """Free a layer's weights."""
        for op in self.graph.layer_ops(layer):
            for name in filter(None, op.weights):
                del self.weights[name]

    def _whole(self, name: str, envs: Sequence[Env]) -> Tensor:
        """A buffer of all tokens; the chunks' become views of it, so that it is in memory once."""
        if len(envs) == 1:
            return envs[0][name]
        rows = self._chunks[-1].rows.stop
        whole = envs[0][name].new_empty(rows, *envs[0][name].shape[1:])
        for chunk, env in zip(self._chunks, envs, strict=True):
            whole[chunk.rows] = env[name]
            env[name] = whole[chunk.rows]
        return whole

    def _leaving(self, layer: int) -> set[str]:
        """Buffers that ops after ``layer`` read."""
        return {name for op in self.graph.ops if op.layer > layer for name in op.inputs}


class _Chunk:
    """Some of the sequences: their rows among all tokens, and what their ops share."""

    def __init__(self, interpreter: Interpreter, sequences: Sequence[Sequence[int]], start: int) -> None:
        self._graph = interpreter.graph
        self._batch = packed_batch(sequences)
        self._cache: dict[int, Tensor] = {}
        self.rows = slice(start, start + self._batch.num_tokens)
        self.context = interpreter.context(self._batch, self._cache)
        # The head is calibrated on the rows of all tokens.
        self.context.rows = torch.arange(self._batch.num_tokens, device=interpreter.device)

    def take(self, whole: Env) -> Env:
        return {name: value[self.rows] for name, value in whole.items()}

    def run(self, program: Program, env: Env, ops: Iterable[Op], *, keep_cache: bool) -> None:
        """Run ``ops`` over ``env``; the KV cache lives until nothing after them attends."""
        blocks, device = int(self._batch.block_tables.max()) + 1, self.context.device
        for layer in {int(op.attrs["layer"]) for op in ops if op.kind == "kv_write"} - self._cache.keys():
            self._cache |= allocate_cache(self._graph, blocks, self._batch.block_size, torch.float32, [layer], device)
        program(env, self.context)
        if not keep_cache:
            self._cache.clear()


def _parts(sequences: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Consecutive sequences, as many as ``_CHUNK_TOKENS`` hold and at least one."""
    start = 0
    while start < len(sequences):
        stop, tokens = start + 1, len(sequences[start])
        while stop < len(sequences) and (tokens := tokens + len(sequences[stop])) <= _CHUNK_TOKENS:
            stop += 1
        yield sequences[start:stop]
        start = stop
