"""Random LoRA adapters of any modules: as PEFT's folders, as they are once read, merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from adapter_files import settings, write

if TYPE_CHECKING:
    from llmctl.checkpoint.adapters.adapter import Adapter

Shapes = Mapping[str, tuple[int, int]]
"""[out, in] by module."""


def llama_shapes(hidden: int = 64, layers: int = 2) -> dict[str, tuple[int, int]]:
    """Every linear of the layers of ``fixtures.make_tiny_llama``."""
    kv, inner = hidden // 2, 2 * hidden
    of_layer = {
        **{"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)},
        **{"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)},
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in of_layer.items()}


def random_products(shapes: Shapes, rank: int, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A [rank, in], B [out, rank]) of each module, float32; what they add is about as large as what a linear makes."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        name: (draw(rank, columns) * np.float32(columns**-0.5), draw(rows, rank) * np.float32(rank**-0.5))
        for name, (rows, columns) in shapes.items()
    }


def write_random(folder: Path, shapes: Shapes, rank: int = 4, seed: int = 0, **config: Any) -> Path:
    """An adapter whose scale is 1; the folder."""
    tensors = {}
    for name, (a, b) in random_products(shapes, rank, seed).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    names = sorted({name.rpartition(".")[2] for name in shapes})
    return write(folder, settings(r=rank, lora_alpha=rank, target_modules=names, **config), tensors)


def random_adapter(shapes: Shapes, rank: int, seed: int = 0, scale: float = 1.0) -> Adapter:
    """One as it is read."""
    import torch

    from llmctl.checkpoint.adapters.adapter import Adapter, LowRank

    made = random_products(shapes, rank, seed)
    parts = [LowRank(name, torch.from_numpy(a), torch.from_numpy(b), scale) for name, (a, b) in made.items()]
    return Adapter(Path(f"/adapters/{seed}"), tuple(parts), digest=f"digest {seed}")


def with_products(tensors: Mapping[str, np.ndarray], adapter: Adapter) -> dict[str, np.ndarray]:
    """A checkpoint's tensors with the adapter's products added, float32."""
    found = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    for part in adapter.parts:
        found[f"{part.module}.weight"] += (part.scale * (part.b @ part.a)).numpy()
    return found
