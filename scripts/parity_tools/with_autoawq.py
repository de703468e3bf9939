"""AutoAWQ: loads and makes AWQ checkpoints, with its own packing and its own dequantization.

Its searching needs a GPU, so what it makes is rounded to nearest
by its quantizer and packed by its linear.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from awq.modules.linear import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from tool import main
from torch import Tensor, nn

_BITS, _GROUP = 4, 128


def load(folder: Path, output: Path) -> None:
    """The weights of a checkpoint in its GEMM layout."""
    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = {}
    for name in tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            planes = (tensors[f"{module}.{plane}"] for plane in ("qweight", "qzeros", "scales"))
            found[module] = dequantize_gemm(*planes, settings["bits"], settings["group_size"]).T.contiguous()
    save_file(found, output)


def make(kind: str, dense: Path, folder: Path) -> None:
    """A checkpoint in its GEMM layout."""
    assert kind == "awq-4"
    tensors = {name: t for path in sorted(dense.glob("*.safetensors")) for name, t in load_file(path).items()}
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        made |= _packed(module, tensor) if module.endswith("_proj") else {name: tensor}
    folder.mkdir()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": _BITS,
        "group_size": _GROUP,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for path in dense.glob("*token*"):
        shutil.copyfile(path, folder / path.name)


def _packed(module: str, weight: Tensor) -> dict[str, Tensor]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    groups = weight.float().reshape(-1, _GROUP)
    # AwqQuantizer.pseudo_quantize_tensor, with a zero point.
    high, low = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
    scales = ((high - low).clamp(min=1e-5) / (2**_BITS - 1)).half().float()
    zeros = (-torch.round(low / scales)).clamp(0, 2**_BITS - 1)
    codes = (torch.round(groups / scales) + zeros).clamp(0, 2**_BITS - 1)
    linear.weight.data = ((codes - zeros) * scales).reshape(weight.shape)
    shape = (weight.shape[0], -1)
    packed = WQLinear_GEMM.from_linear(
        linear,
        w_bit=_BITS,
        group_size=_GROUP,
        scales=scales.reshape(shape).T.contiguous(),
        zeros=zeros.reshape(shape).T.contiguous(),
    )
    return {f"{module}.{plane}": getattr(packed, plane).contiguous() for plane in ("qweight", "qzeros", "scales")}


if __name__ == "__main__":
    main(load, make)
