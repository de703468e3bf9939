"""transformers: loads all that it has a reader for; makes bitsandbytes' checkpoints, which are saved by it."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch
from tool import main, save_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, CompressedTensorsConfig

_MADE = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


def load(folder: Path, output: Path) -> None:
    """The weights of a checkpoint, a GGUF file's dequantized by transformers itself."""
    extra, dtype = {}, torch.float32
    if files := sorted(folder.glob("*.gguf")):
        extra = {"gguf_file": files[0].name}
    elif '"compressed-tensors"' in (folder / "config.json").read_text():
        # Its weights are decoded in the dtype of their scales, whatever is asked for.
        extra, dtype = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}, torch.float16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **extra)
    save_weights(model, output, dtype, _of_bitsandbytes)


def _of_bitsandbytes(module: nn.Module) -> Tensor | None:
    """Its linears multiply in bfloat16 on some processors, or quantize what comes in."""
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).half()
    return None


def make(kind: str, dense: Path, folder: Path) -> None:
    """A checkpoint quantized by bitsandbytes."""
    settings = BitsAndBytesConfig(**_MADE[kind])
    model = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float16, device_map="cpu", quantization_config=settings
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)


if __name__ == "__main__":
    main(load, make)
