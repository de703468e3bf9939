"""What a step costs, fitted while running, and how much of a prompt fits beside running decodes.

A step's seconds are taken to be

    base + prefill_base·[it prefills] + decode_row·D + prefill_row·P + decode_context·C_D + prefill_context·C_P
        + prefill_logits·(L - 1)

with D and P the rows (tokens) of either kind, and C the sum over rows of the positions each one attends to. That is
the arithmetic of a transformer's step: weights are read once, matrix products grow with rows, attention with rows ×
context. Decode rows stand apart: they are bound by reading the KV cache, and often run other kernels than a prompt's.
L are the rows of prompts that go through the output head as well: the last of a prompt, and all of one whose tokens are
scored. Each decode row does, so that its share of the head is a part of decode_row; and where prompts come one by one,
one row is of each step that ends one, so that it is a part of prefill_base. L is told apart by steps with more of them.
A chunk of k tokens from position s on has P = k and C_P = k·s + k(k+1)/2, so that the largest chunk that fits a number
of seconds is the root of a quadratic: chunks shrink as a long prompt proceeds. To chunk a prompt so that decodes need
not wait is of Agrawal et al. 2024, "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", who fix
the tokens of a chunk; here its seconds are fixed.

What a step may take with the automatic target is a multiple of what its decodes alone will take soon: those that run,
and one more for every waiting prompt that has a seat and fits a step. So a burst of short prompts is let in at the pace
that suits the batch it becomes; held to the pace of its first few, it would run thinly for long. What decodes take
alone is told from steps without prompts, too, and the target divided by a margin in which 97 of 100 steps stay:
kernels compute rows in tiles, which is not linear.

The coefficients are those of a non-negative least squares fit (Lawson and Hanson 1974, "Solving Least Squares
Problems", chapter 23) to relative errors, with Huber's weights (1964) against steps that something else delayed. The
latest samples of every class of steps (rows and context, by powers of two) are kept, so that hours of pure decode do
not make the fit forget what prompts cost. Nothing here reads a clock: equal timings give equal chunks.
"""

from __future__ import annotations

import math
from operator import mul
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

MIN_CHUNK = 4
"""Tokens of a prompt that a step computes whatever the target, so that prompts proceed beside any number of decodes. On
a CPU with AMX 1 to 4 of them at 7,500 positions take the same: 25 ms beside 4 chats, who alone take 5; 8 take 40."""
AUTO_SLOWDOWN = 4.9
"""With the automatic target a step with prefill may take so many times as long as its decode rows alone."""
QUANTILE, MOST_MARGIN, _PACE = 0.97, 2.0, 0.05
"""Of steps with both decodes and prompts, the share that is to keep the target; how far what they take beyond the model
is followed at most, and how fast."""
_SAMPLES = 8  # kept of each class of steps
# A chunk of a long prompt begins with this share of a step's tokens and grows by this factor: what lies far beyond the
# samples is not believed at once. Short prompts attend to little, so that rows seen in any step vouch for theirs.
_FIRST, _GROWTH = 1 / 16, 1.5
_REFIT = 8  # new samples after which the coefficients are fitted again
_SURPRISE = 0.1  # relative error of a sample after which they are fitted again at once
_HUBER = 1.345  # in standard deviations: 95% efficiency under normal errors
_HALF_LIFE, _LEAST_WEIGHT = 2048, 0.1  # of a sample, in steps since then; of one of long ago
_LEAST_ERROR = 0.02  # relative; fits better than this leave no outliers
# Where samples do not tell apart what took the time, it is put down to the rows of a prompt: chunks then begin too
# small, not too large, and that tells them apart. To ends of prompts least of all, one of which is in many a step with
# prompts: a prompt that is scored has hundreds. They count once samples have so many rows of logits in all.
_RIDGE = np.array([1e-3, 1e-3, 1e-4, 1e-7, 1e-4, 1e-4, 1e-2])
_LEAST_LOGITS = 8
_LEAST_ALONE = 8  # steps without prompts that tell what decodes cost


