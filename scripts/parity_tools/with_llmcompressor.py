"""llm-compressor: makes compressed-tensors checkpoints; loads them through transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tool import main, save_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

_MADE = {
    "ct-w4a16": "W4A16",
    "ct-w4a16-asym": "W4A16_ASYM",
    "ct-w8a16": "W8A16",
    "ct-w8a8": "INT8",
    "ct-fp8": "FP8_DYNAMIC",
    "ct-fp8-block": "FP8_BLOCK",
}


def load(folder: Path, output: Path) -> None:
    """The weights of a checkpoint, decompressed."""
    dense = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=dense)
    save_weights(model, output, torch.float32)


def make(kind: str, dense: Path, folder: Path) -> None:
    """A checkpoint by one of its presets, without data."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float16)
    oneshot(
        model=model,
        recipe=QuantizationModifier(targets="Linear", scheme=_MADE[kind], ignore=["lm_head"]),
        output_dir=str(folder),
    )
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)


if __name__ == "__main__":
    main(load, make)
