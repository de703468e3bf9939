"""Every kind of adapter that is read: merged it computes what PEFT's own forward does, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import family_model
from peft_adapters import LINEARS, logits, run, save_adapter

from llmctl.checkpoint.adapters.adapter import Adapter
from llmctl.checkpoint.adapters.merging import Weighted, merged_checkpoint
from llmctl.checkpoint.adapters.reading import read_adapter
from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.reader import Checkpoint
from llmctl.errors import UnsupportedModelError
from llmctl.graph.graph import Graph
from llmctl.graph.lora import insert_lora
from llmctl.graph.passes import apply_passes
from llmctl.targets.reference.kernels import AdapterWeights
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import CheckpointWeights

UNMERGED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": LINEARS}),
    "rslora": ("llama", {"target_modules": LINEARS, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEARS,
            "rank_pattern": {"q_proj": 2, r"layers\.[01]\.mlp\..*": 7, "model.layers.2.mlp.down_proj": 3},
            "alpha_pattern": {"v_proj": 31, "^model.layers.2.self_attn.o_proj": 17},
        },
    ),
    "regex": (
        "llama",
        {"target_modules": r".*\.[12]\..*(q|up)_proj", "exclude_modules": ["model.layers.2.mlp.up_proj"]},
    ),
    "all_linear": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*k_proj"}),
    "some_layers": ("llama", {"target_modules": LINEARS, "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "one_layer": ("llama", {"target_modules": ["up_proj"], "layers_to_transform": 1}),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
    "phi": ("phi", {"target_modules": ["q_proj", "fc1", "fc2", "dense"]}),
    "gemma": ("gemma", {"target_modules": "all-linear"}),
    "mixture": ("qwen3_moe", {"target_modules": ["q_proj", "o_proj"]}),
}
"""Adapters that linears alone carry: case, settings of LoRA."""
MERGED: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embeddings_scaled": ("gemma", {"target_modules": ["embed_tokens"]}),
    "embeddings_tied": ("qwen3", {"target_modules": ["embed_tokens", "v_proj"]}),
    "head_tied": ("qwen3", {"target_modules": ["lm_head"]}),
    "embeddings_gpt2": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "dora": ("llama", {"target_modules": LINEARS, "use_dora": True}),
    "dora_rslora": ("phi3", {"target_modules": ["qkv_proj"], "use_dora": True, "use_rslora": True}),
    "dora_turned": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "dora_embeddings": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "model.norm"]}),
    "saved_mlp": ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["1.mlp"]}),
    "saved_tied": ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved_head_tied": ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved_turned": ("gpt2", {"target_modules": ["c_proj"], "modules_to_save": ["c_attn"]}),
    "biases": ("llama_biases_tied", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "biases_lora_only": ("llama_biases_tied", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
}
"""Adapters that only a merge can honour."""
EVERY_TIME = ("patterns", "dora_turned", "embeddings_tied")


def variants(*tables: dict[str, Any]) -> list[Any]:
    names = [name for table in tables for name in table]
    return [pytest.param(n, id=n, marks=() if n in EVERY_TIME else pytest.mark.slow) for n in names]


def merged(case: str, *adapters: Weighted) -> tuple[Graph, Checkpoint]:
    model = family_model(case)
    checkpoint, _ = merged_checkpoint(model.checkpoint, model.graph, adapters)
    return checkpoint_graph(checkpoint), checkpoint


@pytest.mark.parametrize("name", variants(UNMERGED, MERGED))
def test_merged_it_computes_what_peft_does(name: str, tmp_path: Path) -> None:
    case, settings = {**UNMERGED, **MERGED}[name]
    expected = save_adapter(tmp_path, case, **settings)
    adapter = read_adapter(tmp_path, family_model(case).graph)
    found = logits(*merged(case, Weighted(adapter)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    base = logits(family_model(case).graph, family_model(case).checkpoint)
    assert float((expected - base).abs().max()) > 0.01
    if name in UNMERGED:
        adapter.check_unmerged()
        return
    with pytest.raises(UnsupportedModelError, match="acts only when it is merged"):
        adapter.check_unmerged()


def lora_weights(graph: Graph, adapter: Adapter) -> dict[str, AdapterWeights]:
    """One adapter's, by op; ops without a part of it have zeros."""
    parts = {part.module: part for part in adapter.parts}
    found = {}
    for op in graph.ops:
        if op.kind != "lora":
            continue
        first, count, rank = op.attrs["first_row"], op.attrs["rows"], op.attrs["rank"]
        a = torch.zeros(1, rank, graph.buffers[op.inputs[0]].width)
        b = torch.zeros(1, count, rank)
        part = parts.get(op.attrs["module"])
        if part is not None:
            a[0, : part.rank], b[0, :, : part.rank] = part.a, part.b[first : first + count]
        found[op.name] = AdapterWeights(a, b, torch.tensor([part.scale if part else 0.0]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", UNMERGED)
@pytest.mark.parametrize("after_passes", [False, True])
def test_unmerged_it_computes_what_peft_does(name: str, after_passes: bool, tmp_path: Path) -> None:
    case, settings = UNMERGED[name]
    expected = save_adapter(tmp_path, case, **settings)
    graph = family_model(case).graph
    whole = sorted(part.module for part in read_adapter(tmp_path, graph).parts)
    rank = read_adapter(tmp_path, graph).rank
    graph = insert_lora(apply_passes(graph) if after_passes else graph, whole, rank)
    adapter = read_adapter(tmp_path, graph)
    runtime = ReferenceRuntime(
        graph, CheckpointWeights(graph, family_model(case).checkpoint), num_blocks=4, block_size=4
    )
    runtime.interpreter.adapters.update(lora_weights(graph, adapter))
    plain = runtime.interpreter.context

    def context(batch: Any, *places: Any) -> Any:
        made = plain(batch, *places)
        made.adapters = torch.zeros(len(batch.positions), dtype=torch.int32)
        return made

    runtime.interpreter.context = context  # type: ignore[method-assign]
    torch.testing.assert_close(run(runtime), expected, atol=1e-4, rtol=1e-4)
