"""A graph bound to kernels for one shape of step: a list of ready launches, to be run again and again.

Everything is checked while binding. Running goes through the list and starts each launch; nothing is looked up,
allocated or waited for, so that a run can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from llmctl.engine.step import RuntimeLimits
from llmctl.graph.graph import INPUT_IDS, POSITIONS, Graph, Op
from llmctl.targets.base import FALLBACK, KernelChoice
from llmctl.targets.cuda.buffers import Buffers
from llmctl.targets.cuda.call import Call, Machine
from llmctl.targets.cuda.inputs import StepShape
from llmctl.targets.cuda.ops import EXECUTORS, Executor, Job, PackedWeight, Scratch, StepTensors, dense
from llmctl.targets.cuda.signatures import launch
from llmctl.targets.reference.kernels import AdapterWeights

Run = Callable[[], Any]


class LaunchMachine(Machine, Protocol):
    """A machine that can get a call ready to be started later, many times."""

    def prepared(self, call: Call) -> Run:
        """What starts the call; the call's tensors must outlive it."""
        ...


@dataclass(frozen=True)
class Program:
    """Ready launches, in order. ``entries``: what each one starts: a kernel's entry point, or ``torch.<operator>``."""

    launches: tuple[Run, ...]
    entries: tuple[str, ...]

    def __call__(self) -> None:
        """Start every launch on the machine's stream."""
        for start in self.launches:
            start()


class Recorder:
    """A ``Machine`` that makes the list of a program; it starts nothing, unless it is to run the program meanwhile."""

    def __init__(self, machine: LaunchMachine, *, run: bool = False) -> None:
        """``run``: start every launch as soon as it is ready: the device works while the next one is being bound."""
        self._machine, self._run = machine, run
        self._launches: list[Run] = []
        self._entries: list[str] = []

    def launch(self, call: Call) -> None:
        """Add a call."""
        if not call.empty:
            self._add(self._machine.prepared(call), call.entry)

    def call_torch(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Add an operator of torch."""
        self._add(partial(function, *arguments, **named), f"torch.{function.__name__}")

    def _add(self, start: Run, entry: str) -> None:
        self._launches.append(start)
        self._entries.append(entry)
        if self._run:
            start()

    def program(self) -> Program:
        """What was recorded."""
        return Program(tuple(self._launches), tuple(self._entries))


Weights = Mapping[str, "Tensor | PackedWeight | None"]


@dataclass(frozen=True)
class Model:
    """What all programs of a runtime share.

    Attributes:
        choices: kernel choice by op. weights: on the device, "" is None. buffers: activations.
        caches, kv_scales, rope, lora, group_of: as ``ops.StepTensors`` has them.
        foreign: by op name, what executes an op that no kernel takes.
    """

    graph: Graph
    choices: Mapping[str, KernelChoice]
    weights: Weights
    buffers: Buffers
    scratch: Scratch
    caches: Mapping[int, Tensor]
    kv_scales: Mapping[int, Tensor]
    rope: Callable[[Op], tuple[Tensor, Tensor]]
    limits: RuntimeLimits
    sms: int
    foreign: Mapping[str, Executor]
    lora: Mapping[str, AdapterWeights]
    group_of: Sequence[int]

    def bind(
        self,
        machine: LaunchMachine,
        shape: StepShape,
        inputs: Mapping[str, Tensor],
        tokens: Tensor,
        *,
        run: bool = False,
    ) -> Program:
        """Everything up to ``gather_rows`` for a shape of step.

        Args:
            inputs: the shape's arrays, as ``InputArena.views`` gives them.
            tokens: i32, the tokens that the step before sampled, by row.
            run: run it as well, while it is bound.

        Raises:
            ValueError: a kernel that cannot take what the graph gives it.
        """
        recorder = Recorder(machine, run=run)
        launch(recorder, "feed_tokens", ids=inputs["ids"], source=inputs["source"], tokens=tokens)
        step = self._step(shape, inputs, inputs["ids"][:0])
        env = {INPUT_IDS: inputs["ids"], POSITIONS: inputs["positions"]}
        self._run(recorder, self.graph.ops[: self.graph.gather_index()], env, step, shape.tokens)
        return recorder.program()

    def bind_head(self, machine: LaunchMachine, rows: Tensor, every: bool) -> Program:
        """From ``gather_rows`` to the logits.

        Args:
            rows: i64 [R], the rows that are wanted. every: they are the first R rows in order; nothing is gathered.
        """
        recorder = Recorder(machine)
        gather, *rest = self.graph.ops[self.graph.gather_index() :]
        hidden = gather.inputs[0]
        env = {}
        if every:
            env[gather.outputs[0]] = self.buffers.view(hidden, len(rows))
        else:
            rest = [gather, *rest]
            env[hidden] = self.buffers.view(hidden, self.buffers.rows_of(hidden))
        none = rows[:0]
        shape = StepShape(len(rows), 0, 0, False, False)
        views = dict.fromkeys(("positions", "slots", "block_tables", "seq_lens", "query_start", "adapters"), none)
        self._run(recorder, rest, env, self._step(shape, views, rows), len(rows))
        return recorder.program()

    def _step(self, shape: StepShape, inputs: Mapping[str, Tensor], rows: Tensor) -> StepTensors:
        return StepTensors(
            inputs["positions"], inputs["slots"], rows, inputs["block_tables"], inputs["seq_lens"],
            inputs["query_start"], shape.width * self.limits.block_size, 2 if shape.prefill else 1,
            1 if shape.decode else 2, self.caches, self.rope, self.scratch, sms=self.sms, kv_scales=self.kv_scales,
            adapters=inputs["adapters"] if self.lora else None, lora=self.lora, group_of=self.group_of,
        )  # fmt: skip

    def _run(self, machine: Recorder, ops: Sequence[Op], env: dict[str, Tensor], step: StepTensors, rows: int) -> None:
        for op in ops:
            outputs = self.buffers.outputs(op, rows)
            inputs = [env[name] if name in env else self.buffers.view(name, rows) for name in op.inputs]
            job = Job(op, inputs, outputs, [self.weights[name] for name in op.weights], step)
            self._executor(op)(machine, job)

    def _executor(self, op: Op) -> Executor:
        kernel = self.choices[op.name].kernel
        if kernel != FALLBACK:
            return EXECUTORS[kernel]
        return self.foreign.get(op.name, dense)


def torch_dtype(name: str) -> torch.dtype:
    """``bfloat16`` -> ``torch.bfloat16``."""
    found: torch.dtype = getattr(torch, name)
    return found
