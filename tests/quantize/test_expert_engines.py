"""Quantized mixtures of experts in cpu engines, against the reference runtime over the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_models import write_model
from runtime_stepping import greedy

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.config import BuildConfig, QuantizeConfig
from llmctl.engine.step import Runtime, SequenceSlice, StepPlan
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.targets.cpu.toolchain import find_compiler

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.slow,
]


def scores(runtime: Runtime, tokens: list[int]) -> np.ndarray:
    plan = StepPlan((SequenceSlice("a", tokens[:-1], 0, [0, 1, 2], False, tokens[1:]),))
    return runtime.execute(plan, greedy(0)).result().scores["a"].logprobs


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("method", "bits", "format"),
    [("rtn", 4, "gptq"), ("fp8", None, "auto")],
)
def test_engines_of_quantized_experts(family: str, method: str, bits: int | None, format: str, tmp_path: Path) -> None:
    """In float32; what int8 activations do to a row of an expert, the kernels' own tests say."""
    model = write_model(tmp_path / "model", family)
    size = None if method == "fp8" else 16
    quantize_checkpoint(
        QuantizeConfig(
            model=str(model), output=str(tmp_path / "made"), method=method, bits=bits, group_size=size, format=format
        )
    )
    tokens = np.random.default_rng(2).integers(0, 300, 40).tolist()
    found = {}
    for target in ("reference", "cpu"):
        out = str(tmp_path / target)
        build = BuildConfig(model=str(tmp_path / "made"), target=target, output=out, dtype="float32")
        engine = load_engine(build_engine(build), EngineRequest(kv_cache_bytes=1 << 20, max_num_seqs=2))
        runtime = open_runtime(engine, threads=2)
        found[target] = scores(runtime, tokens)
        runtime.close()
    assert np.abs(found["reference"] - found["cpu"]).max() < 2e-3
    assert found["reference"].std() > 0.5
