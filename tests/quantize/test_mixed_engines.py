"""Checkpoints whose linears differ, as engines: what runs is what was written."""

from pathlib import Path

import numpy as np
import pytest
from random_models import random_tokens, write_model
from scored_texts import scores
from typer.testing import CliRunner

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.cli.main import app
from llmctl.config import BuildConfig, QuantizeConfig
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.targets.reference.weights import checkpoint_runtime

MIXED = (
    "*.down_proj:bits=8",
    "layers.0.self_attn:bits=3,group-size=64",
    "layers.1.v_proj:bits=8",
    "o_proj:bits=16",
    "layers.1.up_proj:bits=16",
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    model = write_model(root / "model", "llama", num_key_value_heads=4, intermediate_size=128)
    quantize_checkpoint(
        QuantizeConfig(model=str(model), output=str(root / "mixed"), method="rtn", group_size=32, override=MIXED)
    )
    return root / "mixed"


@pytest.mark.parametrize(
    ("target", "dtype", "within"),
    [
        ("reference", "float32", 1e-5),
        pytest.param("cpu", "float32", 1e-4, marks=pytest.mark.slow),
        pytest.param("cpu", "bfloat16", 0.1, marks=pytest.mark.slow),
    ],
)
def test_an_engine_of_them_computes_with_what_was_written(
    target: str, dtype: str, within: float, mixed: Path, tmp_path: Path
) -> None:
    if target == "cpu" and find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    path = tmp_path / "engine"
    build_engine(BuildConfig(model=str(mixed), target=target, output=str(path), dtype=dtype, eval_text="none"))
    engine = load_engine(path, EngineRequest(kv_cache_bytes=4 << 20, max_num_seqs=4))
    tokens = random_tokens(3, 40, 90)
    found = scores(open_runtime(engine), tokens)
    wanted = scores(checkpoint_runtime(open_checkpoint(mixed), num_blocks=16, max_model_len=64), tokens)
    assert np.abs(found - wanted).mean() < within
    merged = {op.name for op in engine.graph.linears()}
    assert {"layers.0.qkv_proj", "layers.0.gate_up_proj", "layers.1.v_proj", "layers.1.up_proj"} <= merged


def test_inspect_counts_the_schemes(mixed: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(mixed)])
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.replace("│", " ").split())
    assert "1 weights of 3 bits, symmetric, a row" in said
    assert "stored as" not in said
    assert "weights of 8 bits, symmetric, groups of 32" in said
