"""What is said when a model does not fit: only what helps, and each thing said does help. No device is needed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from llmctl.artifact.fit import advice, quantized
from llmctl.artifact.memory import Sizing
from llmctl.artifact.memory_table import memory_document, memory_rows, render
from llmctl.artifact.plan import plan_build
from llmctl.artifact.request import EngineRequest
from llmctl.config import BuildConfig
from llmctl.targets.cuda import target as cuda
from llmctl.targets.cuda.device import CudaDevice

MIB = 2**20


@pytest.fixture
def sizing(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Sizing:
    """A dense model for a GPU of which a test says how much memory it has; small steps, so that the KV cache counts."""
    monkeypatch.setattr(cuda, "CONTEXT_BYTES", MIB // 8)
    config = BuildConfig(model=str(checkpoints["dense"]), target="cuda:sm_90")
    request = EngineRequest(max_num_batched_tokens=8, max_num_seqs=32)
    return replace(plan_build(config).sizing, request=request)


@pytest.fixture
def gptq(checkpoints: dict[str, Path], sizing: Sizing) -> Sizing:
    config = BuildConfig(model=str(checkpoints["gptq"]), target="cuda:sm_90")
    return replace(plan_build(config).sizing, request=sizing.request)


def on_gpu(monkeypatch: pytest.MonkeyPatch, memory: int, held: int = 0) -> None:
    monkeypatch.setattr(cuda, "cuda_device", lambda: CudaDevice((9, 0), (13, 0), memory))
    monkeypatch.setattr(cuda, "held_bytes", lambda _: held)


def changed(sizing: Sizing, **request: object) -> Sizing:
    return replace(sizing, request=replace(sizing.request, **request))  # type: ignore[arg-type]


def short_by(sizing: Sizing, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose budget is ``size`` bytes less than one longest sequence takes."""
    on_gpu(monkeypatch, 2**40)
    plan = sizing.plan()
    on_gpu(monkeypatch, int((plan.fixed + plan.kv_bytes_of_one - size) / 0.9))
    assert not sizing.plan().fits


def test_the_budget_is_a_share_less_what_others_hold(sizing: Sizing, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, 1000 * MIB, held=100 * MIB)
    assert sizing.plan().budget == 800 * MIB
    assert changed(sizing, gpu_memory_utilization=0.5).plan().budget == 400 * MIB
    assert changed(sizing, gpu_memory_utilization=0.05).plan().budget == 0
    assert "0.9 of the GPU's 1.0 GiB, less 0.1 GiB that others hold" in sizing.plan().budget_source


def test_every_remedy_in_order_and_each_helps(sizing: Sizing, monkeypatch: pytest.MonkeyPatch) -> None:
    short_by(sizing, 1024, monkeypatch)
    said = advice(sizing, "hub/tiny")
    parts = said.split("; or ")
    assert [re.sub(r"[ :].*", "", part) for part in parts] == [
        "quantize", "--kv-cache-dtype", "use", "--max-num-seqs", "--max-num-batched-tokens", "--gpu-memory-utilization"
    ]  # fmt: skip
    assert "(llmctl quantize --model hub/tiny --bits 4 --output tiny-4bit, and then use tiny-4bit)" in parts[0]
    other = quantized(sizing)
    assert other is not None
    assert other.plan().fits
    narrow = replace(sizing, options=replace(sizing.options, kv_cache_dtype="int8")).plan()
    assert narrow.fits
    assert f"(the longest sequence is then {narrow.largest_max_model_len} tokens)" in parts[1]
    for part, option, step in ((parts[2], "max_model_len", 1), (parts[3], "max_num_seqs", 1)):
        number = int(re.findall(r"\d+", part)[0])
        assert changed(sizing, **{option: number}).plan().fits
        assert not changed(sizing, **{option: number + step}).plan().fits
    assert parts[4] == "--max-num-batched-tokens 4 or fewer"
    share = float(parts[5].split()[1])
    assert share > 0.9
    assert changed(sizing, gpu_memory_utilization=share).plan().fits
    assert not changed(sizing, gpu_memory_utilization=share - 0.01).plan().fits


def test_steps_that_are_too_large_are_what_is_to_be_changed(sizing: Sizing, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, 64 * MIB)
    large = changed(sizing, max_num_batched_tokens=2**20)
    assert not large.plan().fits
    (said,) = advice(large, "tiny").split("; or ")
    tokens = int(re.fullmatch(r"--max-num-batched-tokens (\d+) or fewer", said)[1])  # type: ignore[index]
    assert changed(sizing, max_num_batched_tokens=tokens).plan().fits
    assert not changed(sizing, max_num_batched_tokens=2 * tokens).plan().fits
    assert "--max-num-batched-tokens" not in advice(large, "tiny", running=False)


