"""OpenVINO GenAI's continuous batching (int8, and int4 in groups of 64), behind a thin server of ours."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial
from pathlib import Path

from peers.checkpoints import dense_checkpoint
from peers.contest import Contestant, Install, Launch, PeerError, Setup

_VENV = "openvino"
_FORMATS = {
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--group-size", "64", "--ratio", "1.0", "--sym"),
}


def contestants() -> list[Contestant]:
    """Its two weight formats."""
    return [
        Contestant(
            name=f"openvino-{kind}",
            title=f"OpenVINO GenAI {kind}",
            install=_install,
            prepare=partial(_prepare, kind=kind),
            launch=_launch,
        )
        for kind in _FORMATS
    ]


def _install(setup: Setup) -> Install:
    return Install(
        venv=_VENV,
        groups=((setup.torch,), ("openvino-genai", "optimum-intel[openvino]")),
        shown=("openvino-genai", "openvino", "optimum-intel", "nncf", "transformers"),
        unwanted=("torchvision",),
    )


def export_command(setup: Setup, dense: Path, output: Path, kind: str) -> list[str]:
    """The command that converts a dense checkpoint."""
    return [
        *(setup.binary(_VENV, "optimum-cli"), "export", "openvino", "--model", str(dense)),
        *("--task", "text-generation-with-past", *_FORMATS[kind], str(output)),
    ]


def _prepare(setup: Setup, *, kind: str) -> Path:
    output = setup.models / f"openvino-{kind}"
    if output.exists():
        return output
    dense = dense_checkpoint(setup.model, setup.models / "bf16")
    unfinished = output.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = export_command(setup, dense, unfinished, kind)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        raise PeerError(f"optimum-cli export to {kind} failed: {' '.join(reason)[:300]}")
    unfinished.rename(output)
    return output


def _launch(setup: Setup, model: Path, port: int) -> Launch:
    server = Path(__file__).with_name("ov_server.py")
    return Launch(
        argv=(
            *(setup.binary(_VENV, "python"), str(server), "--model", str(model)),
            *("--port", str(port), "--threads", str(setup.threads)),
        )
    )
