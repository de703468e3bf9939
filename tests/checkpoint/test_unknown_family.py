"""A ``model_type`` that no family has: what it fits is offered, and read on a user's word alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import HIDDEN, LAYERS, dense_tensors, write_arrays

from llmctl.artifact.builder import ensure_engine
from llmctl.artifact.plan import plan_build
from llmctl.checkpoint.assemble import accounted_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.config import BuildConfig, EvalConfig
from llmctl.errors import LlmctlError, UnsupportedModelError, UsageError
from llmctl.evaluate.evaluation import families_of

NEW: dict[str, Any] = {"model_type": "nova", "architectures": ["NovaForCausalLM"]}


def refusal(folder: Path) -> LlmctlError:
    with pytest.raises(UnsupportedModelError, match="model_type 'nova' is not supported") as caught:
        accounted_graph(open_checkpoint(folder))
    return caught.value


def test_a_llama_by_another_name(tmp_path: Path) -> None:
    known, new = write_arrays(tmp_path / "a", dense_tensors()), write_arrays(tmp_path / "b", dense_tensors(), **NEW)
    error = refusal(new)
    assert "is one that llama" in error.message
    assert error.fix == "if its code computes the same: --as llama"
    graph, _ = accounted_graph(open_checkpoint(new, as_family="llama"))
    assert graph == accounted_graph(open_checkpoint(known))[0]


def test_code_of_its_own_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_arrays(tmp_path, dense_tensors(), **NEW, auto_map={"AutoModelForCausalLM": "modeling_nova.Nova"})
    assert "--as llama" in str(refusal(folder).fix)
    accounted_graph(open_checkpoint(folder, as_family="llama"))
    assert not caplog.records


def test_biases_tell_qwen2_from_llama(tmp_path: Path) -> None:
    biases = {
        f"model.layers.{i}.self_attn.{name}_proj.bias": np.ones(width, dtype=np.float16)
        for i in range(LAYERS)
        for name, width in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2))
    }
    error = refusal(write_arrays(tmp_path, {**dense_tensors(), **biases}, **NEW))
    assert "qwen2" in error.message
    assert "llama" not in error.message


@pytest.mark.parametrize(
    ("changes", "dropped"),
    [({"attn_logit_softcapping": 30.0, "nova_gate": 2}, ""), ({}, "model.layers.1.mlp.down_proj.weight")],
)
def test_nothing_is_offered_of_what_is_not_understood(tmp_path: Path, changes: dict[str, Any], dropped: str) -> None:
    tensors = {name: array for name, array in dense_tensors().items() if name != dropped}
    error = refusal(write_arrays(tmp_path, tensors, **NEW, **changes))
    assert "known families: arcee" in error.message
    assert error.fix is None


def test_a_tensor_too_many_fits_nothing(tmp_path: Path) -> None:
    tensors = {**dense_tensors(), "model.layers.0.nova.weight": np.ones((4, 4), dtype=np.float16)}
    assert refusal(write_arrays(tmp_path, tensors, **NEW)).fix is None


@pytest.mark.parametrize(
    ("stored", "family", "message"),
    [
        (NEW, "nova", "--as: expected one of arcee, .* found 'nova'"),
        ({}, "qwen2", "model_type 'llama', which is known"),
    ],
)
def test_what_as_refuses(tmp_path: Path, stored: dict[str, Any], family: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_checkpoint(write_arrays(tmp_path, dense_tensors(), **stored), as_family=family)


def test_as_is_refused_where_it_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="GGUF file"):
        open_checkpoint(file, as_family="llama")
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "engine.json").write_text("{}")
    with pytest.raises(UsageError, match="is an engine"):
        ensure_engine(str(engine), BuildConfig(model=str(engine), as_family="llama"))


def test_eval_reads_those_so_that_are_not_known(tmp_path: Path) -> None:
    known = str(write_arrays(tmp_path / "known", dense_tensors()))
    new = str(write_arrays(tmp_path / "new", dense_tensors(), **NEW))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    for against in ("", known, str(file)):
        assert families_of(EvalConfig(model=new, against=against, as_family="llama")) == ("llama", "")
    assert families_of(EvalConfig(model=known, against=new, as_family="llama")) == ("", "llama")
    assert families_of(EvalConfig(model=new, against=new)) == ("", "")
    with pytest.raises(UsageError, match="of no unknown family"):
        families_of(EvalConfig(model=known, against=str(file), as_family="llama"))


def test_a_plan_is_of_the_family_named(tmp_path: Path) -> None:
    folder = write_arrays(tmp_path, dense_tensors(), **NEW)
    plan = plan_build(BuildConfig(model=str(folder), as_family="llama", target="reference"))
    assert plan.graph.family == "llama"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "nova"
