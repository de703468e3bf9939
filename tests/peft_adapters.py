"""Adapters that PEFT makes of the tiny models of ``family_models``: random weights, saved, and what PEFT computes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from family_models import VOCAB, family_model

from llmctl.checkpoint.reader import Checkpoint
from llmctl.engine.step import SequenceSlice, StepPlan
from llmctl.graph.graph import Graph
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import CheckpointWeights

TOKENS = torch.randint(VOCAB, (11,), generator=torch.Generator().manual_seed(3)).tolist()
LINEARS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def save_adapter(folder: Path, case: str, seed: int = 0, **settings: Any) -> torch.Tensor:
    """Save an adapter of random weights for the model of a case; PEFT's logits with it, f32 [T, vocab], of ``TOKENS``.

    Args:
        settings: of ``LoraConfig``; a rank of 4 unless they say.
    """
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(family_model(case).model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **settings})).eval()
        rng = torch.Generator().manual_seed(seed)
        for parameter in made.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=rng)
                # Whole tensors and norms stay near what they were; products start as nothing.
                parameter.data.add_(noise * (0.3 * parameter.shape[-1] ** -0.5))
        made.save_pretrained(str(folder))
    with torch.no_grad():
        return made(torch.tensor([TOKENS])).logits[0]


def logits(graph: Graph, checkpoint: Checkpoint) -> torch.Tensor:
    """Of the reference runtime in float32, f32 [T, vocab], of ``TOKENS``."""
    return run(ReferenceRuntime(graph, CheckpointWeights(graph, checkpoint), num_blocks=4, block_size=4))


def run(runtime: ReferenceRuntime) -> torch.Tensor:
    """All rows of one sequence."""
    return runtime.logits(StepPlan((SequenceSlice("s", TOKENS, 0, [0, 1, 2], True),)), all_rows=True)
