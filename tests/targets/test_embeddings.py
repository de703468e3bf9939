"""Pooled hidden states through the whole engine, on every target of a CPU, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from cpu.cpu_engines import cpu_runtime
from family_models import VOCAB, family_model
from numpy.typing import NDArray

from llmctl.engine.llm_engine import LLMEngine, TokenOutput
from llmctl.engine.pooling import Pooling
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import Runtime
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import checkpoint_runtime

ATOL = 2e-4
CASES = ("llama", "mistral", "qwen3", "phi", "gpt2")
LENGTHS = (1, 15, 16, 17, 40)
NOTHING = SamplingParams(max_tokens=0)


def _tokens(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, VOCAB, length).tolist()


@cache
def _states(case: str, length: int) -> NDArray[np.float32]:
    """transformers' hidden states f32 [length, hidden size], after the final norm."""
    with torch.no_grad():
        found = family_model(case).model(torch.tensor([_tokens(length)]), output_hidden_states=True)
    states: NDArray[np.float32] = found.hidden_states[-1][0].numpy()
    return states


@cache
def _reference(case: str) -> ReferenceRuntime:
    return checkpoint_runtime(family_model(case).checkpoint, num_blocks=64)


@cache
def _cpu(case: str) -> Runtime:
    return cpu_runtime(family_model(case).checkpoint.path, dtype="float32")


needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
on_models = pytest.mark.parametrize(
    ("runtime_of", "case"),
    [
        *(pytest.param(_reference, case, id=f"reference-{case}") for case in CASES),
        *(pytest.param(_cpu, case, id=f"cpu-{case}", marks=needs_compiler) for case in ("llama", "phi", "gpt2")),
    ],
)
RuntimeOf = Callable[[str], Runtime]


def run(engine: LLMEngine, requests: Sequence[Request]) -> dict[str, list[TokenOutput]]:
    engine.add_requests(requests)
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    while engine.has_unfinished():
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def _chats() -> list[Request]:
    params = SamplingParams(temperature=1.0, max_tokens=5, ignore_eos=True)
    return [Request(f"chat{n}", _tokens(n), params) for n in (3, 18)]


def _embeddings(pooling: Pooling) -> list[Request]:
    return [Request(f"{pooling}{n}", _tokens(n), NOTHING, pooling=pooling) for n in LENGTHS]


@on_models
def test_embeddings_equal_transformers_and_leave_chats_as_they_are(runtime_of: RuntimeOf, case: str) -> None:
    """Whole and in chunks, all in one batch; the second time the cache has their prefixes."""
    runtime = runtime_of(case)
    alone = run(LLMEngine(runtime, SchedulerConfig(max_num_batched_tokens=64)), _chats())
    for budget in (64, 7):
        engine = LLMEngine(runtime, SchedulerConfig(max_num_batched_tokens=budget))
        mixed = run(engine, [*_embeddings(Pooling.LAST), *_chats(), *_embeddings(Pooling.MEAN)])
        for name, outputs in alone.items():
            assert [o.new_token_ids for o in mixed[name]] == [o.new_token_ids for o in outputs]
        again = run(engine, [*_embeddings(Pooling.LAST), *_embeddings(Pooling.MEAN)])
        assert again["last40"][0].num_cached_tokens == 32
        for found in (mixed, again):
            for length in LENGTHS:
                states = _states(case, length)
                for pooling, expected in ((Pooling.LAST, states[-1]), (Pooling.MEAN, states.mean(0))):
                    (output,) = found[f"{pooling}{length}"]
                    np.testing.assert_allclose(output.embedding, expected, atol=ATOL, rtol=0)


def test_the_output_head_is_not_run_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _reference("llama")
    monkeypatch.delattr(runtime, "_head")
    found = run(LLMEngine(runtime, SchedulerConfig()), _embeddings(Pooling.MEAN))
    assert all(outputs[0].embedding is not None for outputs in found.values())
