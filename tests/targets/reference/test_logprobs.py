"""Log-probabilities, ranks and the most likely tokens, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scored_tokens import check_scores

from llmctl.targets.reference import logprobs
from llmctl.targets.reference.logprobs import describe, top_ids


@pytest.mark.parametrize("vocab", [1, 2, 7, 131, 1000])
@pytest.mark.parametrize("key_bytes", [1, 5000, 2**25])
def test_the_most_likely_tokens_in_order(vocab: int, key_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few values, so that most tokens have equals; rows in slices of any size."""
    monkeypatch.setattr(logprobs, "_KEY_BYTES", key_bytes)
    rng = np.random.default_rng(vocab)
    logits = rng.choice(np.array([-np.inf, -1e30, -3, -0.0, 0.0, 1e-40, 2, 3.5, 1e30], np.float32), (9, vocab))
    for count in (0, 1, 5, 20, vocab + 1):
        found = top_ids(torch.from_numpy(logits), count).numpy()
        expected = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :count]
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("top", [0, 1, 20, 200])
def test_what_a_distribution_says_of_tokens(top: int) -> None:
    rng = np.random.default_rng(top)
    logits = torch.from_numpy((rng.normal(size=(24, 131)) * 4).round(1).astype(np.float32))
    targets = rng.integers(0, 131, 24)
    found = describe(logits, torch.from_numpy(targets), top)
    exact = torch.log_softmax(logits.double(), -1).numpy()
    check_scores(found, exact, targets.tolist(), top, atol=1e-5)
    ranks = [1 + int((row > row[target]).sum()) for row, target in zip(logits.numpy(), targets, strict=True)]
    assert found.ranks.tolist() == ranks


def test_few_are_asked_and_many_columns_are_not_told() -> None:
    """Rows that want fewer of the most likely tokens than others are given as many as they want."""
    found = describe(torch.eye(3), torch.tensor([0, 1, 0]), 2)
    one, none, nothing = found.entries([1, 0, -1])
    assert one is not None
    assert none is not None
    assert nothing is None
    assert (one.rank, one.top_ids) == (1, (0,))
    assert (none.rank, none.top_ids, none.top_logprobs) == (1, (), ())
