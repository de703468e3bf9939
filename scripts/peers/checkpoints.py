"""The model as other engines take it: a dense bf16 Hugging Face folder, and a W8A8 ``compressed-tensors`` one."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.checkpoint.folder import published_folder
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.resolve import resolve_model
from llmctl.checkpoint.safetensors_io import TensorSpec, write_sharded
from peers.contest import PeerError

if TYPE_CHECKING:
    from torch import Tensor

_INT8_MAX = 127

W8A8_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
            "output_activations": None,
        }
    },
}
"""One scale for an output channel of a weight; activations quantized by token as they come."""


def dense_checkpoint(model: str, output: Path) -> Path:
    """``output`` as a bf16 Hugging Face folder of a dense model; made unless it is there."""
    return _export(model, output, _dense_specs, None)


def w8a8_checkpoint(model: str, output: Path) -> Path:
    """``output`` with int8 linears (head and embeddings bf16), rounded to nearest; made unless it is there."""
    return _export(model, output, _w8a8_specs, W8A8_CONFIG)


Specs = Callable[[Checkpoint], dict[str, TensorSpec]]


def _export(model: str, output: Path, specs: Specs, quantization: dict[str, Any] | None) -> Path:
    if output.exists():
        return output
    source = open_checkpoint(resolve_model(model), widen=True)
    if source.quantization is not None:
        raise PeerError(f"--model {model}: expected a dense checkpoint or a .gguf file, found {source.quantization}")
    config = {**source.config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    if quantization is not None:
        config["quantization_config"] = quantization
    with published_folder(output) as folder:
        write_sharded(folder, specs(source))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, content in source.aux_files().items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
    return output


def _dense_specs(source: Checkpoint) -> dict[str, TensorSpec]:
    return {name: _dense_spec(source, name) for name in source.names() if not _tied_head(source, name)}


def _w8a8_specs(source: Checkpoint) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name, spec in _dense_specs(source).items():
        if not name.endswith("proj.weight"):
            specs[name] = spec
            continue
        rows, columns = spec[1]
        codes = functools.partial(lambda name: quantize_channels(_load(source, name))[0], name)
        scales = functools.partial(lambda name: quantize_channels(_load(source, name))[1], name)
        specs[name] = ("I8", (rows, columns), codes)
        specs[f"{name}_scale"] = ("F32", (rows, 1), scales)
    return specs


def _tied_head(source: Checkpoint, name: str) -> bool:
    return name == "lm_head.weight" and bool(source.config.get("tie_word_embeddings"))


def _dense_spec(source: Checkpoint, name: str) -> TensorSpec:
    return ("BF16", source.describe(name).shape, functools.partial(_bf16, source, name))


def _load(source: Checkpoint, name: str) -> Tensor:
    weight = source.weight(name)
    if isinstance(weight, QuantizedWeight):
        raise PeerError(f"{source.path}: expected dense weights, found '{name}' quantized")
    return weight.float()


def _bf16(source: Checkpoint, name: str) -> Tensor:
    return _load(source, name).bfloat16()


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by output channel, rounded to nearest.

    Args:
        weight: [N, K] float32.

    Returns:
        int8 codes [N, K] in -127..127, and float32 scales [N, 1]; ``codes * scales`` approximates the weight.
    """
    import torch

    scales = (weight.abs().amax(dim=1, keepdim=True) / _INT8_MAX).clamp(min=1e-8)
    codes = torch.round(weight / scales).to(torch.int8)
    return codes, scales
