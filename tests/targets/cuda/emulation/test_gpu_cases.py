"""Cases of scripts/gpu_check.sh, small, under emulation: what they run gives what they expect."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulator import missing
from machine import EmulatedMachine

from llmctl.targets.cuda.layout import CudaFormat

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def _script(name: str) -> ModuleType:
    path = Path(__file__).parents[4] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _script("gpu_cases")
experts = _script("gpu_expert_cases")
_W8 = CudaFormat(8, (64, 128), symmetric=True)
MAKERS = {
    "w4a16": cases._linear_maker(CudaFormat(4, (64, 128), group=64), 3, 2**28),
    "book4a16": cases._linear_maker(CudaFormat(4, (64, 128), group=64, symmetric=True, book="nf4"), 3, 2**28),
    "fp8a16": cases._linear_maker(CudaFormat(8, (64, 128), group=128, symmetric=True, book="fp8_e4m3"), 3, 2**28),
    "k4a16": cases._linear_maker(CudaFormat(4, (64, 128), group=32, minimum=True), 3, 2**28),
    "k8a16": cases._linear_maker(CudaFormat(8, (64, 128), group=16, symmetric=True), 3, 2**28),
    "w8a8": cases._int8_maker(_W8, 3),
    "experts": experts.grouped_maker((4, 48, 64), 3, 2, 16, True),
    "experts w4 gated": experts.grouped_maker((4, 48, 64), 3, 2, 4, True),
    "experts w8 gated": experts.grouped_maker((4, 48, 64), 3, 2, 8, True),
    "experts w8": experts.grouped_maker((4, 40, 136), 3, 2, 8, False),
    "experts nf4 gated": experts.grouped_maker((4, 48, 64), 3, 2, "nf4", True),
    "experts nf4": experts.grouped_maker((4, 40, 136), 3, 2, "nf4", False),
    "experts w4": experts.grouped_maker((4, 40, 136), 3, 2, 4, False),
    "lora": cases._adapter_maker(40, 64, 5, 2, 16),
    "add_rms_norm_s8": cases._int8_norm_maker(3, 256),
    "silu_mul": cases._gated_maker(3, 64),
    "decode": cases._attention_maker(2, 32, 1, 4, 2, torch.bfloat16, 2**28),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_case_runs_and_is_right(name, monkeypatch):
    monkeypatch.setattr(cases, "ROTATE_BYTES", 1)
    torch.manual_seed(0)
    prepared = MAKERS[name](EmulatedMachine(), "cpu")
    assert prepared.copies == 1
    prepared.run(0)
    assert cases.nothing_lost(prepared.result(), prepared.expected(0)) < 0.02
