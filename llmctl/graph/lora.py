"""LoRA in a Graph: ops that add low-rank adapters to the results of linears (Hu et al. 2021).

A graph says where adapters may act and how large they may be. Which ones there are, and which token uses which, is the
runtime's, as the KV cache is: an op finds its weights by its name, and a token without an adapter is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llmctl.errors import UsageError
from llmctl.graph.graph import Buffer, Graph, Op, Weight
from llmctl.graph.rewrite import Changes, rewritten


@dataclass(frozen=True)
class _Slice:
    """Rows of a linear that one checkpoint module supplies.

    Attributes:
        output: which output of the linear they become, and ``column`` from where on; ``rows``: how many.
        tensor: what supplies them; ``first_row``: the first of them there.
    """

    output: int
    column: int
    rows: int
    tensor: str
    first_row: int

    @property
    def module(self) -> str:
        """Whose tensor it is."""
        return self.tensor.removesuffix(".weight")

    def targets(self, wanted: frozenset[str]) -> set[str]:
        """Those that name the module."""
        return {target for target in wanted if f".{self.module}".endswith(f".{target}")}


def insert_lora(graph: Graph, targets: Iterable[str] | None, rank: int) -> Graph:
    """A ``lora`` op behind every linear that holds rows of a target.

    May run before or after the passes that fuse, but before ``int8_activations``: adapters read float activations. A
    gated epilogue of a target's linear is taken apart again, because adapters act before the activation.

    Args:
        targets: modules as PEFT's ``target_modules`` names them, by whole name or by last part: ``q_proj``; None: every
            linear before the output head.
        rank: the largest of an adapter.

    Raises:
        UsageError: a target that no linear before the output head holds, or a rank that is not positive.
        ValueError: a linear that takes int8 activations.
    """
    if rank < 1:
        raise UsageError(f"LoRA rank: expected at least 1, found {rank}")
    wanted = frozenset(targets or ())
    body = {op.name for op in _body_linears(graph)}
    changed: Changes = {}
    renamed: dict[str, str] = {}
    buffers: list[Buffer] = []
    found: set[str] = set()
    for op in graph.ops:
        slices = list(_slices(graph, op)) if op.name in body else []
        if targets is not None:
            slices = [s for s in slices if s.targets(wanted)]
        found.update(target for s in slices for target in s.targets(wanted))
        changed[op.name], made, results = _adapted(graph, _reading(op, renamed), slices, rank)
        renamed |= results
        buffers += made
    if wanted - found:
        raise UsageError(f"LoRA targets: no linear of the model's layers holds '{min(wanted - found)}'")
    return rewritten(graph, changed, "lora", buffers)


def _adapted(
    graph: Graph, op: Op, slices: Sequence[_Slice], rank: int
) -> tuple[tuple[Op, ...], list[Buffer], dict[str, str]]:
    """A linear followed by the adapters of its slices, the buffers that are new, and which to read instead of which."""
    if not slices:
        return (op,), [], {}
    if "activations" in op.attrs:
        raise ValueError(f"op '{op.name}' takes int8 activations; insert adapters before int8_activations")
    linear, rest, buffers = _opened(graph, op)
    widths = {name: buffer.width for name, buffer in graph.buffers.items()} | {b.name: b.width for b in buffers}
    results = list(linear.outputs)
    adapters = []
    for s in slices:
        y = results[s.output]
        results[s.output] = name = f"{y}.lora"
        attrs = {"module": s.module, "first_row": s.first_row, "rows": s.rows, "column": s.column, "rank": rank}
        adapters.append(Op("lora", name, (op.inputs[0], y), (name,), (), attrs, op.layer))
        buffers.append(Buffer(name, widths[linear.outputs[s.output]]))
    renamed = dict(zip(linear.outputs, results, strict=True))
    return (linear, *adapters, *(_reading(later, renamed) for later in rest)), buffers, renamed


def _body_linears(graph: Graph) -> Iterator[Op]:
    """Linears over all tokens: those before the rows of the output head are gathered."""
    for op in graph.ops:
        if op.kind == "gather_rows":
            return
        if op.kind == "linear":
            yield op


def weight_rows(graph: Graph, op: Op, weight: Weight) -> Iterator[tuple[str, int]]:
    """(tensor of the checkpoint, the row that what a linear takes of it ends before), a weight's or a bias's parts."""
    return ((s.tensor, s.first_row + s.rows) for s in _placed(weight, _columns(graph, op, weight)))


def _slices(graph: Graph, op: Op) -> list[_Slice]:
    """What of a linear comes from which module."""
    weight = graph.weights[op.weights[0]]
    return list(_placed(weight, _columns(graph, op, weight)))


def _columns(graph: Graph, op: Op, weight: Weight) -> list[tuple[int, int, int]]:
    """Runs of a linear's columns (output, first, how many); of a gated one, opened, gate and up lie in one output."""
    widths = [graph.buffers[buffer].width for buffer in op.outputs]
    if "epilogue" in op.attrs:
        return [(0, 0, widths[0]), (0, widths[0], widths[0])]
    whole = [part for part in weight.parts if part.rows is None]
    if len(widths) == 1 and len(whole) > 1:  # opened before: gate and up are as wide as one another
        share = widths[0] // len(whole)
        return [(0, i * share, share) for i in range(len(whole))]
    return [(i, 0, width) for i, width in enumerate(widths)]


def _placed(weight: Weight, columns: Sequence[tuple[int, int, int]]) -> Iterator[_Slice]:
    """Slices of a weight's rows, each as far as one run of columns (output, first, how many) and one part reach."""
    parts = iter(weight.parts)
    tensor, first, left = "", 0, 0
    for output, column, width in columns:
        done = 0
        while done < width:
            if left == 0:
                part = next(parts)
                tensor = part.tensor
                # A part without a range is a whole tensor, and that is one linear's.
                first, end = part.rows or (0, width)
                left = end - first
            rows = min(left, width - done)
            yield _Slice(output, column + done, rows, tensor, first)
            done, first, left = done + rows, first + rows, left - rows


def _opened(graph: Graph, op: Op) -> tuple[Op, tuple[Op, ...], list[Buffer]]:
    """(linear, what follows it, new buffers): a gated linear as the product of all its rows, and the gating."""
    epilogue = op.attrs.get("epilogue")
    if not epilogue:
        return op, (), []
    both = Buffer(f"{op.name}.gate_up", 2 * graph.buffers[op.outputs[0]].width)
    attrs = {name: value for name, value in op.attrs.items() if name != "epilogue"}
    gating = Op(
        "act_mul", f"{op.name}.act", (both.name,), op.outputs, (), {"fn": epilogue.removesuffix("_mul")}, op.layer
    )
    return op.with_(outputs=(both.name,), attrs=attrs), (gating,), [both]


def _reading(op: Op, renamed: dict[str, str]) -> Op:
    return op.with_(inputs=tuple(renamed.get(name, name) for name in op.inputs))