def test_a_build_has_no_options_of_a_run(sizing: Sizing, monkeypatch: pytest.MonkeyPatch) -> None:
    short_by(sizing, 1024, monkeypatch)
    said = advice(sizing, "tiny", running=False)
    assert "--max-model-len" in said
    assert "--max-num-seqs" not in said
    assert "--gpu-memory-utilization" not in said


def test_what_does_not_help_is_not_said(gptq: Sizing, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = replace(gptq, options=replace(gptq.options, kv_cache_dtype="fp8_e4m3"))
    on_gpu(monkeypatch, 2**40)
    plan = narrow.plan()
    on_gpu(monkeypatch, plan.fixed + plan.block_size * plan.kv_per_token, held=0)
    full = changed(narrow, gpu_memory_utilization=1.0, max_num_seqs=1, max_num_batched_tokens=32)
    assert "quantize" not in advice(full, "tiny")
    assert "--kv-cache-dtype" not in advice(full, "tiny")
    assert "--max-num-seqs" not in advice(full, "tiny")
    assert "--gpu-memory-utilization" not in advice(full, "tiny")
    assert advice(full, "tiny").startswith("use --max-model-len ")
    on_gpu(monkeypatch, 1)
    assert advice(narrow, "tiny").startswith("free memory, or use a smaller model: the weights and activations alone")


def test_quantizing_may_be_the_first_step(sizing: Sizing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the weights alone do not fit, and 4-bit ones leave room for a shorter sequence."""
    on_gpu(monkeypatch, 2**40)
    other = quantized(sizing)
    assert other is not None
    small = other.plan()
    on_gpu(monkeypatch, int((small.fixed + 10 * small.block_size * small.kv_per_token) / 0.9) + 1)
    assert sizing.plan().largest_max_model_len == 0
    assert advice(sizing, "tiny").split("; or ")[0].endswith("tiny-4bit, with --max-model-len 160)")


def test_a_given_budget_is_not_the_gpus(sizing: Sizing, monkeypatch: pytest.MonkeyPatch) -> None:
    short_by(sizing, 1024, monkeypatch)
    fixed = changed(sizing, budget=sizing.plan().budget)
    assert "--gpu-memory-utilization" not in advice(fixed, "tiny")


def test_the_table_beside_the_same_model_unquantized(gptq: Sizing, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, 4 * MIB)
    plan = gptq.plan()
    document = memory_document(gptq, plan)
    dense = document["unquantized"]
    assert dense["weights_bytes"] > document["weights_bytes"]
    assert dense["total_bytes"] <= document["memory_budget_bytes"]
    assert 0 < dense["kv_tokens"] < document["kv_tokens"]
    assert document["sequences_of_max_model_len"] == pytest.approx(plan.kv_tokens / plan.max_model_len, abs=0.01)
    fewer = replace(plan, num_blocks=3)  # as a runtime that measured would report
    rows = {row[0].strip(): row[1:] for row in memory_rows(gptq, fewer)}
    assert rows["memory"] == ["this engine", "not quantized, float16"]
    assert rows["tokens of it"] == ["48", "48"]
    assert rows["device context, an allowance"] == ["128.0 KiB", "128.0 KiB"]
    on_gpu(monkeypatch, MIB // 4)
    rows = {row[0].strip(): row[1:] for row in memory_rows(gptq, gptq.plan())}
    assert rows["KV cache, float16"][-1] == "none"


def test_a_dense_model_has_nothing_beside_it(sizing: Sizing, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, 2**34)
    plan = sizing.plan()
    assert all(len(row) == 2 for row in memory_rows(sizing, plan))
    assert "unquantized" not in memory_document(sizing, plan)


def test_the_table_fits_80_columns(gptq: Sizing, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    on_gpu(monkeypatch, 2**37)
    wide = changed(gptq, max_num_batched_tokens=16384, max_num_seqs=1024)
    console = Console(width=80)
    with console.capture() as caught:
        console.print(render(memory_rows(wide, wide.plan()), note="budget: somewhere"))
    lines = caught.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.strip().startswith("activations, 16384 tokens a step ") for line in lines)
    assert "budget: somewhere" in caught.get()
