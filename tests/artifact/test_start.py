"""An engine folder runs as its checkpoint does, or says why this version cannot run it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.fake_runtime import FakeRuntime
from tiny_checkpoint import VOCAB, write_dense, write_gptq

from llmctl.artifact.builder import build_engine
from llmctl.artifact.describe import describe_model
from llmctl.artifact.loader import LoadedEngine, load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime, start_engine
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.config import BuildConfig, EngineOptions
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import SequenceSlice, StepPlan
from llmctl.errors import DeviceError, DeviceMemoryError, EngineLoadError, ExitCode, MissingPackageError, UsageError
from llmctl.targets.cpu import target as cpu
from llmctl.targets.cpu.toolchain import VARIANTS, find_compiler
from llmctl.targets.cuda import target as cuda
from llmctl.targets.cuda.device import CudaDevice
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import checkpoint_runtime

PLAN = StepPlan((SequenceSlice("a", np.random.default_rng(0).integers(0, VOCAB, 20).tolist(), 0, [2, 0], True),))


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["dense", "asymmetric 4-bit", "symmetric 3-bit", "8-bit"])
def test_an_engine_runs_as_its_checkpoint_does(
    kind: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Target ``reference``, and ``cpu`` where no compiler was found at build time."""
    monkeypatch.setattr("llmctl.targets.cpu.target.find_compiler", lambda: None)
    folder = tmp_path / "checkpoint"
    if kind == "dense":
        write_dense(folder)
    else:
        bits = {"asymmetric 4-bit": 4, "symmetric 3-bit": 3, "8-bit": 8}[kind]
        write_gptq(folder, bits=bits, symmetric=bits == 3)
    config = BuildConfig(model=str(folder), output=str(tmp_path / "engine"), target=target, dtype="float32")
    engine = load_engine(build_engine(config), EngineRequest(kv_cache_bytes=2**20))
    runtime = open_runtime(engine)
    assert isinstance(runtime, ReferenceRuntime)
    assert runtime.limits.num_blocks == engine.plan.num_blocks
    assert runtime.limits.max_model_len == engine.sizes.max_model_len
    expected = checkpoint_runtime(open_checkpoint(folder), num_blocks=4)
    torch.testing.assert_close(runtime.logits(PLAN), expected.logits(PLAN), atol=1e-5, rtol=1e-5)


def test_an_engine_of_several_variants_runs_whichever_of_them_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--target`` asks what the engine is for; what of that this CPU runs is the target's business."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    write_dense(tmp_path / "checkpoint")
    config = BuildConfig(str(tmp_path / "checkpoint"), str(tmp_path / "engine"), target="cpu:avx512bf16,avx2")
    engine = build_engine(config)
    monkeypatch.setattr(cpu, "supported_variants", lambda _: [v for v in VARIANTS if v.name.endswith("avx2")])
    started = start_engine(engine, EngineOptions(target="cpu:avx512bf16", kv_cache_memory="1MiB"))
    assert started.engine.runtime.variant == "avx2"


def test_adapters_without_torch_are_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackageError, match="--enable-lora needs PyTorch, which is not installed"):
        start_engine(Path("nowhere"), EngineOptions(enable_lora=True))


