"""What tests of ``scripts/gpu_check.sh --engine`` share: small models, and a run's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine_check import models, right, tiny

SCRIPTS = Path(__file__).parents[2] / "scripts"
W4, BF16 = "Llama-3-8B 4-bit", "Llama-3-8B bf16"
SMALL = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 3000, "head_dim": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
TINY = right.Scale(
    size=tiny.Size(hidden=128, intermediate=192, layers=1, vocab=96, positions=128), prompts=(18, 3, 7), more=3,
    chunk=9, batches=(3, 1, 2), requests=((10, 9), (9, 5), (30, 4)), blocks=4, tokens=32, seqs=3, budget=16,
)  # fmt: skip
LONE = tiny.Heads(2, 1, 64)
VARIANT = tiny.Variant("w4", "float16", "int8", LONE)


def small(kind: str = "4-bit", shape: str = "Llama-3-8B") -> models.Model:
    return models.Model(shape, kind, {**models.SHAPES[shape], **SMALL})


def decode(batch: int, context: int, ms: float, gb_s: float = 2000.0) -> dict[str, Any]:
    found = {"batch": batch, "context": context, "ms": ms, "spread": 0.01, "tok/s": batch / ms * 1e3, "GB": 5.0}
    return {**found, "GB/s": gb_s}


def served(rate: float, first: float, way: str) -> dict[str, Any]:
    return {
        "way": way, "load": "a load", "rounds": 2, "tok/s": rate, "tok/s range": [rate, rate], "TTFT ms": first,
        "TTFT ms range": [first, first], "between tokens ms": 3.0,
    }  # fmt: skip


RESULTS: dict[str, Any] = {
    "rates": {"copy GB/s": 2500.0, "read GB/s": 3000.0, "matmul TFLOP/s": 700.0},
    "right": {"w4 …": {"wrong": [], "wrong in all": 0, "largest error": 0.01, "limit": 0.02}},
    "trial": {"decode": {"4-bit": {"B1 L512": 3.0, "B64 L512": 10.0}}, "prefill": {"4-bit": {"512": 20.0}}},
    "models": {
        W4: {
            "decode": {"B1 L512": decode(1, 512, 3.1), "B64 L512": decode(64, 512, 11.0)},
            "prefill": {
                "8192": {"tokens": 8192, "ms": 300.0, "spread": 0.0, "tok/s": 27000.0, "TFLOP/s": 420.0, "host ms": 2.0}
            },
            "served": {"1": served(280.0, 14.0, "in process"), "64": served(4100.0, 300.0, "in process")},
            "http": {
                "1": served(305.0, 16.0, "over HTTP"), "start to ready s": 3.5, "folder written in s": 20.0,
                "stages of a start s": {"imports": 1.0, "in all": 3.2},
            },
            "gaps": {
                "1": {"in a step": {"busy us": 3050.0, "kernels": 290, "us by kernel": {"k": 900.0}},
                      "engine": {"between steps": 0.01, "idle share": 0.04}},
                "64": {"in a step": {"busy us": 10560.0, "kernels": 290, "us by kernel": {"k": 900.0}},
                       "engine": {"between steps": 0.02, "idle share": 0.04}},
            },
        },
    },
}  # fmt: skip
