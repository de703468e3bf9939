"""The tools and their pinned versions, and the kinds of checkpoints that pass between them and llmctl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peers.contest import Install

SCRIPTS = Path(__file__).resolve().parent.parent / "parity_tools"

_RTN = ("quantize", "--method", "rtn", "--group-size", "128")
OURS: Mapping[str, tuple[str, ...]] = {
    "awq-4": (*_RTN, "--format", "awq", "--asymmetric"),
    "gptq-4": (*_RTN, "--format", "gptq", "--symmetric"),
    "gptq-4-act-order": (
        *("quantize", "--method", "gptq", "--group-size", "128", "--symmetric", "--no-static-groups"),
        *("--calib-samples", "2", "--calib-length", "32"),
    ),
    "gptq-4-asym": (*_RTN, "--format", "gptq_v2", "--asymmetric"),
    "gptq-8": (*_RTN, "--bits", "8", "--format", "gptq", "--symmetric"),
    "ct-w4a16": (*_RTN, "--format", "compressed-tensors", "--symmetric"),
    "ct-w4a16-asym": (*_RTN, "--format", "compressed-tensors", "--asymmetric"),
    "ct-w8a16": (*_RTN, "--bits", "8", "--format", "compressed-tensors", "--symmetric"),
    "ct-w8a8": (
        *("quantize", "--method", "rtn", "--bits", "8", "--group-size", "-1", "--symmetric"),
        *("--format", "compressed-tensors-w8a8"),
    ),
    "ct-fp8": ("quantize", "--method", "fp8"),
    "nf4": ("quantize", "--method", "nf4"),
    "nf4-double": ("quantize", "--method", "nf4", "--format", "bitsandbytes-double"),
    "gguf-q4_0": ("quantize", "--method", "rtn", "--group-size", "32", "--format", "gguf"),
    "gguf-q8_0": ("quantize", "--method", "rtn", "--bits", "8", "--group-size", "32", "--format", "gguf"),
}
"""The command that makes a kind of ours from the dense checkpoint; it gets ``--model`` and ``--output``."""
_CT = tuple(kind for kind in OURS if kind.startswith("ct-"))


@dataclass(frozen=True)
class Tool:
    """A tool that reads or writes checkpoints.

    Attributes:
        script: what is run in its environment, a file in ``scripts/parity_tools``.
        groups: what is installed, one ``pip install`` each; shown: distributions whose versions are reported.
        loads: kinds of ``OURS`` that it is given.
        makes: kinds that it makes, by its script's names.
        environment: variables of the installation.
    """

    name: str
    script: str
    groups: tuple[tuple[str, ...], ...]
    shown: tuple[str, ...]
    loads: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Of its script."""
        return SCRIPTS / self.script

    @property
    def install(self) -> Install:
        """Its environment."""
        return Install(self.name, self.groups, self.shown, environment=self.environment)


_TORCH = ("torch==2.13.0", "setuptools", "wheel")
TOOLS = (
    Tool(
        "transformers",
        "with_transformers.py",
        (
            _TORCH,
            (
                "transformers==5.23.0",
                "accelerate==1.15.0",
                "compressed-tensors==0.20.0",
                "bitsandbytes==0.50.2",
                "gguf==0.19.0",
            ),
        ),
        ("transformers", "bitsandbytes", "compressed-tensors", "gguf"),
        (*_CT, "nf4", "nf4-double", "gguf-q4_0", "gguf-q8_0"),
        ("nf4", "nf4-double", "fp4", "int8"),
    ),
    Tool(
        "gptqmodel",
        "with_gptqmodel.py",
        (_TORCH, ("--no-build-isolation", "gptqmodel==7.6.0")),
        ("gptqmodel", "transformers"),
        ("gptq-4", "gptq-4-act-order", "gptq-4-asym", "gptq-8", "awq-4"),
        ("gptq-4", "gptq-4-act-order", "gptq-8"),
    ),
    Tool(
        "autoawq",
        "with_autoawq.py",
        (_TORCH, ("--no-build-isolation", "autoawq==0.2.9", "transformers==4.51.3")),
        ("autoawq", "transformers"),
        ("awq-4",),
        ("awq-4",),
    ),
    Tool(
        "llmcompressor",
        "with_llmcompressor.py",
        (_TORCH, ("llmcompressor==0.14.0.1",)),
        ("llmcompressor", "compressed-tensors", "transformers"),
        _CT,
        ("ct-w4a16", "ct-w4a16-asym", "ct-w8a16", "ct-w8a8", "ct-fp8", "ct-fp8-block"),
    ),
)
