"""An engine folder runs as its checkpoint does, or says why this version cannot run it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import VOCAB, write_dense, write_gptq

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.manifest import MANIFEST_NAME, manifest_to_bytes
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime, start_engine
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.config import BuildConfig, EngineConfig
from llmctl.engine.step import SequenceSlice, StepPlan
from llmctl.errors import EngineLoadError, UsageError
from llmctl.targets.base import TargetName
from llmctl.targets.cpu import target as cpu
from llmctl.targets.cpu.toolchain import VARIANTS, find_compiler
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
    started = start_engine(engine, EngineConfig(target="cpu:avx512bf16", kv_cache_memory="1MiB"))
    assert started.engine.runtime.variant == "avx2"


def test_a_cuda_engine_has_no_runtime_here(tmp_path: Path) -> None:
    write_dense(tmp_path / "checkpoint")
    config = BuildConfig(str(tmp_path / "checkpoint"), str(tmp_path / "engine"), target="reference")
    engine = load_engine(build_engine(config))
    with pytest.raises(UsageError, match="--target cuda:sm_90: this version builds cuda engines but has no runtime"):
        start_engine(engine.path, EngineConfig(target="cuda:sm_90"))
    foreign = replace(engine, manifest=replace(engine.manifest, target=TargetName("cuda", ("sm_90",))))
    (engine.path / MANIFEST_NAME).write_bytes(manifest_to_bytes(foreign.manifest))
    for run in (lambda: open_runtime(foreign), lambda: start_engine(engine.path, EngineConfig())):
        with pytest.raises(EngineLoadError, match="target cuda:sm_90: this version builds cuda engines but") as caught:
            run()
        assert "--target cpu" in str(caught.value.fix)
