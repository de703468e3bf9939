"""Adapters inserted into a graph: where, under which names, and with the results of weights they are merged into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from family_models import VOCAB, family_model

from llmctl.engine.step import SequenceSlice, StepPlan
from llmctl.errors import UsageError
from llmctl.graph.check import check_graph
from llmctl.graph.graph import Graph, Op
from llmctl.graph.lora import insert_lora
from llmctl.graph.passes import apply_passes
from llmctl.graph.serial import graph_from_dict, graph_to_dict
from llmctl.targets.cuda.target import CUDA_PASSES
from llmctl.targets.reference.kernels import AdapterWeights
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import CheckpointWeights

RANK = 4
SCALES = (0.5, 2.0)
SEQUENCES = 3
LLAMA = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
TARGETS = {
    "llama": LLAMA,
    "phi": ("q_proj", "k_proj", "fc1", "fc2"),
    "gpt2": ("c_attn", "c_proj"),
    "qwen3": LLAMA,
    "gpt_neox": ("query_key_value", "dense"),
}


def loras(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if op.kind == "lora"]


def adapters_of(module: str, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two adapters of a whole module: A [2, rank, columns], B [2, rows and more, rank]."""
    rng = torch.Generator().manual_seed(sum(module.encode()))
    return (
        torch.randn(2, RANK, columns, generator=rng) * columns**-0.5,
        torch.randn(2, 400, RANK, generator=rng) * 0.2,
    )


def weights_of(graph: Graph) -> dict[str, AdapterWeights]:
    """What a runtime would load, by op."""
    found = {}
    for op in loras(graph):
        a, b = adapters_of(op.attrs["module"], graph.buffers[op.inputs[0]].width)
        first = op.attrs["first_row"]
        rows = slice(first, first + op.attrs["rows"])
        found[op.name] = AdapterWeights(a, b[:, rows].contiguous(), torch.tensor(SCALES))
    return found


class Merged(dict[str, Any]):
    """Dense weights of a plain graph with an adapter merged into its targets."""

    def __init__(self, graph: Graph, case: str, adapter: int) -> None:
        super().__init__()
        source = CheckpointWeights(graph, family_model(case).checkpoint)
        for name, weight in graph.weights.items():
            self[name] = source[name].float()
            module = weight.parts[0].tensor.removesuffix(".weight")
            if adapter < 0 or len(weight.shape) != 2 or module.rpartition(".")[2] not in TARGETS[case]:
                continue
            a, b = adapters_of(module, weight.shape[1])
            rows = torch.cat([torch.arange(*(part.rows or (0, weight.shape[0]))) for part in weight.parts])
            self[name] = self[name] + SCALES[adapter] * b[adapter, rows] @ a[adapter]


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n).tolist() for n in (9, 1, 14)]


def logits(runtime: ReferenceRuntime, which: Sequence[int]) -> torch.Tensor:
    """All rows of some of the prompts in one step."""
    blocks = [[1, 4, 2], [7], [3, 0, 5, 6]]
    slices = tuple(SequenceSlice(str(i), prompts()[i], 0, blocks[i], True) for i in which)
    return runtime.logits(StepPlan(slices), all_rows=True)


def choose_adapters(runtime: ReferenceRuntime, graph: Graph, chosen: Sequence[int]) -> None:
    """Every step's sequences use the chosen adapters, in order."""
    runtime.interpreter.adapters.update(weights_of(graph))
    plain = runtime.interpreter.context

    def context(batch: Any, *places: Any) -> Any:
        made = plain(batch, *places)
        made.adapters = torch.from_numpy(np.repeat(chosen, np.diff(batch.query_start_loc))).int()
        return made

    runtime.interpreter.context = context  # type: ignore[method-assign]


def runtime_of(graph: Graph, weights: Any) -> ReferenceRuntime:
    return ReferenceRuntime(graph, weights, num_blocks=8, block_size=4)


@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize("order", ["before", "after", "between"])
def test_a_batch_of_adapters_gives_what_merged_weights_give(case: str, order: str) -> None:
    plain = family_model(case).graph
    before, after = {
        "before": ((), CUDA_PASSES),
        "after": (CUDA_PASSES, ()),
        "between": (CUDA_PASSES[:2], CUDA_PASSES),
    }[order]
    graph = apply_passes(insert_lora(apply_passes(plain, before), TARGETS[case], RANK), after)
    check_graph(graph)
    assert graph_from_dict(graph_to_dict(graph)) == graph
    chosen = (1, -1, 0)
    runtime = runtime_of(graph, CheckpointWeights(graph, family_model(case).checkpoint))
    choose_adapters(runtime, graph, chosen)
    found = logits(runtime, range(SEQUENCES))
    expected = [logits(runtime_of(plain, Merged(plain, case, chosen[i])), [i]) for i in range(SEQUENCES)]
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-4)
    unadapted = logits(runtime_of(plain, Merged(plain, case, -1)), range(SEQUENCES))
    assert (found - unadapted).abs().amax(1)[[0, -1]].min() > 1e-3


def test_places_of_a_llama() -> None:
    graph = insert_lora(apply_passes(family_model("llama").graph, CUDA_PASSES), LLAMA, 8)
    assert [op.kind for op in graph.layer_ops(1)] == [
        "linear", "lora", "lora", "rope_kv_write", "attention", "linear", "lora", "add_rms_norm", "linear", "lora",
        "act_mul", "linear", "lora", "add_rms_norm",
    ]  # fmt: skip
    modules = [(op.attrs["module"], op.attrs["first_row"]) for op in loras(graph) if op.layer == 1]
    names = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert modules == [(f"model.layers.1.{name}", 0) for name in names]
    assert {op.attrs["rank"] for op in loras(graph)} == {8}


def test_one_module_of_one_layer_and_slices_of_a_stored_tensor() -> None:
    whole = insert_lora(family_model("llama").graph, ["model.layers.2.mlp.up_proj"], 8)
    assert [op.attrs["module"] for op in loras(whole)] == ["model.layers.2.mlp.up_proj"]
    sliced = insert_lora(apply_passes(family_model("gpt2").graph), ["c_attn"], 8)
    assert [op.attrs["first_row"] for op in loras(sliced) if op.layer == 0] == [0, 60, 120]


def test_what_cannot_be() -> None:
    plain = family_model("llama").graph
    with pytest.raises(UsageError, match="no linear of the model's layers holds 'lm_head'"):
        insert_lora(plain, ["q_proj", "lm_head"], 8)
    with pytest.raises(UsageError, match="expected at least 1, found 0"):
        insert_lora(plain, ["q_proj"], 0)
