"""scripts/gpu_check.sh where there is no GPU: it says so; its cases launch what the kernels take; its report."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmctl.targets.cuda.call import Call
from llmctl.targets.cuda.launch import missing_device
from llmctl.targets.cuda.signatures import SIGNATURES

SCRIPTS = Path(__file__).parents[3] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases, targets, check = script("gpu_cases"), script("gpu_targets"), script("gpu_check")
experts = script("gpu_expert_cases")


class Recorder:
    """A machine that only notes its calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def launch(self, call: Call) -> None:
        self.calls.append(call)

    def call_torch(self, function: object, *arguments: object, **named: object) -> None:
        pass


@pytest.mark.skipif(missing_device() is None, reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    command = [str(SCRIPTS / "gpu_check.sh"), "--output", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == check.NO_GPU
    assert done.stderr == f"gpu_check: no usable GPU: {missing_device()}\n"
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_every_case_launches_what_its_kernel_takes() -> None:
    made = {}
    for case in (*cases.all_cases(), *experts.expert_cases()):
        key = case.kernel, case.shape, case.rows
        assert key not in made
        machine = Recorder()
        prepared = case.make(machine, "meta")
        prepared.run(prepared.copies - 1)
        made[key] = [call.entry for call in machine.calls]
        assert made[key], key
        assert case.nbytes > 0
        assert all(call.geometry.shared <= 227 * 1024 for call in machine.calls)
    assert {rows for kernel, _, rows in made if kernel == "w4a16"} == set(cases.ROWS)
    launched = {SIGNATURES[entry].source for entries in made.values() for entry in entries}
    assert {
        "w4a16_stream.cu",
        "w4a16_gemm.cu",
        "book4a16_stream.cu",
        "book4a16_gemm.cu",
        "fp8a16_stream.cu",
        "fp8a16_gemm.cu",
        "k4a16_stream.cu",
        "k4a16_gemm.cu",
        "k8a16_stream.cu",
        "k8a16_gemm.cu",
        "w8a8_gemm.cu",
        "attention_decode_d128.cu",
        "norm.cu",
        "lora.cu",
    } <= launched


def test_inputs_rotate_over_more_than_a_cache() -> None:
    assert cases.copies_of(2**30) == 1
    assert cases.copies_of(2**24) * 2**24 >= cases.ROTATE_BYTES
    assert cases.copies_of(1) == 64


def test_errors_are_relative_and_never_hidden() -> None:
    exact = torch.tensor([1.0, -4.0])
    assert cases.nothing_lost(torch.tensor([1.0, -3.0]), exact) == pytest.approx(0.25)
    assert cases.nothing_lost(torch.tensor([1.0, torch.nan]), exact) == float("inf")


def test_report(tmp_path: Path) -> None:
    rows = [check.Row("w4a16", "Llama-3-8B down", 1, 10.0, 0.01, 3000, 0.7, 12, 0.02, 1e-3, {"cuBLAS bf16": 40.0})]
    check.write_report(tmp_path, rows, {"device": "a GPU"})
    text = (tmp_path / "gpu_check.md").read_text()
    assert (
        "| w4a16 | Llama-3-8B down | 1 | 10.00 | 1.0% | 3000 | 70% | 12.0 | 2% | 1.0e-03 | 4.00× cuBLAS bf16 (40.0) |"
        in text
    )
    assert json.loads((tmp_path / "gpu_check.json").read_text())["rows"][0]["others"] == {"cuBLAS bf16": 40.0}


def test_targets_judge_the_worst_row() -> None:
    def row(kernel: str, shape: str, rows: int, us: float, share: float, **others: float) -> object:
        return check.Row(
            kernel, shape, rows, us, 0.0, 0, share, 0, 0, None, {k.replace("_", " "): v for k, v in others.items()}
        )

    down = "Llama-3-8B down 4096x14336"
    found = targets.judge(
        [
            row("w4a16", down, 1, 10.0, 0.81, cuBLAS_bf16=40.0),
            row("w4a16", down, 16, 12.0, 0.7, cuBLAS_bf16=40.0),
            row("w4a16", down, 4096, 900.0, 0.1, cuBLAS_bf16=800.0),
            row("attention decode", "Llama-3-8B 32/8 heads, 32 x 8192, bfloat16", 32, 1.0, 0.9),
        ]
    )
    assert [verdict.reached for verdict in found] == [True, False, True, False, True, None, None]
    assert found[1].found.startswith("1.20 at w4a16")
    assert all(verdict.target.expected for verdict in found)


def test_targets_name_shapes_that_are_measured() -> None:
    rows = [
        check.Row(c.kernel, c.shape, c.rows, 1.0, 0, 0, 1.0, 0, 0, None, {"cuBLAS bf16": 9.0, "torch SDPA": 9.0})
        for c in cases.all_cases()
    ]
    assert all(verdict.reached for verdict in targets.judge(rows))
