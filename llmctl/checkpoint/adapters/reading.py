"""Read a PEFT adapter for a model, and account for every tensor and setting of it."""

from __future__ import annotations

from pathlib import Path

from llmctl.checkpoint.adapters.adapter import Adapter
from llmctl.graph.graph import Graph


def read_adapter(folder: Path, graph: Graph, base: str = "") -> Adapter:
    """The adapter in a folder (``adapter_config.json``, ``adapter_model.safetensors``), for a model.

    Args:
        graph: of the model, before or after its passes.
        base: what the model is called; an adapter that names another is noted. "": nothing is compared.

    Raises:
        ModelNotFoundError: no adapter there.
        CheckpointError: damaged, or not for this model: shapes, missing or superfluous tensors, values that are not
            finite.
        UnsupportedModelError: pickle weights, another method than LoRA, a setting that is not read.
    """
    raise NotImplementedError
