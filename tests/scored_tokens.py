"""What holds of ``TokenScores``, against distributions that something else has computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmctl.engine.step import TokenScores


def check_scores(found: TokenScores, exact: NDArray[np.float64], targets: Sequence[int], top: int, atol: float) -> None:
    """Values, ranks and the most likely tokens are those of ``exact`` [n, V], log-probabilities, within ``atol``.

    Of tokens that ``exact`` has alike within that, any may come first; of those that were found to be alike, the lowest
    id. Where the target is one of the most likely tokens, its log-probability is the same there to the last bit.
    """
    width = min(top, exact.shape[1])
    assert len(found) == len(targets) == len(exact)
    assert found.top_ids.shape == found.top_logprobs.shape == (len(targets), width)
    for i, (row, target) in enumerate(zip(exact, targets, strict=True)):
        assert abs(found.logprobs[i] - row[target]) <= atol
        assert 1 + (row > row[target] + 2 * atol).sum() <= found.ranks[i] <= (row > row[target] - 2 * atol).sum()
        ids, values = found.top_ids[i], found.top_logprobs[i]
        assert np.abs(row[ids] - values).max(initial=0) <= atol
        assert np.abs(np.sort(row)[::-1][:width] - values).max(initial=0) <= atol
        order = [(-value, token) for value, token in zip(values.tolist(), ids.tolist(), strict=True)]
        assert order == sorted(set(order))
        assert found.logprobs[i] in values[ids == target] or target not in ids
