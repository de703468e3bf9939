"""LoRA adapters of ``tiny_checkpoint``'s model, written by hand as PEFT writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny_checkpoint import linear_shapes

from llmctl.checkpoint.safetensors_io import write_safetensors

RANK = 4
Tensors = dict[str, np.ndarray]


def settings(**changes: Any) -> dict[str, Any]:
    """adapter_config.json, changed."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"],
        "base_model_name_or_path": "org/tiny", "init_lora_weights": True, "peft_version": "0.21.2", **changes,
    }  # fmt: skip


def products(*names: str, rank: int = RANK) -> Tensors:
    """lora_A and lora_B of every linear whose name ends so."""
    rng = np.random.default_rng(0)
    found = {}
    for module, (rows, columns) in linear_shapes().items():
        if module.rpartition(".")[2] in names:
            found[f"base_model.model.{module}.lora_A.weight"] = rng.normal(size=(rank, columns)).astype(np.float32)
            found[f"base_model.model.{module}.lora_B.weight"] = rng.normal(size=(rows, rank)).astype(np.float32)
    return found


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """The folder, with both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    codes = {"float32": "F32", "float16": "F16", "int8": "I8", "float64": "F64"}
    write_safetensors(
        folder / "adapter_model.safetensors", {n: (codes[str(t.dtype)], t.shape, t) for n, t in tensors.items()}
    )
    return folder
