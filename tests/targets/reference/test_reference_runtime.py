"""ReferenceRuntime.execute: sampled tokens, scores, limits; batches, interpreter, demo model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from family_models import VOCAB, family_model
from gguf_files import model_of
from runtime_stepping import greedy, paged_logits, poison, shuffled_blocks

from llmctl.engine.step import Runtime, RuntimeLimits, SamplingBatch, SequenceSlice, StepPlan
from llmctl.errors import LlmctlError
from llmctl.graph.graph import LOGITS
from llmctl.targets.batch import build_batch
from llmctl.targets.reference import runtime as reference
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import CheckpointWeights, checkpoint_runtime


@pytest.fixture(scope="module")
def runtime() -> ReferenceRuntime:
    return checkpoint_runtime(family_model("qwen2").checkpoint, num_blocks=40, block_size=4, max_model_len=100)


def tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def test_it_is_a_runtime(runtime: ReferenceRuntime) -> None:
    as_protocol: Runtime = runtime
    assert as_protocol.limits == RuntimeLimits(num_blocks=40, block_size=4, max_model_len=100, vocab_size=VOCAB)


def test_rows_that_are_not_sampled_take_no_sampling_row(runtime: ReferenceRuntime) -> None:
    prompts = [tokens(n, n) for n in (9, 6, 3)]
    tables = shuffled_blocks(runtime, [12, 12, 12], np.random.default_rng(0))
    flags = (True, False, True)
    plan = StepPlan(
        tuple(
            SequenceSlice(str(i), ids, 0, table, flag)
            for i, (ids, table, flag) in enumerate(zip(prompts, tables, flags, strict=True))
        )
    )
    result = runtime.execute(plan, greedy(2)).result()
    expected = [int(family_model("qwen2").logits(prompts[i])[-1].argmax()) for i in (0, 2)]
    assert result.token_ids.tolist() == expected
    assert result.logprobs is None
    assert result.scores == {}
    with pytest.raises(ValueError, match="expected 2 sampling rows, one per sampled slice; found 3"):
        runtime.execute(plan, greedy(3))


def test_a_step_without_sampled_rows(runtime: ReferenceRuntime) -> None:
    result = runtime.execute(StepPlan((SequenceSlice("a", tokens(5), 0, [0, 1], False),)), greedy(0)).result()
    assert result.token_ids.shape == (0,)
    assert result.token_ids.dtype == np.int32


@pytest.mark.parametrize("chunk_bytes", [1, 4 * VOCAB * 3, 2**26])
def test_scores_are_the_models_logprobs(
    runtime: ReferenceRuntime, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_SCORE_BYTES", chunk_bytes)
    a, b = tokens(14, 1), tokens(9, 2)
    expected = {}
    for name, ids in (("a", a), ("b", b)):
        logprobs = torch.log_softmax(family_model("qwen2").logits(ids), -1)
        expected[name] = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    first = StepPlan(
        (
            SequenceSlice("a", a[:8], 0, [0, 1, 2, 3], False, score_targets=a[1:9]),
            SequenceSlice("b", b, 0, [4, 5, 6], True, score_targets=b[1:]),
        )
    )
    second = StepPlan((SequenceSlice("a", a[8:], 8, [0, 1, 2, 3], True, score_targets=a[9:]),))
    one, two = runtime.execute(first, greedy(1)).result(), runtime.execute(second, greedy(1)).result()
    np.testing.assert_allclose(
        np.concatenate([one.scores["a"].logprobs, two.scores["a"].logprobs]), expected["a"], atol=1e-4
    )
    np.testing.assert_allclose(one.scores["b"].logprobs, expected["b"], atol=1e-4)
    assert one.scores["b"].logprobs.dtype == np.float32
    assert one.token_ids.tolist() == [int(family_model("qwen2").logits(b)[-1].argmax())]
    assert set(two.scores) == {"a"}


def generate(runtime: ReferenceRuntime, prompts: list[list[int]], seeds: list[int], steps: int) -> list[list[int]]:
    """Sampled continuations at temperature 1, all prompts in one batch, prefill in one step."""
    poison(runtime)
    tables = shuffled_blocks(runtime, [len(p) + steps for p in prompts], np.random.default_rng(len(prompts)))
    sequences = [list(p) for p in prompts]
    done = [0] * len(prompts)
    for _ in range(steps):
        plan = StepPlan(
            tuple(SequenceSlice(str(i), s[done[i] :], done[i], tables[i], True) for i, s in enumerate(sequences))
        )
        sampling = SamplingBatch(
            np.ones(len(prompts), np.float32),
            np.array(seeds, np.uint64),
            np.array([len(s) for s in sequences], np.int64),
            top_p=np.full(len(prompts), 0.95, np.float32),
        )
        done = [len(s) for s in sequences]
        for s, token in zip(sequences, runtime.execute(plan, sampling).result().token_ids.tolist(), strict=True):
            s.append(token)
    return [s[len(p) :] for s, p in zip(sequences, prompts, strict=True)]


def test_a_seed_gives_the_same_tokens_in_any_company(runtime: ReferenceRuntime) -> None:
    prompts, seeds = [tokens(n, n) for n in (7, 12, 3, 9)], [11, 11, 2**63, 5]
    together = generate(runtime, prompts, seeds, 12)
    for i in range(4):
        assert generate(runtime, [prompts[i]], [seeds[i]], 12) == [together[i]]
    reordered = generate(runtime, prompts[::-1], seeds[::-1], 12)
    assert reordered[::-1] == together
    assert generate(runtime, [prompts[0]], [12], 12) != [together[0]]


@pytest.mark.parametrize(
    ("slice_", "words"),
    [
        (SequenceSlice("r", [], 0, [0], True), "a slice needs at least one token"),
        (SequenceSlice("r", [1], -1, [0], True), "a slice needs at least one token and a start >= 0"),
        (SequenceSlice("r", [1] * 5, 0, [0], True), "1 blocks of 4 cannot hold 5 tokens"),
        (SequenceSlice("r", [1], 100, list(range(26)), True), "101 tokens exceed max_model_len 100"),
        (SequenceSlice("r", [VOCAB], 0, [0], True), "token ids must be in 0..130"),
        (SequenceSlice("r", [-1], 0, [0], True), "token ids must be in 0..130"),
        (SequenceSlice("r", [1], 0, [40], True), "block ids must be in 0..39"),
        (SequenceSlice("r", [1], 0, [-1], True), "block ids must be in 0..39"),
        (SequenceSlice("r", [1], 0, [0], True, score_targets=[1, 2]), "2 score targets for 1 tokens"),
        (SequenceSlice("r", [1], 0, [0], True, score_targets=[VOCAB]), "score targets must be in 0..130"),
        (SequenceSlice("r", [1], 0, [0], True, pool_rows=2), "2 rows to pool of 1 tokens"),
        (SequenceSlice("r", [1], 0, [0], True, pool_rows=-1), "-1 rows to pool of 1 tokens"),
    ],
)
def test_plans_that_are_refused(runtime: ReferenceRuntime, slice_: SequenceSlice, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        runtime.execute(StepPlan((slice_,)), greedy(1))
    assert words in str(caught.value)
    assert "request r" in str(caught.value)


def test_batch_arrays() -> None:
    limits = RuntimeLimits(num_blocks=9, block_size=4, max_model_len=32, vocab_size=50)
    plan = StepPlan(
        (
            SequenceSlice("a", [10, 11, 12], 3, [7, 2], True),
            SequenceSlice("b", [20], 8, [0, 5, 8, 1], False),
            SequenceSlice("c", [30, 31], 0, [6], True),
        )
    )
    batch = build_batch(plan, limits)
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 30, 31]
    assert batch.positions.tolist() == [3, 4, 5, 8, 0, 1]
    assert batch.slot_mapping.tolist() == [31, 8, 9, 32, 24, 25]
    assert batch.query_start_loc.tolist() == [0, 3, 4, 6]
    assert batch.seq_lens.tolist() == [6, 9, 2]
    assert batch.block_tables.tolist() == [[7, 2, -1, -1], [0, 5, 8, 1], [6, -1, -1, -1]]
    assert batch.logits_indices.tolist() == [2, 5]
    assert batch.context_slots(0).tolist() == [28, 29, 30, 31, 8, 9]
    assert batch.context_slots(1, 7).tolist() == [23, 32]


def test_padding_slots_write_nothing_and_do_not_disturb() -> None:
    """A batch padded with slot -1 (as captured device graphs pad theirs) gives the real rows' logits."""
    runtime = checkpoint_runtime(family_model("llama").checkpoint, num_blocks=8, block_size=4)
    poison(runtime)
    ids = tokens(6)
    batch = build_batch(StepPlan((SequenceSlice("a", ids, 0, [2, 5], True),)), runtime.limits)
    padded = replace(
        batch,
        token_ids=np.concatenate([batch.token_ids, [0, 0]]),
        positions=np.concatenate([batch.positions, [0, 0]]),
        slot_mapping=np.concatenate([batch.slot_mapping, [-1, -1]]),
    )
    interpreter = runtime.interpreter
    ctx = interpreter.context(padded, runtime.cache)
    env = interpreter.program(interpreter.graph.ops, (LOGITS,))(ctx.inputs(), ctx)
    expected = family_model("llama").logits(ids)[-1:]
    assert float((env[LOGITS] - expected).abs().max()) < 1e-4
    written = ~runtime.cache[1].isnan().all(-1).all(-1).all(0).flatten()
    assert torch.nonzero(written).flatten().tolist() == sorted(batch.slot_mapping.tolist())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, found 'int8'"),
        ({"num_blocks": 0}, "must be positive"),
        ({"max_model_len": 129}, "max_model_len must be in 1..128, found 129"),
        ({"max_model_len": 0}, "max_model_len must be in 1..128, found 0"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, object], words: str) -> None:
    settings = {"num_blocks": 4, "block_size": 4, **changes}
    with pytest.raises(ValueError, match=words):
        checkpoint_runtime(family_model("llama").checkpoint, **settings)  # type: ignore[arg-type]


