"""Layers with a sliding window that let go of blocks, on real models: the same tokens as with whole contexts, whatever
lies in a block that was let go of."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from random_models import write_model

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import LoadedEngine, load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.config import BuildConfig
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import Runtime
from llmctl.targets.cpu.runtime import CpuRuntime
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.targets.reference.runtime import ReferenceRuntime

WINDOW, BLOCK, STEP, LENGTH = 20, 16, 24, 400
_SMALL = {"max_position_embeddings": 512, "sliding_window": WINDOW}
_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
_MIXED = {**_SMALL, "num_hidden_layers": 5, "layer_types": _TYPES}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", _MIXED),
    "olmo3": ("olmo2", {**_MIXED, "model_type": "olmo3"}),
    "cohere2": ("cohere2", _MIXED),
    "mistral": ("mistral", dict(_SMALL)),
}
TARGETS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")),
]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "gemma3"]
_FOLDER = TemporaryDirectory()


@cache
def engine_of(name: str, target: str, dtype: str = "float32") -> Path:
    folder = Path(_FOLDER.name)
    family, changes = MODELS[name]
    (folder / name).mkdir(exist_ok=True)
    model = write_model(folder / name, family, **changes)
    output = folder / f"{name}-{target}-{dtype}"
    build_engine(BuildConfig(model=str(model), target=target, output=str(output), dtype=dtype))
    return output


def loaded(name: str, target: str, *, whole_context: bool, dtype: str = "float32", **changes: Any) -> LoadedEngine:
    request = EngineRequest(
        max_model_len=LENGTH, max_num_batched_tokens=STEP, max_num_seqs=4, whole_context=whole_context, **changes
    )
    return load_engine(engine_of(name, target, dtype), request)


def outputs(engine: LLMEngine, requests: list[Request]) -> list[list[int]]:
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished():
        engine.step()
        engine.scheduler.check()
    return [request.output_token_ids for request in requests]


def conversations(vocab: int, lengths: list[int], new: int, shared: int = 0) -> list[Request]:
    rng = np.random.default_rng(3)
    head = rng.integers(0, vocab, shared).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    return [Request(str(i), head + rng.integers(0, vocab, n).tolist(), params) for i, n in enumerate(lengths)]


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
        runtime = open_runtime(case)
        engine = LLMEngine(runtime, SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=STEP))
        vocab = runtime.limits.vocab_size
        found.append(outputs(engine, conversations(vocab, [70, 3, 41, 20, 9], 30, shared=50)))
        counters = engine.scheduler.counters
        assert counters.prefix_cache_hits > 0
        # Where all layers slide, whoever runs never grows out of the small cache: others enter later instead.
        grows = any(not group.window for group in sliding.plan.kv.groups)
        assert (counters.preemptions > 0) == (case.plan is small and grows)
        engine.close()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["gemma3", pytest.param("mistral", marks=pytest.mark.slow)])
def test_what_was_let_go_of_is_never_read(name: str, target: str, dtype: str) -> None:
    """Contexts are longer than a segment of the native kernels, which begins before the window."""
    found = []
    for whole in (True, False):
        case = loaded(name, target, whole_context=whole, dtype=dtype)
        runtime = open_runtime(case)
        config = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=STEP, enable_prefix_caching=False)
        engine = LLMEngine(runtime, config)
        _poison_what_is_free(engine, runtime, case)
        found.append(outputs(engine, conversations(runtime.limits.vocab_size, [330, 1, 270], 40)))
        assert engine.scheduler.blocks.slides is not whole
        engine.close()
    assert found[0] == found[1]


def _caches(runtime: Runtime, case: LoadedEngine) -> list[Any]:
    """What the layers' keys and values lie in, null block last."""
    if isinstance(runtime, ReferenceRuntime):
        return list({id(cache): cache for cache in runtime.cache.values()}.values())
    assert isinstance(runtime, CpuRuntime)
    total = case.plan.kv_bytes
    places = max(len(group.layers) for group in case.plan.kv.groups)
    found = [array for array in runtime._keep if isinstance(array, np.ndarray) and array.nbytes == total // places]
    assert len(found) == places
    return found


def _poison_what_is_free(engine: LLMEngine, runtime: Runtime, case: LoadedEngine) -> None:
    """From now on blocks that nobody holds are of NaN, which all ones are in every dtype of a cache. They are zeros
    when they are handed out: native kernels multiply lanes that nobody wrote by 0."""
    pool, stores = engine.scheduler.pool, _caches(runtime, case)
    total = runtime.limits.num_blocks + any(runtime.limits.windows)

    def fill(blocks: Iterable[int], byte: int) -> None:
        for store, block in product(stores, blocks):
            if isinstance(store, torch.Tensor):
                store[:, block] = torch.nan if byte else 0
            else:
                size = store.nbytes // total
                ctypes.memset(store.ctypes.data + block * size, byte, size)

    allocate, release = pool.allocate, pool.release

    def allocated(count: int) -> list[int]:
        blocks = allocate(count)
        fill(blocks, 0)
        return blocks

    def released(blocks: Sequence[int]) -> None:
        release(blocks)
        fill([block for block in blocks if not pool.num_holders(block)], 0xFF)

    fill(range(pool.num_blocks), 0xFF)
    pool.allocate, pool.release = allocated, released  # type: ignore[method-assign]
