"""GPTQModel: loads and makes GPTQ checkpoints, and loads AWQ's."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it wants two loaders, and on two cores gives itself one worker

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from tool import main, save_weights

_MADE = {
    "gptq-4": {"bits": 4, "group_size": 128, "desc_act": False},
    "gptq-4-act-order": {"bits": 4, "group_size": 128, "desc_act": True},
    "gptq-8": {"bits": 8, "group_size": 32, "desc_act": False},
}


def load(folder: Path, output: Path) -> None:
    """The weights of a checkpoint, through kernels in plain torch."""
    backend = BACKEND.TORCH_AWQ if "awq" in (folder / "config.json").read_text() else BACKEND.TORCH
    model = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16)
    save_weights(model.model, output)


def make(kind: str, dense: Path, folder: Path) -> None:
    """A checkpoint quantized on ids without sense, which is enough for its layout."""
    model = GPTQModel.load(str(dense), QuantizeConfig(**_MADE[kind], device="cpu"))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 1000, (128,), generator=generator).tolist() for _ in range(16)]
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    model.save(str(folder))


if __name__ == "__main__":
    main(load, make)
