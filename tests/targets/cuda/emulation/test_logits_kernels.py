"""logits.cu under emulation, against the reference sampler."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from emulator import missing
from machine import launch

from llmctl.engine.step import SamplingBatch
from llmctl.targets.reference.sampler import _penalised, sample

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
ROWS, VOCAB = 3, 1500


def _logits() -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def _greedy(**fields: object) -> SamplingBatch:
    zeros = np.zeros(ROWS)
    return SamplingBatch(
        zeros.astype(np.float32), zeros.astype(np.uint64), zeros.astype(np.int64), **fields,
    )  # fmt: skip


def test_bias_changes_the_argmax_as_in_the_reference():
    rng = np.random.default_rng(1)
    pairs = np.unique(rng.integers(0, [ROWS, VOCAB], (600, 2)), axis=0).astype(np.int32)
    rows, ids = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
    values = rng.uniform(-5, 20, len(pairs)).astype(np.float32)
    values[::7] = -np.inf
    logits = _logits()
    expected = logits.index_put((torch.from_numpy(rows).long(), torch.from_numpy(ids).long()),
                                torch.from_numpy(values), accumulate=True)  # fmt: skip
    batch = _greedy(bias_rows=rows, bias_ids=ids, bias_values=values)
    tokens = sample(logits, batch)[0]
    launch("add_bias", logits=logits, bias_rows=rows, bias_ids=ids, bias_values=values)
    assert torch.equal(logits, expected)
    assert logits.argmax(-1).tolist() == tokens.tolist()


def test_penalties_are_those_of_the_reference():
    rng = np.random.default_rng(2)
    prompts = tuple(rng.integers(0, VOCAB, n).astype(np.int32) for n in (700, 5, 0))
    outputs = tuple(rng.integers(0, 50, n).astype(np.int32) for n in (300, 0, 0))
    penalties = {
        "repetition_penalty": np.array([1.3, 0.7, 1], np.float32),
        "presence_penalty": np.array([0.5, 0, 0], np.float32),
        "frequency_penalty": np.array([0.1, 0.2, 0], np.float32),
    }
    batch = _greedy(prompt_ids=prompts, output_ids=outputs, **penalties)
    logits = _logits()
    expected = _penalised(logits.clone(), batch)
    lists = [np.unique(np.concatenate(pair)) for pair in zip(prompts, outputs, strict=True)]
    starts = np.cumsum([0, *map(len, lists)]).astype(np.int32)
    ids = np.concatenate(lists).astype(np.int32)
    counts = np.concatenate([np.bincount(o, minlength=VOCAB)[i] for o, i in zip(outputs, lists, strict=True)])
    short = {name.removesuffix("_penalty"): values for name, values in penalties.items()}
    launch("penalise", logits=logits, starts=starts, ids=ids, counts=counts.astype(np.int32), **short)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits[2], _logits()[2])


@pytest.mark.parametrize("vocab", [1, 40, VOCAB])
def test_logprob_and_rank_are_those_of_the_reference(vocab):
    logits = _logits()[:, :vocab].contiguous()
    logits[0, vocab // 2] = logits[0, 0]
    logits[1, vocab // 3] = -torch.inf
    batch = replace(_greedy(), temperature=np.full(ROWS, 2, np.float32), num_logprobs=np.zeros(ROWS, np.int32))
    tokens, expected = sample(logits, batch)
    assert expected is not None
    logprob, rank = np.empty(ROWS, np.float32), np.empty(ROWS, np.int32)
    launch("logprobs", logits=logits, tokens=tokens, logprob=logprob, rank=rank)
    np.testing.assert_allclose(logprob, [e.logprob for e in expected], rtol=1e-5, atol=1e-5)
    assert rank.tolist() == [e.rank for e in expected]