class Terms(NamedTuple):
    """How much a step has of each thing that costs time, or the seconds that one of each takes.

    Attributes:
        base: the step. prefill_base: that it has prompts. decode_row, prefill_row, decode_context, prefill_context,
            prefill_logits: as ``StepLoad`` counts them.
    """

    base: float = 0.0
    prefill_base: float = 0.0
    decode_row: float = 0.0
    prefill_row: float = 0.0
    decode_context: float = 0.0
    prefill_context: float = 0.0
    prefill_logits: float = 0.0


_TERMS = len(Terms._fields)
_BASE, _PREFILL_ROW, _LOGITS = map(Terms._fields.index, ("base", "prefill_row", "prefill_logits"))
_DECODES = list(map(Terms._fields.index, ("base", "decode_row", "decode_context")))  # of steps without prompts


class StepLoad(msgspec.Struct, frozen=True):
    """What a step computes, as far as it costs time.

    Attributes:
        decode_rows: slices of one token. decode_context: sum of their lengths, the token included.
        prefill_rows: tokens of longer slices. prefill_context: sum over them of the positions each attends to.
            prefill_logits: those of them whose logits are computed.
    """

    decode_rows: int = 0
    decode_context: int = 0
    prefill_rows: int = 0
    prefill_context: int = 0
    prefill_logits: int = 0


def chunk_context(start: int, count: int) -> int:
    """Positions that ``count`` tokens from position ``start`` on attend to, in all."""
    return count * start + count * (count + 1) // 2


