"""Layers with a sliding window let go of blocks: kernels, captured steps among them, read the tables of their own KV
group, and no block that was let go of."""

from __future__ import annotations

import pytest
import torch
from cuda_model import EmulatedRuntime, emulated_runtime, fill_emulated
from emulator import missing
from sliding_blocks import conversations, outputs, poison_what_is_free
from tiny_models import FAMILIES, VOCAB, tiny_model
from torch import Tensor

from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import SamplingBatch, SequenceSlice, StepPlan
from llmctl.graph.kv_groups import KVGroup, kv_groups
from llmctl.targets.cuda.pending import CudaStep
from llmctl.targets.cuda.target import CUDA_PASSES

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

GROUPS = (KVGroup(0, (0,)), KVGroup(21, (1,)))
STEP = 24


def _runtime(kv: str, groups: tuple[KVGroup, ...], **options: bool) -> EmulatedRuntime:
    """Two layers, the upper one with a window of 21; with groups both have one cache between them."""
    graph, weights = tiny_model({**FAMILIES["qwen2"], "tie_word_embeddings": False}, None, CUDA_PASSES)
    assert kv_groups(graph) == GROUPS
    return emulated_runtime(
        graph, weights, "float16", num_blocks=24 if groups else 18, kv_cache_dtype=kv, max_num_batched_tokens=STEP,
        max_num_seqs=2, once=True, groups=groups, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kv", "eager"),
    [
        ("float16", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("int8", False), ("fp8_e4m3", False), ("float16", True))
        ),
    ],
)
def test_tokens_are_those_of_whole_contexts(kv: str, eager: bool) -> None:
    """Whatever lies in blocks that nobody holds, and in the null block."""
    found, executions = [], []
    for groups in (), GROUPS:
        runtime = _runtime(kv, groups, enforce_eager=eager)
        engine = LLMEngine(runtime, SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=STEP))
        assert engine.scheduler.blocks.slides == bool(groups)
        fill = fill_emulated(runtime)
        poison_what_is_free(engine, fill)
        if groups:
            fill(runtime.limits.null_block, 0xFF)
            assert runtime.caches[0] is runtime.caches[1]
        logits = _kept_logits(runtime)
        found.append((outputs(engine, conversations(VOCAB, [72, 3, 30], 12)), logits))
        executions.append(bool(runtime._graphs))
    (tokens, logits), (same, alike) = found
    assert tokens == same
    assert all(torch.equal(a, b) for a, b in zip(logits, alike, strict=True))
    assert executions == [not eager] * 2


def _kept_logits(runtime: EmulatedRuntime) -> list[Tensor]:
    """Those of the sampled rows of every step from now on."""
    found, execute = [], runtime.execute

    def executed(plan: StepPlan, sampling: SamplingBatch) -> CudaStep:
        step = execute(plan, sampling)
        found.append(runtime._logits(sum(piece.sample for piece in plan.slices)).clone())
        return step

    runtime.execute = executed  # type: ignore[method-assign]
    return found


def test_a_table_too_few_is_refused() -> None:
    runtime = _runtime("float16", GROUPS)
    piece = SequenceSlice("a", [1, 2], 0, (0,), False)
    short = replace_tables(piece, ((),))
    for wrong, message in ((piece, "expected 2 block tables for 2 tokens"), (short, "expected 2 block tables")):
        with pytest.raises(ValueError, match=f"request a: {message}"):
            runtime.logits(StepPlan((wrong,)))
    with pytest.raises(ValueError, match="request a: a token has the null block for its own"):
        runtime.logits(StepPlan((replace_tables(piece, ((24,),)),)))
    good = SequenceSlice("b", [1, 2], 0, (1,), False, more_block_ids=((2,),))
    with pytest.raises(ValueError, match=r"request a: block ids must be in 0\.\.23"):
        runtime.logits(StepPlan((good, replace_tables(piece, ((0, 25),)))))


def replace_tables(piece: SequenceSlice, more: tuple[tuple[int, ...], ...]) -> SequenceSlice:
    """The slice with other tables of further groups."""
    return SequenceSlice(piece.request_id, piece.token_ids, piece.start, piece.block_ids, False, more_block_ids=more)


def test_a_step_that_is_timed_has_blocks_of_every_group() -> None:
    """As many as it can tell apart."""
    runtime = _runtime("float16", GROUPS)
    runtime.decode_replay(2, 40)()
    assert runtime._arena.held is not None
    _, tables = runtime._arena.held
    assert sorted(block for table in tables for block in table) == list(range(12))
