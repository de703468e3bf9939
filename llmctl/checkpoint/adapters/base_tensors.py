"""The tensors of the model that an adapter is for: what they are called, their shapes, what they are used as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmctl.graph.family_table import FAMILIES
from llmctl.graph.graph import Graph
from llmctl.graph.lora import weight_rows


@dataclass(frozen=True)
class BaseTensors:
    """Names and shapes, whatever a graph's passes made of them.

    Attributes:
        shapes: tensor -> its shape, [out, in] of a matrix. turned: those that a dense checkpoint stores [in, out].
        tables: modules that are looked up by row. head: the output head's module, whose weight may be the embeddings'.
        prefix: the base model's attribute in the causal model.
    """

    shapes: Mapping[str, tuple[int, ...]]
    turned: frozenset[str]
    tables: frozenset[str]
    head: str
    prefix: str

    def stored_shape(self, tensor: str) -> tuple[int, ...]:
        """As a dense checkpoint has it."""
        return self.shapes[tensor][::-1] if tensor in self.turned else self.shapes[tensor]

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Module -> [out, in], of all that an adapter may act on."""
        ends = ".weight"
        return {name.removesuffix(ends): s for name, s in self.shapes.items() if name.endswith(ends) and len(s) == 2}


def base_tensors(graph: Graph) -> BaseTensors:
    """Those of a graph, before or after its passes."""
    family = FAMILIES[graph.family]
    shapes: dict[str, tuple[int, ...]] = {}
    turned: set[str] = set()
    of_linears: set[str] = set()
    for op in graph.linears():
        for name in filter(None, op.weights):
            weight = graph.weights[name]
            of_linears.add(name)
            for tensor, end in weight_rows(graph, op, weight):
                rows = max(end, shapes.get(tensor, (0,))[0])
                shapes[tensor] = (rows, *weight.shape[1:])
                if family.conv1d and len(weight.shape) == 2 and op.layer < graph.num_layers:
                    turned.add(tensor)
    for name, weight in graph.weights.items():
        for part in () if name in of_linears else weight.parts:
            # Whole tensors that one weight is made of, as a layer's experts are, are all alike.
            rows = part.rows[1] if part.rows else weight.shape[0] // len(weight.parts)
            shapes.setdefault(part.tensor, (rows, *weight.shape[1:]))
    tables = {part.tensor.removesuffix(".weight") for name in graph.tables() for part in graph.weights[name].parts}
    head = family.names.head
    shapes.setdefault(f"{head}.weight", (graph.vocab_size, graph.hidden_size))
    return BaseTensors(shapes, frozenset(turned), frozenset(tables), head, family.base)
