"""Layers with a sliding window that let go of blocks, on real models: the same tokens as with whole contexts, whatever
lies in a block that was let go of."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from cuda_model import EmulatedRuntime, emulated_engine, fill_emulated
from emulator import missing
from random_models import write_model
from sliding_blocks import Fill, conversations, outputs, poison_what_is_free

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import LoadedEngine, load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.config import BuildConfig
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import Runtime, SequenceSlice, StepPlan
from llmctl.targets.cpu.runtime import CpuRuntime
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.targets.cuda import target as cuda_target
from llmctl.targets.reference.runtime import ReferenceRuntime

WINDOW, BLOCK, STEP, LENGTH = 20, 16, 24, 400
_SMALL = {"max_position_embeddings": 512, "sliding_window": WINDOW}
_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
_MIXED = {**_SMALL, "num_hidden_layers": 5, "layer_types": _TYPES}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {**_MIXED, "head_dim": 64}),  # CUDA kernels take that; torch attends in the other two
    "olmo3": ("olmo2", {**_MIXED, "model_type": "olmo3"}),
    "cohere2": ("cohere2", _MIXED),
    "mistral": ("mistral", {**_SMALL, "head_dim": 64}),
}
TARGETS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")),
    pytest.param("cuda", marks=[pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]),
]
"""A quick case of cuda is among the emulated tests, which run on GPUs as well (``test_runtime_sliding.py``)."""
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "gemma3"]
_FOLDER = TemporaryDirectory()


@cache
def engine_of(name: str, target: str, dtype: str = "float32") -> Path:
    folder = Path(_FOLDER.name)
    family, changes = MODELS[name]
    (folder / name).mkdir(exist_ok=True)
    model = write_model(folder / name, family, **changes)
    output = folder / f"{name}-{target}-{dtype}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_target, "compile_modules", lambda *_args, **_options: [])  # the emulator has its own
        build_engine(BuildConfig(model=str(model), target=target, output=str(output), dtype=dtype))
    return output


def loaded(name: str, target: str, *, whole_context: bool, dtype: str = "float32", **changes: Any) -> LoadedEngine:
    request = EngineRequest(
        max_model_len=LENGTH, max_num_batched_tokens=STEP, max_num_seqs=4, whole_context=whole_context, **changes
    )
    if target == "cuda":
        target, dtype = "cuda:sm_90", "bfloat16"
    return load_engine(engine_of(name, target, dtype), request, kernels=target != "cuda:sm_90")


def opened(case: LoadedEngine) -> Runtime:
    """Its runtime; that of a cuda engine on the emulator."""
    return emulated_engine(case) if case.target.name.kind == "cuda" else open_runtime(case)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["gemma3", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "gemma3")]
)
def test_tokens_are_those_of_whole_contexts(name: str, target: str) -> None:
    """Chunks, prefix hits, many sequences; and again in a cache so small that requests are preempted."""
    found = []
    roomy = loaded(name, target, whole_context=True)
    sliding = loaded(name, target, whole_context=False)
    small = replace(sliding.plan, num_blocks=sliding.plan.kv.blocks_of(160) + 4)
    for case in (roomy, sliding, replace(sliding, plan=small)):
        runtime = opened(case)
        engine = LLMEngine(runtime, SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=STEP))
        found.append(outputs(engine, _requests(runtime)))
        counters = engine.scheduler.counters
        assert counters.prefix_cache_hits > 0
        # Where all layers slide, whoever runs never grows out of the small cache: others enter later instead.
        grows = any(not group.window for group in sliding.plan.kv.groups)
        assert (counters.preemptions > 0) == (case.plan is small and grows)
        engine.close()
    assert found[0] == found[1]
    if target == "cuda":  # bfloat16 rounds otherwise where a request is computed again in other chunks
        usual, again = (_shortfall(name, tokens) for tokens in found[1:])
        assert again <= 2 * usual
    else:
        assert found[1] == found[2]


def _shortfall(name: str, tokens: list[list[int]]) -> float:
    """By how much a token's logit is below the best at most, by the reference in float32."""
    runtime = open_runtime(loaded(name, "reference", whole_context=True))
    assert isinstance(runtime, ReferenceRuntime)
    worst = 0.0
    for request, new in zip(_requests(runtime), tokens, strict=True):
        prompt = request.prompt_token_ids
        blocks = range(runtime.limits.num_blocks)
        plan = StepPlan((SequenceSlice("0", [*prompt, *new[:-1]], 0, blocks, False),))
        logits = runtime.logits(plan, all_rows=True)[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        worst = max(worst, float((logits.max(dim=1).values - chosen).max()))
    return worst


def _requests(runtime: Runtime) -> list[Request]:
    return conversations(runtime.limits.vocab_size, [70, 3, 41, 20, 9], 30, shared=50)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["gemma3", pytest.param("mistral", marks=pytest.mark.slow)])
def test_what_was_let_go_of_is_never_read(name: str, target: str, dtype: str) -> None:
    """Contexts are longer than a segment of the native kernels, which begins before the window."""
    found = []
    for whole in (True, False):
        case = loaded(name, target, whole_context=whole, dtype=dtype)
        runtime = opened(case)
        config = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=STEP, enable_prefix_caching=False)
        engine = LLMEngine(runtime, config)
        poison_what_is_free(engine, _fill(runtime, case))
        found.append(outputs(engine, conversations(runtime.limits.vocab_size, [330, 1, 270], 40)))
        assert engine.scheduler.blocks.slides is not whole
        engine.close()
    assert found[0] == found[1]


def _fill(runtime: Runtime, case: LoadedEngine) -> Fill:
    """Of a runtime's caches; on CUDA the null block is of NaN too, which its kernels do not read."""
    if isinstance(runtime, CpuRuntime):
        return _fill_native(runtime, case)
    assert isinstance(runtime, ReferenceRuntime | EmulatedRuntime)
    if isinstance(runtime, EmulatedRuntime):
        fill = fill_emulated(runtime)
        if any(runtime.limits.windows):
            fill(runtime.limits.null_block, 0xFF)
        return fill
    stores = list({id(cache): cache for cache in runtime.cache.values()}.values())

    def fill(block: int, byte: int) -> None:
        for store in stores:
            store[:, block] = torch.nan if byte else 0

    return fill


def _fill_native(runtime: CpuRuntime, case: LoadedEngine) -> Fill:
    total = case.plan.kv_bytes
    places = max(len(group.layers) for group in case.plan.kv.groups)
    stores = [array for array in runtime._keep if isinstance(array, np.ndarray) and array.nbytes == total // places]
    assert len(stores) == places
    blocks = runtime.limits.num_blocks + any(runtime.limits.windows)

    def fill(block: int, byte: int) -> None:
        for store in stores:
            size = store.nbytes // blocks
            ctypes.memset(store.ctypes.data + block * size, byte, size)

    return fill
