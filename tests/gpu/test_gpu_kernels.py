"""Every emulated test of the CUDA kernels, with its parameters, on a real device."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import device_kernels
import pytest

from llmctl.targets.cuda.launch import missing_device

EMULATION = Path(__file__).parent.parent / "targets" / "cuda" / "emulation"
# Of the emulator itself, of what only it can see, and of tables that no device is needed for.
NOT_HERE = ("test_emulator", "test_signatures", "test_attention_mutants", "test_gemm_mutants", "test_kernel_mutants",
            "test_runtime_mutants")  # fmt: skip
MODULES = sorted(path.stem for path in EMULATION.glob("test_*.py") if path.stem not in NOT_HERE)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing_device() is not None, reason=str(missing_device()))]


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels come from the device wherever the emulated tests and their helpers ask for emulated ones."""
    for module in list(sys.modules.values()):
        if Path(getattr(module, "__file__", None) or "/").parent == EMULATION and module.__name__ != "emulator":
            for name in ("kernels", "kernels_from_text"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, getattr(device_kernels, name))
            for cached in ("_module", "_kernels"):
                getattr(getattr(module, cached, None), "cache_clear", lambda: None)()
    yield
    for module in map(sys.modules.get, MODULES):
        getattr(getattr(module, "_module", None), "cache_clear", lambda: None)()


def _adopt() -> None:
    """Bring the tests in, each under its own name and its module's."""
    for stem in MODULES:
        for name, value in vars(importlib.import_module(stem)).items():
            if name.startswith("test_") and callable(value):
                globals()[f"{name}__{stem.removeprefix('test_')}"] = value


_adopt()


def test_there_are_tests_of_every_kernel_file() -> None:
    sources = {"norm", "rope_kv", "elementwise", "sampling", "logits", "quantize_rows", "attention_decode", "gemm_tile",
               "experts"}  # fmt: skip
    found = {name.partition("__")[2].removesuffix("_kernels") for name in globals() if name.startswith("test_")}
    assert sources <= found
