"""Memory of rounding to nearest: a layer, its calibration activations and 1.5 GB, whatever the model's size."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from fixtures import make_tokenizer
from random_models import CALIBRATION_TEXT

from llmctl.checkpoint.safetensors_io import tensor_spec, write_safetensors
from llmctl.graph.families import build_graph

LAYERS, SAMPLES, LENGTH = 2, 8, 128
SHAPE = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": LAYERS,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048, "dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
CHILD = """
import json, sys
from llmctl.config import QuantizeConfig
from llmctl.quantize.driver import quantize_checkpoint
quantize_checkpoint(QuantizeConfig(**json.loads(sys.argv[1])))
print(open("/proc/self/status").read())
"""


def write_7b(folder: Path) -> None:
    """A Llama of 7 billion weights, but for its depth and vocabulary."""
    config = {**SHAPE, "vocab_size": make_tokenizer(folder)}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for weight in build_graph(config).weights.values():
        value = torch.empty(weight.shape, dtype=torch.bfloat16)
        tensors[weight.parts[0].tensor] = value.fill_(1) if value.ndim == 1 else value.normal_(std=0.02)
    write_safetensors(folder / "model.safetensors", {name: tensor_spec(value) for name, value in tensors.items()})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_layer_is_in_memory(tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    model.mkdir()
    write_7b(model)
    text.write_text(CALIBRATION_TEXT * 20)
    options = {"model": str(model), "output": str(tmp_path / "out"), "method": "rtn", "calib": str(text)}
    options |= {"calib_samples": SAMPLES, "calib_length": LENGTH}  # type: ignore[dict-item]
    found = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(options)], capture_output=True, text=True, check=True
    ).stdout
    # VmHWM, not ru_maxrss: that begins with the peak of whoever started the process.
    peak = 1024 * next(int(line.split()[1]) for line in found.splitlines() if line.startswith("VmHWM"))
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    layer = 4 * prod((hidden, 4 * hidden + 3 * inner))  # type: ignore[operator]
    activations = 4 * SAMPLES * LENGTH * (2 * hidden + inner)  # type: ignore[operator]
    assert peak <= layer + activations + 1.5e9
