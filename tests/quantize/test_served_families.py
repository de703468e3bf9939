"""Every family quantized, built for cpu and served: greedy tokens of the engine, with several requests under way, equal
those of the reference runtime over the same checkpoint, each request alone.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from family_models import CASES, MORE_CASES, config_of, random_family_model
from fixtures import ServerProcess, make_tokenizer
from random_models import CALIBRATION_TEXT

from llmctl.artifact.builder import build_engine
from llmctl.artifact.start import start_engine
from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.config import BuildConfig, EngineOptions, QuantizeConfig
from llmctl.engine.generate import Completion, generate
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.graph.family_table import FAMILIES
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.targets.reference.weights import checkpoint_runtime
from llmctl.text.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")

EVERY = {**CASES, **MORE_CASES}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
IGNORED = {"gpt_neox": ("lm_head", "query_key_value"), "gpt_neox_serial": ("lm_head", "query_key_value")}
"""Modules that stay dense, where that is more than the head."""
LENGTHS = (3, 29)
"""Of prompts: the longer one goes past the windows, and takes more than one step of ``OPTIONS``."""
OPTIONS = EngineOptions(kv_cache_memory="4MiB", max_num_seqs=4, max_num_batched_tokens=24, threads=1)


@dataclass(frozen=True)
class Quantized:
    """A case's engine folder, prompts, and what the reference runtime makes of each alone."""

    engine: Path
    tokenizer: Tokenizer
    prompts: list[list[int]]
    wanted: list[Completion]


def covering_cases() -> dict[str, str]:
    """The first case of every family, by family."""
    return {config_of(case).model_type: case for case in reversed(EVERY)}


COVERING = covering_cases()
SERVED = [pytest.param(case, "rtn", marks=() if case in COVERING.values() else pytest.mark.slow) for case in EVERY] + [
    pytest.param(case, method, marks=pytest.mark.slow) for method in ("awq", "gptq") for case in EVERY
]


def quantized(case: str, method: str, folder: Path) -> Quantized:
    """The random model of a case, with a tokenizer, quantized, and built for cpu in float32."""
    made, text, name, settings = folder / "made", folder / "calibration.txt", *EVERY[case]
    text.write_text(CALIBRATION_TEXT)
    vocab_size = make_tokenizer(folder / "model")
    source = random_family_model(name, {**settings, "vocab_size": vocab_size}, seed=3).checkpoint.path
    shutil.copytree(source, folder / "model", dirs_exist_ok=True)
    quantize_checkpoint(
        QuantizeConfig(
            model=str(folder / "model"), output=str(made), method=method, bits=4, group_size=-1,
            format="compressed-tensors", calib=str(text), calib_samples=4, calib_length=48,
            ignore=IGNORED.get(case, ("lm_head",)), threads=1,
        )
    )  # fmt: skip
    checkpoint, tokenizer = open_checkpoint(made), Tokenizer.from_folder(made)
    assert any(weight.quant for weight in checkpoint_graph(checkpoint).weights.values())
    engine = build_engine(BuildConfig(model=str(made), target="cpu", output=str(folder / "engine"), dtype="float32"))
    rng = np.random.default_rng(len(case))
    prompts = [rng.integers(10, tokenizer.vocab_size, length).tolist() for length in LENGTHS]
    runtime = checkpoint_runtime(checkpoint, num_blocks=16, max_model_len=64, threads=1)
    reference = LLMEngine(runtime, SchedulerConfig(max_num_seqs=1), ())
    return Quantized(engine, tokenizer, prompts, generate(reference, tokenizer, prompts, GREEDY))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither durable nor tried in a process of its own: half of a tiny engine's time, and other tests' concern."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("llmctl.targets.cpu.target.try_library", lambda *_: None)


def test_every_family_is_served() -> None:
    assert set(COVERING) == set(FAMILIES)


@pytest.mark.parametrize(("case", "method"), SERVED)
def test_quantized_families_generate_what_the_reference_does(case: str, method: str, tmp_path: Path) -> None:
    model = quantized(case, method, tmp_path)
    with closing(start_engine(model.engine, OPTIONS).engine) as engine:
        found = generate(engine, model.tokenizer, model.prompts, GREEDY)
    assert [c.token_ids for c in found] == [c.token_ids for c in model.wanted]
    assert len({c.token_ids for c in found}) == len(LENGTHS)  # the prompts count


@pytest.mark.slow
@pytest.mark.parametrize("case", COVERING.values())
def test_a_server_answers_with_the_reference_s_text(case: str, tmp_path: Path) -> None:
    model = quantized(case, "rtn", tmp_path)
    body = {"model": "m", "max_tokens": GREEDY.max_tokens, "temperature": 0, "ignore_eos": True}
    sizes = ("--kv-cache-memory", "4MiB", "--max-num-batched-tokens", "24", "--max-num-seqs", "4")
    with ServerProcess("--model", str(model.engine), "--served-model-name", "m", "--threads", "1", *sizes) as server:
        server.wait_ready()
        status, answer = server.post("/v1/completions", {**body, "prompt": model.prompts})
    assert status == 200, answer
    assert [choice["text"] for choice in answer["choices"]] == [c.text for c in model.wanted]
