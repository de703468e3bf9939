"""Log-probabilities of prompts through the whole engine, on every target of a CPU, against transformers in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from cpu.cpu_engines import cpu_runtime
from fixtures import make_tiny_llama
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scored_tokens import check_scores

from llmctl.artifact.request import EngineRequest
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.engine.llm_engine import LLMEngine, TokenOutput
from llmctl.engine.request import Request, fan_out
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import Runtime, TokenScores
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.targets.reference.weights import checkpoint_runtime

TWINS = {7: 300, 8: 9, 100: 360, 200: 201, 60: 61}
"""Tokens with one and the same row of the output head: wherever they stand, they are as likely as one another."""
ATOL = 2e-4
PROMPT = [5, 300, 7, 41, 9, 8, 100, 250, 7, 7, 360, 33, 3, 201]
BLOCK = 16
_FOLDER: list[TemporaryDirectory[str]] = []


@cache
def _model() -> Path:
    _FOLDER.append(TemporaryDirectory())
    folder = make_tiny_llama(Path(_FOLDER[0].name) / "twins")
    tensors = load_file(folder / "model.safetensors")
    for first, second in TWINS.items():
        tensors["lm_head.weight"][second] = tensors["lm_head.weight"][first]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@cache
def _transformers() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(_model(), dtype=torch.float64).eval()


def exact(ids: Sequence[int]) -> NDArray[np.float64]:
    """Log-probabilities [len - 1, V] of what may follow each token but the last."""
    with torch.inference_mode():
        logits = _transformers()(torch.tensor([list(ids)])).logits[0, :-1]
    return torch.log_softmax(logits, -1).numpy()


@cache
def _reference(blocks: int) -> Runtime:
    return checkpoint_runtime(open_checkpoint(_model()), num_blocks=blocks, block_size=BLOCK)


@cache
def _cpu(blocks: int) -> Runtime:
    token_bytes = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, columns, float32
    sizes = EngineRequest(kv_cache_bytes=blocks * BLOCK * token_bytes, max_model_len=blocks * BLOCK, max_num_seqs=8)
    runtime = cpu_runtime(_model(), sizes=sizes, dtype="float32")
    assert runtime.limits.num_blocks == blocks
    return runtime


needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
on_targets = pytest.mark.parametrize(
    "runtime_of", [_reference, pytest.param(_cpu, marks=needs_compiler)], ids=["reference", "cpu"]
)
RuntimeOf = Callable[[int], Runtime]


def run(engine: LLMEngine, *requests: Request) -> dict[str, list[TokenOutput]]:
    engine.add_requests(requests)
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for _ in range(1000):
        if not engine.has_unfinished():
            return outputs
        for output in engine.step():
            outputs[output.request_id].append(output)
    raise AssertionError("the engine does not end")


def scores_of(outputs: Sequence[TokenOutput]) -> TokenScores:
    """They are given once."""
    (scores,) = [output.prompt_scores for output in outputs if output.prompt_scores is not None]
    return scores


def greedy(**fields: int) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 2, "ignore_eos": True, **fields})


@on_targets
def test_a_prompt_cut_anywhere(runtime_of: RuntimeOf) -> None:
    distribution = exact(PROMPT)
    for budget in range(1, len(PROMPT) + 2):
        engine = LLMEngine(runtime_of(32), SchedulerConfig(max_num_batched_tokens=budget))
        outputs = run(engine, Request("r", PROMPT, greedy(prompt_logprobs=20)))["r"]
        check_scores(scores_of(outputs), distribution, PROMPT[1:], 20, ATOL)
        assert len(outputs) == 2


@on_targets
def test_equals_come_in_the_order_of_their_ids(runtime_of: RuntimeOf) -> None:
    """All tokens of the vocabulary that may be asked for, at positions where twins are among them."""
    engine = LLMEngine(runtime_of(32), SchedulerConfig())
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 384, 200).tolist()
    scores = scores_of(run(engine, Request("r", prompt, greedy(prompt_logprobs=20)))["r"])
    check_scores(scores, exact(prompt), prompt[1:], 20, ATOL)
    met = 0
    for ids in scores.top_ids.tolist():
        for pair in TWINS.items():
            lower, higher = sorted(pair)
            assert higher not in ids or ids.index(higher) == ids.index(lower) + 1
            met += higher in ids
    assert met > 20


@on_targets
def test_a_cached_prefix_is_computed_again_for_them(runtime_of: RuntimeOf) -> None:
    engine = LLMEngine(runtime_of(32), SchedulerConfig(max_num_batched_tokens=24))
    prompt = PROMPT * 5
    run(engine, Request("warm", prompt, greedy()))
    first = run(engine, Request("scored", prompt, greedy(prompt_logprobs=3)))["scored"]
    check_scores(scores_of(first), exact(prompt), prompt[1:], 3, ATOL)
    assert first[-1].num_cached_tokens == 0
    plain = run(engine, Request("plain", prompt, greedy()))["plain"]  # the cache is none the worse for it
    assert plain[-1].num_cached_tokens == len(prompt) // BLOCK * BLOCK
    assert [o.new_token_ids for o in plain] == [o.new_token_ids for o in first]


@on_targets
def test_requests_that_ask_for_different_things_in_one_step(runtime_of: RuntimeOf) -> None:
    """Also none, a single token, nothing generated, and the sampled tokens' own; ``n`` samples have the same scores."""
    engine = LLMEngine(runtime_of(32), SchedulerConfig())
    asked = {"none": None, "own": 0, "one": 1, "twenty": 20}
    requests = []
    for number, (name, top) in enumerate(asked.items()):
        params = greedy(prompt_logprobs=top, logprobs=number) if top is not None else greedy(logprobs=number)
        requests.append(Request(name, PROMPT[number:], params))
    requests.append(Request("single", PROMPT[:1], greedy(prompt_logprobs=5)))
    requests.append(Request("only", PROMPT, greedy(prompt_logprobs=5, max_tokens=0)))
    requests += fan_out(Request("n", PROMPT, SamplingParams(n=3, seed=1, max_tokens=2, prompt_logprobs=4)))
    outputs = run(engine, *requests)
    assert all(output.prompt_scores is None for output in outputs["none"])
    for number, (name, top) in enumerate(asked.items()):
        if top is not None:
            check_scores(scores_of(outputs[name]), exact(PROMPT[number:]), PROMPT[number + 1 :], top, ATOL)
        entries = [entry for output in outputs[name] for entry in output.logprobs or ()]
        assert [len(entry.top_ids) for entry in entries] == [number] * 2
    assert len(scores_of(outputs["single"])) == 0
    check_scores(scores_of(outputs["only"]), exact(PROMPT), PROMPT[1:], 5, ATOL)
    assert [output.new_token_ids for output in outputs["only"]] == [()]
    for index in range(3):
        check_scores(scores_of(outputs[f"n#{index}"]), exact(PROMPT), PROMPT[1:], 4, ATOL)


@on_targets
def test_a_prompt_preempted_half_way(runtime_of: RuntimeOf) -> None:
    """Generating requests take the blocks of one whose prompt is not whole yet; it begins again."""
    engine = LLMEngine(runtime_of(10), SchedulerConfig(max_num_batched_tokens=4, policy="priority"))
    urgent = [Request(f"u{i}", [20 + i] * 6, greedy(max_tokens=45), priority=-1) for i in range(2)]
    long = Request("long", PROMPT * 6, greedy(prompt_logprobs=6), priority=1)
    engine.add_requests([*urgent, long])
    seen, outputs = set(), []
    while engine.has_unfinished():
        outputs += [output for output in engine.step() if output.request_id == "long"]
        if long.num_preemptions and not long.scores_done:
            seen.add(long.num_preemptions)
    assert seen, "never preempted within its prompt"
    check_scores(scores_of(outputs), exact(PROMPT * 6), (PROMPT * 6)[1:], 6, ATOL)