@pytest.fixture
def cuda_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cuda engine without modules (all torch's), on a machine whose GPU and runtime are faked."""
    write_dense(tmp_path / "checkpoint")
    config = BuildConfig(str(tmp_path / "checkpoint"), str(tmp_path / "engine"), target="cuda:sm_90")
    monkeypatch.setattr(cuda.CudaTarget, "compile", lambda *_, **__: [])
    monkeypatch.setattr(cuda.CudaTarget, "source_hashes", lambda *_: {})
    monkeypatch.setattr(cuda, "cuda_device", lambda: CudaDevice((9, 0), (13, 0), 2**34))
    monkeypatch.setattr(cuda, "held_bytes", lambda _: 0)
    monkeypatch.setattr(cuda, "missing_here", lambda _: None)
    return build_engine(config)


class Opened(FakeRuntime):
    """What ``open_cuda_runtime`` gives; remembers what it was opened from."""

    def __init__(self, engine: LoadedEngine) -> None:
        super().__init__(num_blocks=engine.sizes.num_blocks - 1)
        self.engine = engine


def with_runtime(monkeypatch: pytest.MonkeyPatch, opened: Callable[[LoadedEngine], object]) -> None:
    module = types.ModuleType("llmctl.targets.cuda.opening")
    module.open_cuda_runtime = opened  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_cuda_engine_is_opened_with_what_was_asked(cuda_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtime(monkeypatch, Opened)
    options = EngineOptions(kv_cache_dtype="fp8", enforce_eager=True, gpu_memory_utilization=0.5, target="cuda")
    engine = start_engine(cuda_engine, options).engine
    sizes = engine.runtime.engine.sizes
    assert (sizes.enforce_eager, sizes.gpu_memory_utilization) == (True, 0.5)
    assert (sizes.max_num_batched_tokens, sizes.max_num_seqs) == (2048, 256)
    assert engine.scheduler.config.max_num_batched_tokens == 2048
    assert engine.runtime.engine.options.kv_cache_dtype == "fp8_e4m3"
    plain = start_engine(cuda_engine, EngineOptions(max_num_seqs=3)).engine
    sizes = plain.runtime.engine.sizes
    assert (sizes.enforce_eager, sizes.gpu_memory_utilization) == (False, 0.9)
    assert (plain.scheduler.config.max_num_seqs, plain.scheduler.config.max_num_batched_tokens) == (3, 2048)
    assert plain.runtime.engine.options.kv_cache_dtype == "float16"


def test_what_fails_on_the_way_in_is_one_line(cuda_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: LoadedEngine) -> object:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with_runtime(monkeypatch, full)
    with pytest.raises(DeviceMemoryError, match="nvidia-smi lists it"):
        start_engine(cuda_engine, EngineOptions())
    monkeypatch.setattr(cuda, "missing_here", lambda _: "cupy is not installed")
    with pytest.raises(DeviceError, match="target cuda:sm_90: cupy is not installed") as caught:
        start_engine(cuda_engine, EngineOptions())
    assert caught.value.exit_code == ExitCode.RUNTIME


def test_inspect_says_whether_it_runs_here(cuda_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_model(str(cuda_engine))["runs_here"] == "yes"
    monkeypatch.setattr(cuda, "missing_here", lambda _: "cupy is not installed")
    assert describe_model(str(cuda_engine))["runs_here"] == "no: --target cuda:sm_90: cupy is not installed"


def test_a_cuda_engine_without_a_gpu(cuda_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_device", lambda: None)
    with pytest.raises(EngineLoadError, match="expected an NVIDIA device and driver, found none") as caught:
        start_engine(cuda_engine, EngineOptions())
    assert "--target cpu" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization: expected a share above 0 and up to 1, found 1.5"),
        ({"gpu_memory_utilization": 0.0}, "expected a share above 0"),
        ({"kv_cache_dtype": "int3"}, "--kv-cache-dtype: expected one of auto, float32, .* fp8, found 'int3'"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype: expected one of auto, float32, float16, bfloat16 for a refere"),
    ],
)
def test_an_option_that_means_nothing_is_refused(tmp_path: Path, options: dict[str, object], said: str) -> None:
    write_dense(tmp_path / "checkpoint")
    config = BuildConfig(str(tmp_path / "checkpoint"), str(tmp_path / "engine"), target="reference")
    with pytest.raises(UsageError, match=said):
        start_engine(build_engine(config), EngineOptions(**options))  # type: ignore[arg-type]


def test_threads_are_not_a_gpus(cuda_engine: Path) -> None:
    with pytest.raises(UsageError, match=r"--threads 1: .* found cuda:sm_90"):
        start_engine(cuda_engine, EngineOptions(threads=1))


def test_a_cache_that_is_baked_in(tmp_path: Path) -> None:
    write_dense(tmp_path / "checkpoint")
    config = BuildConfig(str(tmp_path / "checkpoint"), str(tmp_path / "engine"), target="reference")
    engine = build_engine(config)
    with pytest.raises(EngineLoadError, match="kv_cache_dtype: expected float32, found bfloat16") as caught:
        start_engine(engine, EngineOptions(kv_cache_dtype="bfloat16"))
    assert "--kv-cache-dtype bfloat16" in str(caught.value.fix)
    assert start_engine(engine, EngineOptions(kv_cache_dtype="float32")).loaded.options.kv_cache_dtype == "float32"


def test_a_cpu_engine_runs_with_any_cache(tmp_path: Path) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    write_dense(tmp_path / "checkpoint")
    engine = build_engine(BuildConfig(str(tmp_path / "checkpoint"), str(tmp_path / "engine")))
    sizes = {
        dtype: start_engine(engine, EngineOptions(kv_cache_dtype=dtype, kv_cache_memory="1MiB")).engine.runtime
        for dtype in ("auto", "int8", "float32")
    }
    blocks = {dtype: runtime.limits.num_blocks for dtype, runtime in sizes.items()}
    assert blocks["float32"] < blocks["auto"] < blocks["int8"]
    assert all(runtime.kv_bytes <= 2**20 for runtime in sizes.values())
    for runtime in sizes.values():
        runtime.close()
    built = build_engine(BuildConfig(str(tmp_path / "checkpoint"), str(tmp_path / "int8"), kv_cache_dtype="int8"))
    runs = (built, EngineOptions()), (engine, EngineOptions(kv_cache_dtype="int8")), (engine, EngineOptions())
    expected, switched, plain = (top_logprobs(start_engine(*run).engine) for run in runs)
    assert switched == expected  # bit for bit as an engine that was built so
    assert switched != plain


def top_logprobs(engine: LLMEngine) -> list[object]:
    """The log-probabilities of a greedy answer."""
    engine.add_request(Request("a", list(range(20)), SamplingParams(temperature=0, max_tokens=8, logprobs=5)))
    found: list[object] = []
    while engine.has_unfinished():
        found += [output.logprobs for output in engine.step()]
    engine.close()
    return found


def test_what_a_target_passes_over_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_dense(tmp_path / "checkpoint")
    config = BuildConfig(str(tmp_path / "checkpoint"), str(tmp_path / "engine"), target="reference")
    engine = build_engine(config)
    start_engine(engine, EngineOptions())
    assert "no effect" not in capfd.readouterr().err
    start_engine(engine, EngineOptions(gpu_memory_utilization=0.8, enforce_eager=True))
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "--gpu-memory-utilization 0.8 has no effect on an engine for reference: it takes no GPU's memory; "
        "--kv-cache-memory sizes its KV cache",
        "--enforce-eager has no effect on an engine for reference: it records no steps",
    ]
