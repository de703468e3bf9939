"""The measured effect of --lm-head: the engines that are compared are the ones that would be built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
from scored_texts import perplexity

from llmctl.artifact.builder import plan_output
from llmctl.artifact.loader import load_engine
from llmctl.artifact.plan import BuildPlan
from llmctl.artifact.start import open_runtime
from llmctl.artifact.variant import with_options
from llmctl.artifact.writer import write_engine
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.config import BuildConfig
from llmctl.engine.llm_engine import LLMEngine
from llmctl.errors import LlmctlError, UsageError
from llmctl.evaluate.eval_text import read_text
from llmctl.evaluate.perplexity import Protocol, perplexity_of
from llmctl.quantize import heads
from llmctl.targets.base import LM_HEADS
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.text.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")

TEXT = read_text("builtin") or ""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write_gptq(tmp_path_factory.mktemp("heads") / "tiny")


@pytest.fixture(scope="module")
def engine_with(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[BuildPlan, Path]]:
    folder = tmp_path_factory.mktemp("engines")
    made: dict[str, tuple[BuildPlan, Path]] = {}

    def make(lm_head: str) -> tuple[BuildPlan, Path]:
        if lm_head not in made:
            plan = plan_output(
                BuildConfig(model=str(model), target="cpu", lm_head=lm_head, output=str(folder / lm_head))
            )
            write_engine(plan, folder / lm_head)
            made[lm_head] = plan, folder / lm_head
        return made[lm_head]

    return make


def compare(plan: BuildPlan, path: Path, text: str = TEXT) -> heads.HeadComparison:
    found = heads.compare_heads(path, plan, Tokenizer.from_folder(path), text, "builtin")
    assert found is not None
    return found


@pytest.mark.parametrize("lm_head", LM_HEADS)
def test_a_swapped_head_is_the_built_one(engine_with: Callable[[str], tuple[BuildPlan, Path]], lm_head: str) -> None:
    plan, path = engine_with("int8")
    swapped = with_options(load_engine(path), plan, replace(plan.options, lm_head=lm_head))
    built = load_engine(engine_with(lm_head)[1])
    assert swapped.manifest.options == built.manifest.options
    assert set(swapped.weights) == set(built.weights)
    for name, plane in built.weights.items():
        assert (swapped.weights[name].dtype, swapped.weights[name].shape) == (plane.dtype, plane.shape)
        np.testing.assert_array_equal(
            np.asarray(swapped.weights[name].data).reshape(-1).view(np.uint8),
            np.asarray(plane.data).reshape(-1).view(np.uint8),
        )


def test_perplexities_are_those_of_the_built_engines(
    model: Path, engine_with: Callable[[str], tuple[BuildPlan, Path]]
) -> None:
    found = compare(*engine_with("int4"))
    assert found.chosen == "int4"
    assert [h.lm_head for h in found.heads] == list(LM_HEADS)
    windows = Protocol(found.context, found.context).windows(
        Tokenizer.from_folder(model).encode(TEXT, add_special_tokens=False)[: found.tokens]
    )
    for head in found.heads:
        engine = LLMEngine(open_runtime(load_engine(engine_with(head.lm_head)[1])), heads.SchedulerConfig())
        assert perplexity_of(engine, windows) == head.perplexity
        engine.close()
    assert [h.bytes for h in found.heads] == sorted((h.bytes for h in found.heads), reverse=True)
    assert found.change(found.heads[0]) == 0
    exact = perplexity(open_checkpoint(model), TEXT, Protocol(found.context, found.context, found.tokens))
    assert found.heads[0].perplexity == pytest.approx(exact, rel=0.02)


def test_a_large_model_is_measured_on_less_text(
    engine_with: Callable[[str], tuple[BuildPlan, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, path = engine_with("dense")
    weights = sum(np.prod(plan.graph.weights[op.weights[0]].shape) for op in plan.graph.linears())
    monkeypatch.setattr(heads, "_MAX_WORK", float(3 * weights * 100))
    assert compare(plan, path).tokens == 100
    monkeypatch.setattr(heads, "_MAX_WORK", float(3 * weights * 10))
    with pytest.raises(LlmctlError, match="would take minutes"):
        compare(plan, path)


def test_nothing_to_compare(model: Path, tmp_path: Path) -> None:
    for options in ({"dtype": "float32"}, {"target": "reference"}, {"target": "cuda:sm_90"}):
        plan = plan_output(BuildConfig(**{"model": str(model), "output": str(tmp_path / "e"), **options}))
        assert plan.target.lm_heads(plan.graph, plan.options) == ()
        assert heads.compare_heads(tmp_path, plan, Tokenizer.from_folder(model), TEXT, "builtin") is None


def test_texts(engine_with: Callable[[str], tuple[BuildPlan, Path]], tmp_path: Path) -> None:
    assert read_text("none") is None
    assert 400 < len(TEXT.split()) < 800
    (tmp_path / "own.txt").write_text("a text of one's own", encoding="utf-8")
    own = read_text(str(tmp_path / "own.txt"))
    assert own is not None
    assert compare(*engine_with("int8"), own).tokens == len(own)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, reason in (("absent.txt", "No such file"), ("latin.txt", "not UTF-8"), (".", "Is a directory")):
        with pytest.raises(UsageError, match=reason):
            read_text(str(tmp_path / name))
    with pytest.raises(LlmctlError, match="no two tokens"):
        compare(*engine_with("int8"), "x")


def test_ids_beyond_the_model(model: Path, engine_with: Callable[[str], tuple[BuildPlan, Path]]) -> None:
    plan, path = engine_with("int8")

    class Wide(Tokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002
            return [5, tiny_checkpoint.VOCAB]

    wide = Wide.from_folder(model)
    with pytest.raises(LlmctlError, match="the tokenizer gives id 96, the model has 96"):
        heads.compare_heads(path, plan, wide, TEXT, "builtin")
