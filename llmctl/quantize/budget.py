"""``--target-bpw`` and ``--target-size``: the bits of every linear, chosen so that the model's output moves least.

Linears of a layer that read one activation get the same bits, so that an engine can still compute them as one product.
What a choice costs is what the output's format stores for it. What it loses is measured by ``sensitivity.py``, one
group at a time; the loss of a whole choice is taken to be the sum, as the KL divergence is of second order in errors
that are independent of one another. Losses at more bits than are measured follow from that, too: with the square of the
grid's step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from llmctl.checkpoint.output_format import OutputFormat
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.config import QuantizeConfig, parse_bytes
from llmctl.errors import UsageError
from llmctl.graph.dtypes import BY_SAFETENSORS
from llmctl.graph.experts import linears, multiplications
from llmctl.graph.graph import Graph, QuantScheme
from llmctl.quantize.grid import BITS
from llmctl.quantize.knapsack import Option, choose
from llmctl.quantize.modules import Module, Selection
from llmctl.quantize.sensitivity import Candidate, OnProgress, measure_sensitivity
from llmctl.targets.reference.layerwise import LayerwisePass

_MEASURED = (3, 4)
_MAX_WORK = 5e12
"""Multiply-adds that measuring may take: a few minutes on two cores."""
_MIN_TOKENS, _MAX_TOKENS = 128, 2048
_HEADER_BYTES = 200  # of a stored tensor, its name and shape


@dataclass(frozen=True)
class Group:
    """Linears that get the same bits.

    Attributes:
        modules: of one layer, reading one activation.
        pinned: names of those whose own bits stay.
        bits: what the others may get, rising. costs: bytes stored for all, in the same order.
    """

    modules: tuple[Module, ...]
    pinned: frozenset[str]
    bits: tuple[int, ...]
    costs: tuple[int, ...]


@dataclass(frozen=True)
class Budget:
    """Groups to choose bits for, and the bytes that they may take together.

    Attributes:
        weights: how many weights the groups have.
    """

    groups: tuple[Group, ...]
    limit: int
    weights: int


@dataclass(frozen=True)
class Allocation:
    """The bits of each module, and the KL divergence of the model's output that was predicted for them, nats."""

    bits: Mapping[str, int]
    predicted_kl: float


def make_budget(
    config: QuantizeConfig,
    checkpoint: Checkpoint,
    graph: Graph,
    selection: Selection,
    schemes: Mapping[str, QuantScheme],
    pinned: Collection[str],
    output: OutputFormat,
) -> Budget:
    """The budget that the options set.

    Args:
        schemes: graph weight -> its scheme but for the bits.
        pinned: modules whose bits are settled.

    Raises:
        UsageError: a target below the least that the format stores, or that is no size.
    """
    groups = tuple(_group(modules, schemes, pinned, output) for modules in linear_groups(graph, selection))
    weights = sum(prod(module.shape) for module in selection.modules)
    least = sum(min(group.costs) for group in groups)
    if config.target_bpw is not None:
        limit = int(config.target_bpw * weights / 8)
        if limit < least:
            raise UsageError(
                f"--target-bpw {config.target_bpw:g}: {output.format} stores these linears in no less than "
                f"{_up(8 * least / weights):.2f} bits a weight, scales included",
                fix=f"--target-bpw {_up(8 * least / weights):.2f}, or a larger --group-size",
                param="target_bpw",
            )
        return Budget(groups, limit, weights)
    assert config.target_size is not None
    rest = _rest(checkpoint, selection)
    limit = parse_bytes(config.target_size, param="target_size") - rest
    if limit < least:
        raise UsageError(
            f"--target-size {config.target_size}: {output.format} stores this model in no less than "
            f"{_up_to_kib(least + rest)}, of which {_up_to_kib(rest)} are left at 16 bits",
            fix=f"--target-size {_up_to_kib(least + rest)}, or a larger --group-size",
            param="target_size",
        )
    return Budget(groups, limit, weights)


def linear_groups(graph: Graph, selection: Selection) -> list[tuple[Module, ...]]:
    """The selected modules, those of a layer that read one activation together."""
    buffers = {op.weights[0]: op.inputs[0] for op in linears(graph)}
    found: dict[tuple[int, str], list[Module]] = {}
    for module in selection.modules:
        found.setdefault((module.layer, buffers[module.weights[0]]), []).append(module)
    return [tuple(modules) for modules in found.values()]


