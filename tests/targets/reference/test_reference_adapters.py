"""Adapters in the slots of a reference runtime: PEFT's own forward pass, within 1e-4 in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import family_model
from peft_adapters import LINEARS, TOKENS, save_adapter

from llmctl.checkpoint.adapters.adapter import Adapter, LowRank
from llmctl.checkpoint.adapters.base_tensors import base_tensors
from llmctl.checkpoint.adapters.reading import read_adapter
from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.engine.step import LoraLimits, SequenceSlice, StepPlan
from llmctl.errors import UnsupportedModelError
from llmctl.graph.passes import apply_passes
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import CheckpointWeights

LORA = LoraLimits(3, 12, 3)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": LINEARS, "rank_pattern": {"q_proj": 2, "down_proj": 11}}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
    "gemma": ("gemma", {"target_modules": "all-linear"}),
}
VARIANT = [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in VARIANTS]


def logits(runtime: ReferenceRuntime, *slots: int) -> list[torch.Tensor]:
    """Of TOKENS with the adapter of each slot, all in one step."""
    blocks = -(-len(TOKENS) // 4)
    pieces = [
        SequenceSlice(str(i), TOKENS, 0, range(blocks * i, blocks * (i + 1)), False, adapter=slot)
        for i, slot in enumerate(slots)
    ]
    return list(runtime.logits(StepPlan(tuple(pieces)), all_rows=True).split(len(TOKENS)))


@pytest.mark.parametrize("name", VARIANT)
def test_slots_compute_what_peft_does(name: str, tmp_path: Path) -> None:
    """Two adapters and none in one batch, over a fused graph; a slot is filled again in the middle."""
    case, settings = VARIANTS[name]
    expected = [save_adapter(tmp_path / str(seed), case, seed, **settings) for seed in (0, 1)]
    checkpoint = family_model(case).checkpoint
    graph = apply_passes(checkpoint_graph(checkpoint))
    weights = CheckpointWeights(graph, checkpoint)
    plain = ReferenceRuntime(graph, weights, num_blocks=16, block_size=4)
    runtime = ReferenceRuntime(graph, weights, num_blocks=16, block_size=4, lora=LORA)
    assert runtime.adapters is not None
    for slot, seed in ((2, 1), (0, 0), (1, 0), (1, 1)):
        adapter = read_adapter(tmp_path / str(seed), graph)
        runtime.adapters.put(slot, runtime.adapters.prepare(adapter))
    (base,) = logits(plain, -1)
    for slot, found in zip((0, -1, 1, 2), logits(runtime, 0, -1, 1, 2), strict=True):
        wanted = base if slot < 0 else expected[0 if slot == 0 else 1]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (expected[0] - base).abs().max() > 0.01
    assert torch.equal(logits(runtime, -1)[0], base)


def test_values_that_the_engines_dtype_does_not_hold_are_refused() -> None:
    checkpoint = family_model("llama").checkpoint
    graph = checkpoint_graph(checkpoint)
    weights = CheckpointWeights(graph, checkpoint)
    runtime = ReferenceRuntime(graph, weights, num_blocks=4, block_size=4, dtype="float16", lora=LORA)
    assert runtime.adapters is not None
    module = "model.layers.0.self_attn.q_proj"
    rows, columns = base_tensors(graph).shapes[f"{module}.weight"]
    part = LowRank(module, torch.full((2, columns), 7e4), torch.ones(rows, 2), 1e-5)
    with pytest.raises(UnsupportedModelError, match=f"'{module}' has values too large for float16"):
        runtime.adapters.prepare(Adapter(Path("a"), (part,)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "acts only when it is merged"),
        ({"target_modules": ["q_proj"], "r": 13}, "expected a rank of at most 12, found 13"),
    ],
)
def test_what_only_a_merge_can_do_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", "llama", **settings)
    checkpoint = family_model("llama").checkpoint
    graph = checkpoint_graph(checkpoint)
    runtime = ReferenceRuntime(graph, CheckpointWeights(graph, checkpoint), num_blocks=4, block_size=4, lora=LORA)
    assert runtime.adapters is not None
    with pytest.raises(UnsupportedModelError, match=said):
        runtime.adapters.prepare(read_adapter(tmp_path / "a", graph))
