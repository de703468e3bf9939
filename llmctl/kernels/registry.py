"""Which kernel serves which op on which device, and why the others refused.

A candidate looks at an op's facts and either takes it or gives its reason in one line. The choice and every reason are
recorded in the engine's manifest, so that "why is this layer slow?" has an answer without a debugger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmctl.graph.graph import Graph, Op

FALLBACK = "torch"
"""The kernel name of an op that a runtime executes with torch's own operators."""

_TAG = {"float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Refusal:
    """A candidate that did not take an op, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class KernelChoice:
    """What executes one op.

    Attributes:
        op: the op's name.
        kernel: candidate that took it, or ``FALLBACK``.
        entries: entry points in the compiled module.
        max_rows: rows of input up to which the kernel serves, beyond which ``FALLBACK`` does; 0 means any number.
        refused: the other candidates for this kind of op.
    """

    op: str
    kernel: str
    entries: tuple[str, ...] = ()
    max_rows: int = 0
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class OpFacts:
    """What a candidate may judge by: the op, its graph, activation dtype, and safetensors dtypes of stored planes."""

    op: Op
    graph: Graph
    dtype: str
    planes: Mapping[str, str]


@dataclass(frozen=True)
class Kernel:
    """A candidate. ``refuse`` gives the reason it cannot serve an op, or None; ``entries`` its entry points."""

    name: str
    device: str
    source: str
    kinds: frozenset[str]
    refuse: Callable[[OpFacts], str | None]
    entries: Callable[[OpFacts], tuple[str, ...]]
    max_rows: int = 0


def _refuse_dtype(facts: OpFacts) -> str | None:
    if facts.dtype not in _TAG:
        return f"activations are {facts.dtype}; the kernel takes {' or '.join(_TAG)}"
    return None


def _refuse_norm(facts: OpFacts) -> str | None:
    hidden = facts.graph.weights[facts.op.weights[0]].shape[0]
    if hidden % 8:
        return f"width {hidden} is not a multiple of 8 (one 16-byte load)"
    return _refuse_dtype(facts)


def _refuse_gemv(facts: OpFacts) -> str | None:
    weight = facts.graph.weights[facts.op.weights[0]]
    scheme, columns = weight.quant, weight.shape[1]
    if scheme is None:
        return "the weight is dense; the kernel reads 4-bit codes"
    if scheme.bits != 4:
        return f"the weight has {scheme.bits}-bit codes; the kernel reads 4-bit codes"
    if scheme.act_order:
        return "the weight's groups are in activation order (g_idx)"
    group = columns if scheme.group_size == -1 else scheme.group_size
    if columns % 32 or group % 32 or columns % group:
        return f"{columns} columns in groups of {group}: both must be multiples of 32, and groups must be whole"
    scales = facts.planes.get(f"{weight.name}.scales", "F16")
    if scales != "F16":
        return f"scales are {scales}; the kernel reads F16"
    if "epilogue" in facts.op.attrs:
        return f"epilogue {facts.op.attrs['epilogue']} is not fused in this kernel"
    return _refuse_dtype(facts)


def _norm_entries(facts: OpFacts) -> tuple[str, ...]:
    return (f"{facts.op.kind}_{_TAG[facts.dtype]}",)


def _gemv_entries(facts: OpFacts) -> tuple[str, ...]:
    return tuple(f"w4a16_gemv_{_TAG[facts.dtype]}_m{rows}" for rows in (1, 2, 4, 8))


KERNELS: tuple[Kernel, ...] = (
    Kernel("rms_norm", "cuda", "norm.cu", frozenset({"rms_norm", "add_rms_norm"}), _refuse_norm, _norm_entries),
    Kernel("w4a16_gemv", "cuda", "w4a16_gemv.cu", frozenset({"linear"}), _refuse_gemv, _gemv_entries, max_rows=8),
)


def choose(facts: OpFacts, device: str) -> KernelChoice:
    """The first kernel of ``device`` that takes the op, else ``FALLBACK``, with every refusal before it."""
    refused: list[Refusal] = []
    for kernel in KERNELS:
        if kernel.device != device or facts.op.kind not in kernel.kinds:
            continue
        reason = kernel.refuse(facts)
        if reason is None:
            return KernelChoice(facts.op.name, kernel.name, kernel.entries(facts), kernel.max_rows, tuple(refused))
        refused.append(Refusal(kernel.name, reason))
    return KernelChoice(facts.op.name, FALLBACK, refused=tuple(refused))


def choose_all(graph: Graph, dtype: str, planes: Mapping[str, str], device: str) -> tuple[KernelChoice, ...]:
    """``choose`` for every op of a graph, in execution order."""
    return tuple(choose(OpFacts(op, graph, dtype, planes), device) for op in graph.ops)


def sources_of(choices: tuple[KernelChoice, ...]) -> tuple[str, ...]:
    """Source files that the chosen kernels are compiled from, sorted."""
    chosen = {choice.kernel for choice in choices}
    return tuple(sorted({kernel.source for kernel in KERNELS if kernel.name in chosen}))
