"""The tensors that adapters are held against, out of a graph: those of the checkpoint, whatever passes did."""

from __future__ import annotations

import pytest
from family_models import CASES, family_model

from llmctl.checkpoint.adapters.base_tensors import base_tensors
from llmctl.graph.lora import insert_lora
from llmctl.graph.passes import apply_passes

EVERY_TIME = ("llama", "phi3", "gpt2")


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c, marks=() if c in EVERY_TIME else pytest.mark.slow) for c in CASES]
)
def test_names_and_shapes_are_the_checkpoints(case: str) -> None:
    model = family_model(case)
    stored = {name: tuple(model.checkpoint.describe(name).shape) for name in model.checkpoint.names()}
    attention = next(op for op in model.graph.linears()).weights[0]
    module = model.graph.weights[attention].parts[0].tensor.removesuffix(".weight")
    fused = apply_passes(model.graph)
    for graph in (model.graph, fused, insert_lora(fused, [module], 4)):
        found = base_tensors(graph)
        head = f"{found.head}.weight"
        shapes = {name: found.stored_shape(name) for name in found.shapes}
        assert {name: shape for name, shape in shapes.items() if name in stored} == stored
        assert shapes.keys() - stored.keys() <= {head}
        assert all(f"{table}.weight" in stored for table in found.tables)
