"""What passes are written with: who writes and reads each buffer, and the graph with some ops replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from llmctl.graph.graph import INPUT_IDS, POSITIONS, Buffer, Graph, Op

Changes = dict[str, Op | tuple[Op, ...] | None]
"""Op name -> what stands in its place; None: nothing."""


class Flow:
    """Who writes and reads each buffer."""

    def __init__(self, graph: Graph) -> None:
        self.index = {op.name: i for i, op in enumerate(graph.ops)}
        self.producer = {out: op for op in graph.ops for out in op.outputs}
        self.uses = Counter(buffer for op in graph.ops for buffer in op.inputs)
        self.weight_uses = Counter(weight for op in graph.ops for weight in op.weights)
        self.consumers: dict[str, list[str]] = {}
        for op in graph.ops:
            for buffer in op.inputs:
                self.consumers.setdefault(buffer, []).append(op.name)


def rewritten(
    graph: Graph, changed: Mapping[str, Op | tuple[Op, ...] | None], pass_name: str, buffers: Iterable[Buffer] = ()
) -> Graph:
    """The graph with ops replaced, and without the buffers and weights that nothing uses any more.

    Args:
        buffers: new ones that the replacements write.
    """
    kept = tuple(op for old in graph.ops for op in _as_ops(changed.get(old.name, old)))
    alive = {INPUT_IDS, POSITIONS, *(name for op in kept for name in (*op.inputs, *op.outputs))}
    used = dict.fromkeys(name for op in kept for name in op.weights if name)
    known = {**graph.buffers, **{buffer.name: buffer for buffer in buffers}}
    return replace(
        graph,
        ops=kept,
        buffers={name: buffer for name, buffer in known.items() if name in alive},
        weights={name: graph.weights[name] for name in used},
        passes=(*graph.passes, pass_name),
    )


def _as_ops(found: Op | tuple[Op, ...] | None) -> tuple[Op, ...]:
    if found is None:
        return ()
    return (found,) if isinstance(found, Op) else found