class StepCost:
    """Seconds of a step by its load, learned from the steps that were timed.

    Attributes:
        known: whether there is anything to tell from. most_rows, most_logits: the most ``prefill_rows`` and
            ``prefill_logits`` of a step so far.
        margin: times what is expected of a step with both decodes and prompts, within which ``QUANTILE`` of them stay.
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int, int, int], int] = {}  # class of steps -> its first row
        self._seen: dict[tuple[int, int, int, int], int] = {}
        self._rows, self._when, self._steps = np.zeros((0, _TERMS)), np.zeros(0), 0
        self._coefficients = self._apart = Terms()
        self._new = 0
        self._surprised = False
        self.most_rows = self.most_logits = 0
        self.margin = 1.0

    @property
    def known(self) -> bool:
        return bool(self._seen)

    def observe(self, load: StepLoad, seconds: float) -> None:
        """A step of this load took so long; one without a timing (0 seconds) tells nothing. O(1)."""
        if load.prefill_rows:
            self.most_rows = max(self.most_rows, load.prefill_rows)
            self.most_logits = max(self.most_logits, load.prefill_logits)
        if seconds < 1e-9:
            return
        rows, context = load.decode_rows + load.prefill_rows, load.decode_context + load.prefill_context
        logits = (load.prefill_logits.bit_length() + 1) // 2  # by powers of four: ends of prompts are few
        kind = (load.prefill_rows.bit_length(), rows.bit_length(), (context // max(rows, 1)).bit_length(), logits)
        seen = self._seen.get(kind, 0)
        if not seen:
            self._slots[kind] = len(self._slots) * _SAMPLES
            if len(self._slots) * _SAMPLES > len(self._rows):
                more = max(len(self._rows), 16 * _SAMPLES)
                self._rows = np.concatenate([self._rows, np.zeros((more, _TERMS))])
                self._when = np.concatenate([self._when, np.zeros(more)])
        row = self._slots[kind] + seen % _SAMPLES
        features = _features(load)
        # Of a system whose right side is 1: errors are relative.
        self._rows[row] = [value / seconds for value in features]
        self._steps += 1
        self._when[row] = self._steps
        self._seen[kind] = seen + 1
        self._new += 1
        expected = _dot(self._coefficients, features)
        self._surprised |= abs(expected - seconds) > _SURPRISE * seconds
        if load.decode_rows and load.prefill_rows and expected > 0:
            step = QUANTILE if seconds > self.margin * expected else QUANTILE - 1
            self.margin = min(max(self.margin * (1 + _PACE * step), 1.0), MOST_MARGIN)

    def coefficients(self) -> Terms:
        """Seconds, none negative."""
        if self._new >= _REFIT or self._surprised:
            used = np.flatnonzero(self._when)
            fresh = np.maximum(0.5 ** ((self._steps - self._when[used]) / _HALF_LIFE), _LEAST_WEIGHT)
            rows = self._rows[used]
            if (rows[:, _LOGITS] / rows[:, _BASE]).sum() < _LEAST_LOGITS:
                rows[:, _LOGITS] = 0.0
            self._coefficients = self._apart = Terms(*_fit(rows, fresh, _RIDGE).tolist())
            alone = rows[:, _PREFILL_ROW] == 0
            if alone.sum() >= _LEAST_ALONE:
                apart = np.zeros(_TERMS)
                apart[_DECODES] = _fit(rows[alone][:, _DECODES], fresh[alone], _RIDGE[_DECODES])
                self._apart = Terms(*apart.tolist())
            self._new, self._surprised = 0, False
        return self._coefficients

    def seconds(self, load: StepLoad) -> float:
        """What a step of this load is expected to take."""
        return _dot(self.coefficients(), _features(load))

    def seconds_alone(self, decodes: StepLoad) -> float:
        """What a step of these decode rows is expected to take without prompts, or less.

        What the model does not know of prompts it puts down to decodes, whose contexts grow as a prompt's does; and
        steps without prompts, seen by themselves, say little of contexts longer than theirs. The lower of both is not
        too much.
        """
        return min(self.seconds(decodes), _dot(self._apart, _features(decodes)))


class PrefillAllowance:
    """What prompts may take of one step, beside its decodes. Nothing is reckoned until a prompt asks.

    Attributes:
        taken: tokens of prompts that the step computes.
        cut: a prompt got less than it wanted. From then on the step takes no more of any.
        joining: as given; to be changed only until a prompt asks.

    Args:
        cost: what steps take. decodes: the step's decode rows, at least one.
        budget: at most so many tokens, whatever they cost; at least 1. cautious: the same, for prompts of which more
            is left than ``budget``. scored: at most so many whose logits are computed.
        target: seconds that the step may take; None: ``AUTO_SLOWDOWN`` times what its decodes, and ``joining`` rows
            beside them, take alone. limit: seconds that it may not exceed, whatever the target.
    """

    def __init__(
        self,
        cost: StepCost,
        decodes: StepLoad,
        budget: int,
        target: float | None,
        *,
        cautious: int | None = None,
        scored: int | None = None,
        joining: int = 0,
        limit: float = math.inf,
    ) -> None:
        self._cost, self._decodes, self._target, self.joining = cost, decodes, target, joining
        self._limit = limit
        self._tokens, self._cautious = budget, budget if cautious is None else cautious
        self._scored = budget if scored is None else scored
        self._seconds = self._row = self._context = self._logits = 0.0
        self._begun = self.cut = False
        self.taken = self._scored_before = 0

    def take(self, wanted: int, start: int, *, ends: bool = False, scored: bool = False) -> int:
        """How many of ``wanted`` tokens from position ``start`` on to compute now; for the first prompt at least 1.

        Args:
            ends: the last of them is sampled. No token is put off for what that takes, but the next prompt has less.
            scored: the logits of each of them are computed.
        """
        if self.cut:
            return 0
        least = 0
        if not self._begun:
            self._begin()
            least = MIN_CHUNK
        tokens = self._tokens if wanted <= self._tokens else self._cautious
        room, row = max(tokens - self.taken, 0), self._row
        if scored:
            room, row = min(room, max(self._scored - self._scored_before, 0)), row + self._logits
        count = min(wanted, room, max(least, self._fitting(start, row)))
        self.cut = count < wanted
        self.taken += count
        self._scored_before += count if scored else 0
        self._seconds -= row * count + self._context * chunk_context(start, count)
        if ends and not self.cut and not scored:
            self._seconds -= self._logits
        return count

    def _begin(self) -> None:
        self._begun = True
        if not self._cost.known:
            self._seconds = math.inf
            return
        each = self._cost.coefficients()
        self._row, self._context, self._logits = each.prefill_row, each.prefill_context, each.prefill_logits
        alone = self._cost.seconds(self._decodes)
        target = self._target
        if target is None:
            target = AUTO_SLOWDOWN * (self._cost.seconds_alone(self._decodes) + each.decode_row * self.joining)
        self._seconds = min(target, self._limit) / self._cost.margin - alone - each.prefill_base

    def _fitting(self, start: int, row: float) -> int:
        """The largest k with row·k + context·(k·start + k(k+1)/2) <= seconds."""
        if self._seconds <= 0 or self._seconds == math.inf:
            return 0 if self._seconds <= 0 else self._tokens
        linear = row + self._context * (start + 0.5)
        root = linear + math.sqrt(linear * linear + 2 * self._context * self._seconds)
        most = 2 * self._seconds / root if root > 0 else math.inf
        return int(min(most, self._tokens))


class PrefillPacer:
    """Sizes chunks of prompts so that the tokens of running requests keep coming.

    Attributes:
        cost: what steps take.

    Args:
        itl_target: seconds that a step may take in which both decodes and prompts are computed; None: a multiple of
            what its decodes take alone; 0: any.
    """

    def __init__(self, itl_target: float | None) -> None:
        self.cost = StepCost()
        self._target = math.inf if itl_target == 0 else itl_target
        self._last: PrefillAllowance | None = None
        self._most = 0

    def allowance(
        self, decodes: StepLoad, budget: int, joining: int = 0, limit: float = math.inf
    ) -> PrefillAllowance | None:
        """What prompts may take of a step with these decode rows and ``budget`` tokens in all; None: no limit, because
        nobody waits for a next token, or may for any time. ``joining``: prompts that will be decode rows in a step or
        two. ``limit``: seconds, the tightest ITL deadline of the decodes."""
        if not decodes.decode_rows or self._target == limit == math.inf:
            return None
        if self._last is not None and self._last.cut:
            self._most = int(_GROWTH * self._last.taken)
        self._most = max(self._most, MIN_CHUNK, int(_FIRST * budget))
        room = budget - decodes.decode_rows
        believed = max(self._most, int(_GROWTH * self.cost.most_rows))
        self._last = PrefillAllowance(
            self.cost,
            decodes,
            max(1, min(room, believed)),
            self._target,
            cautious=max(1, min(room, self._most)),
            scored=max(1, min(room, max(MIN_CHUNK, int(_FIRST * budget), int(_GROWTH * self.cost.most_logits)))),
            joining=joining,
            limit=limit,
        )
        return self._last


def _features(load: StepLoad) -> Terms:
    """Plain numbers: so few are a tenth of the work that numpy makes of them, in every step."""
    prefills = 1.0 if load.prefill_rows else 0.0
    return Terms(
        1.0,
        prefills,
        load.decode_rows,
        load.prefill_rows,
        load.decode_context,
        load.prefill_context,
        max(load.prefill_logits - 1, 0),
    )


def _dot(coefficients: Terms, features: Terms) -> float:
    return sum(map(mul, coefficients, features))


def _fit(rows: NDArray[np.float64], trust: NDArray[np.float64], ridge: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative coefficients with ``rows @ coefficients`` near 1, by the trust in each row, whatever a few say."""
    scale = np.sqrt((rows * rows).mean(axis=0))
    scale[scale == 0] = 1.0
    columns = rows / scale
    weights = trust
    found = np.zeros(rows.shape[1])
    for _ in range(3):
        weighted = columns * (weights / weights.sum())[:, None]
        gram = columns.T @ weighted
        gram[np.diag_indices_from(gram)] += ridge
        found = _non_negative(gram, weighted.sum(axis=0))
        errors = np.abs(columns @ found - 1.0)
        order = np.argsort(errors)
        middle = np.searchsorted(np.cumsum(trust[order]), trust.sum() / 2)
        usual = max(1.4826 * float(errors[order[middle]]), _LEAST_ERROR)
        weights = trust * np.minimum(1.0, _HUBER * usual / np.maximum(errors, 1e-12))
    return found / scale


def _non_negative(gram: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the least x'Gx - 2·target'x, for a positive definite G: Lawson and Hanson's active set method."""
    x = np.zeros(len(target))
    free = np.zeros(len(target), bool)
    for _ in range(3 * len(target)):
        gradient = np.where(free, -np.inf, target - gram @ x)
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-9:
            break
        free[best] = True
        while True:
            trial = np.zeros(len(target))
            index = np.flatnonzero(free)
            trial[index] = np.linalg.solve(gram[np.ix_(index, index)], target[index])
            falling = free & (trial <= 0)
            if not falling.any():
                break
            share = float((x[falling] / np.maximum(x[falling] - trial[falling], 1e-300)).min())
            x += share * (trial - x)
            free &= x > 1e-15
        x = trial
    return x
