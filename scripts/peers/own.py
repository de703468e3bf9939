"""llmctl itself: quantize, build and serve with the llmctl of this Python."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from peers.contest import Contestant, Launch, PeerError, Setup

LLMCTL = (sys.executable, "-m", "llmctl")


def contestant(
    name: str = "llmctl", *, checkpoint: str | None = None, engine: str | None = None, serve_args: tuple[str, ...] = ()
) -> Contestant:
    """llmctl's server on an engine, on one built from a checkpoint, or by default on AWQ 4-bit weights of the model."""
    source = engine or checkpoint
    label = f" {Path(source).name}" if source else " AWQ 4-bit g64"
    return Contestant(
        name=name,
        title=f"llmctl{label}" if name == "llmctl" else f"{name}{label}",
        install=None,
        prepare=partial(_prepare, name=name, checkpoint=checkpoint, engine=engine),
        launch=partial(_launch, serve_args=serve_args),
    )


def _prepare(setup: Setup, *, name: str, checkpoint: str | None, engine: str | None) -> Path:
    """The engine; always built anew (seconds, kernels cached) so that it is this commit's."""
    if engine is not None:
        return Path(engine)
    quantized = Path(checkpoint) if checkpoint else awq_checkpoint(setup)
    built = setup.models / f"engine-{name}"
    _llmctl("build", "--model", str(quantized), "--target", "cpu", "--output", str(built))
    return built


def awq_checkpoint(setup: Setup) -> Path:
    """The model in AWQ 4-bit groups of 64, quantized by llmctl; made unless it is there."""
    quantized = setup.models / "awq-4bit-g64"
    if not quantized.exists():
        _llmctl(
            *("quantize", "--model", setup.model, "--method", "awq", "--bits", "4", "--group-size", "64"),
            *("--output", str(quantized)),
        )
    return quantized


def _llmctl(*args: str) -> None:
    done = subprocess.run([*LLMCTL, *args], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise PeerError(f"llmctl {args[0]} failed with code {done.returncode}: {' '.join(reason)}")


def _launch(setup: Setup, engine: Path, port: int, *, serve_args: tuple[str, ...]) -> Launch:
    argv = (
        *(*LLMCTL, "serve", "--model", str(engine), "--host", "127.0.0.1", "--port", str(port)),
        *("--threads", str(setup.threads), "--kv-cache-memory", "512MiB", "--no-enable-prefix-caching"),
        *serve_args,
    )
    return Launch(argv=argv, ready="/ready")