def spend(
    budget: Budget,
    schemes: Mapping[str, QuantScheme],
    graph: Graph,
    source: Checkpoint,
    tokens: Tensor,
    on_progress: OnProgress,
    device: str = "cpu",
) -> Allocation:
    """Measure the groups and choose.

    Args:
        tokens: i32 ``[samples, length]``; as many of them are used as ``_MAX_WORK`` allows, of the first sample alone
            where that is less than one.
        device: where they are measured.
    """
    keys = [(i, bits) for i, group in enumerate(budget.groups) if len(group.bits) > 1 for bits in _measured(group)]
    candidates = [_candidate(budget.groups[i], bits, schemes) for i, bits in keys]
    count = _affordable(graph, candidates)
    text = tokens[: max(1, count // tokens.shape[1]), :count]
    measured = measure_sensitivity(LayerwisePass(graph, source, text, device), candidates, on_progress)
    losses = dict(zip(keys, measured, strict=True))
    options = [_options(i, group, losses) for i, group in enumerate(budget.groups)]
    chosen = choose(options, budget.limit)
    assert chosen is not None  # make_budget has seen to it
    bits = {m.name: group.bits[k] for group, k in zip(budget.groups, chosen, strict=True) for m in group.modules}
    return Allocation(bits, sum(group[k].loss for group, k in zip(options, chosen, strict=True)))


def _group(
    modules: tuple[Module, ...], schemes: Mapping[str, QuantScheme], pinned: Collection[str], output: OutputFormat
) -> Group:
    """A group's alternatives: the bits that the format holds all its modules in."""
    own = {module: schemes[module.weights[0]] for module in modules}
    costs: dict[int, int] = {}
    for bits in BITS:
        settled = {m: s if m.name in pinned else replace(s, bits=bits) for m, s in own.items()}
        if all(_holds(output, module, scheme) for module, scheme in settled.items()):
            costs[bits] = sum(_stored(output, module, scheme) for module, scheme in settled.items())
    settled_here = frozenset(module.name for module in modules if module.name in pinned)
    if len(settled_here) == len(modules):
        costs = dict(list(costs.items())[:1])
    return Group(modules, settled_here, tuple(costs), tuple(costs.values()))


def _holds(output: OutputFormat, module: Module, scheme: QuantScheme) -> bool:
    try:
        output.row.check(module.shape, scheme)
    except ValueError:
        return False
    return True


def _stored(output: OutputFormat, module: Module, scheme: QuantScheme) -> int:
    """Bytes of a module's planes."""
    rows, columns = module.shape
    groups = (rows, scheme.groups(columns))
    planes = output.row.specs(
        QuantizedWeight(
            codes=torch.zeros(1, 1, dtype=torch.uint8).expand(rows, columns),
            scales=torch.ones(1, 1, dtype=torch.float16).expand(groups),
            zeros=torch.zeros(1, 1, dtype=torch.uint8).expand(groups),
            scheme=scheme,
            g_idx=torch.zeros(columns, dtype=torch.int32) if scheme.act_order else None,
        )
    )
    return sum(prod(shape) * BY_SAFETENSORS[dtype].nbytes for dtype, shape in planes.values())


def _rest(checkpoint: Checkpoint, selection: Selection) -> int:
    """Bytes of what is stored beside the modules: at 16 bits, with a file's headers."""
    modules = {f"{module.name}.weight" for module in selection.modules}
    dense = [name for name in checkpoint.names() if name not in modules]
    headers = _HEADER_BYTES * (len(dense) + 4 * len(modules))
    return sum(2 * prod(checkpoint.describe(name).shape) for name in dense) + headers


def _measured(group: Group) -> tuple[int, ...]:
    return tuple(bits for bits in group.bits if bits in _MEASURED) or group.bits[:1]


def _options(index: int, group: Group, losses: Mapping[tuple[int, int], float]) -> list[Option]:
    """What the bits of a group cost and lose; bits that were not measured as the nearest fewer ones that were."""
    if len(group.bits) == 1:
        return [Option(group.costs[0], 0.0)]
    options = []
    for bits, cost in zip(group.bits, group.costs, strict=True):
        near = max((b for b in group.bits if b <= bits and (index, b) in losses), default=group.bits[0])
        options.append(Option(cost, losses[index, near] * _step_ratio(near, bits) ** 2))
    return options


def _step_ratio(fewer: int, more: int) -> float:
    """The step of a grid of more bits over that of fewer, on the same range."""
    return float((2**fewer - 1) / (2**more - 1))


def _candidate(group: Group, bits: int, schemes: Mapping[str, QuantScheme]) -> Candidate:
    rounded = {
        name: schemes[name] if module.name in group.pinned else replace(schemes[name], bits=bits)
        for module in group.modules
        for name in module.weights
    }
    return Candidate(group.modules[0].layer, rounded)


def _affordable(graph: Graph, candidates: Sequence[Candidate]) -> int:
    """How many tokens are measured on."""
    macs = dict.fromkeys(range(-1, graph.num_layers + 1), 0)
    for op in graph.products():
        macs[op.layer] += multiplications(graph, op)
    a_token = sum(sum(n for layer, n in macs.items() if layer >= candidate.layer) for candidate in candidates)
    return min(max(int(_MAX_WORK / max(a_token, 1)), _MIN_TOKENS), _MAX_TOKENS)


def _up(value: float) -> float:
    """Two digits after the point, rounded up."""
    return math.ceil(value * 100 - 1e-9) / 100


def _up_to_kib(size: int) -> str:
    return f"{-(-size // 2**20)}MiB" if size >= 100 * 2**20 else f"{-(-size // 2**10)}KiB"