def test_a_weight_of_another_shape_is_refused() -> None:
    model = family_model("llama")
    weights = dict(CheckpointWeights(model.graph, model.checkpoint))
    weights["layers.1.o_proj.weight"] = torch.zeros(60, 61)
    with pytest.raises(
        ValueError, match=r"weight 'layers.1.o_proj.weight': expected shape \[60, 60\], found \[60, 61\]"
    ):
        ReferenceRuntime(model.graph, weights, num_blocks=4, block_size=4)


def demo_model(name: str) -> Path:
    from llmctl.checkpoint.resolve import resolve_model

    try:
        return resolve_model(name)
    except LlmctlError as error:
        pytest.skip(f"demo model: {error}")


SMOLLM = ("demo:smollm2-135m", [1, 504, 3575, 282, 4649, 314, 260, 2240])
GEMMA = ("demo:gemma3-270m", [2, 9259, 236764])


@pytest.mark.parametrize(
    ("demo", "steps"),
    [(SMOLLM, 6), pytest.param(SMOLLM, 64, marks=pytest.mark.slow), pytest.param(GEMMA, 64, marks=pytest.mark.slow)],
)
def test_greedy_tokens_equal_transformers_on_the_demo_models(demo: tuple[str, list[int]], steps: int) -> None:
    """Greedy steps with passes over the paged cache, against transformers with the same weights."""
    from llmctl.checkpoint.opening import open_checkpoint

    path, prompt = demo_model(demo[0]), demo[1]
    runtime = checkpoint_runtime(open_checkpoint(path), num_blocks=8, block_size=16)
    model = model_of(open_checkpoint(path, widen=True))
    found, done = list(prompt), 0
    for _ in range(steps):
        plan = StepPlan((SequenceSlice("a", found[done:], done, [5, 0, 7, 2, 4], True),))
        done = len(found)
        found.append(int(runtime.execute(plan, greedy(1)).result().token_ids[0]))
    # Every token is transformers' greedy choice after the ones before it: its own greedy continuation, in one pass.
    with torch.no_grad():
        expected = model(torch.tensor([found[:-1]])).logits[0].argmax(-1)
    assert found[len(prompt) :] == expected[len(prompt) - 1 :].tolist()


def test_paged_logits_helper_sees_a_wrong_block() -> None:
    """The helper's poison works: a runtime whose cache is poisoned mid-way gives NaN, not something plausible."""
    runtime = checkpoint_runtime(family_model("llama").checkpoint, num_blocks=8, block_size=4)
    assert not paged_logits(runtime, [tokens(9)], lambda *_: 9)[0].isnan().any()
    poison(runtime)
    late = StepPlan((SequenceSlice("a", [1], 5, [0, 1], True),))
    assert runtime.logits(late).isnan().all()
