"""A runtime without a model: the next token is a hash of the request's own history, read back through a paged store.

A wrong block table, a stale block, a slot written by another request or a wrong token fed from the step before changes
the history that is read, and with it the tokens. ``expected_tokens`` says what a request must yield, whatever it is
batched with. With KV groups the history is what each of them sees, one after the other.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmctl.engine.block_pool import BlockPool
from llmctl.engine.request import Request
from llmctl.engine.sampling_batch import SamplingBatcher
from llmctl.engine.step import (
    IN_FLIGHT,
    RuntimeLimits,
    SamplingBatch,
    SequenceSlice,
    StepPlan,
    StepResult,
    TokenLogprobs,
    TokenScores,
)

EMPTY = (-1, -1, -1)
HIDDEN = 3


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def next_token(history: Sequence[tuple[int, int]], sampling: SamplingBatch, row: int, vocab_size: int) -> int:
    """The fake model and sampler. ``history``: (token, position) pairs."""
    draw = 0 if sampling.temperature[row] == 0 else (int(sampling.seeds[row]), int(sampling.positions[row]))
    penalised = () if sampling.output_ids is None else tuple(sampling.output_ids[row].tolist())
    first = _hash(list(history), draw, penalised)
    forbidden, favoured = set(), []
    if sampling.bias_rows is not None:
        at = sampling.bias_rows == row
        values = dict(zip(sampling.bias_ids[at].tolist(), sampling.bias_values[at].tolist(), strict=True))
        forbidden = {i for i, v in values.items() if v == -np.inf}
        favoured = [i for i, v in values.items() if v == 100.0]
    mask = sampling.allowed_mask
    for token in (*favoured, *((first + offset) % vocab_size for offset in range(vocab_size))):
        if token not in forbidden and (mask is None or mask[row, token // 32] >> (token % 32) & 1):
            return token
    raise AssertionError("every token is forbidden")


def seen(history: Sequence[tuple[int, int]], windows: Sequence[int]) -> list[tuple[int, int]]:
    """What the KV groups see of a history, each through its window (0: all of it)."""
    return [pair for window in windows for pair in (history[-window:] if window else history)]


def score_of(history: Sequence[tuple[int, int]], target: int) -> float:
    return -(_hash(list(history), "score", target) % 1000) / 100


def hidden_of(history: Sequence[tuple[int, int]]) -> np.ndarray:
    """A token's hidden state, f32 [HIDDEN]: integers, whose sums are exact in any order."""
    return np.array([_hash(list(history), "hidden", i) % 1000 for i in range(HIDDEN)], np.float32)


def scores_of(histories: Sequence[Sequence[tuple[int, int]]], targets: Sequence[int], top: int) -> TokenScores:
    """Ranks are a hash, too; the most likely tokens are those from the target on, each a little less likely."""
    scores = TokenScores.zeros(len(targets), top)
    for i, (history, target) in enumerate(zip(histories, targets, strict=True)):
        scores.logprobs[i] = score_of(history, target)
        scores.ranks[i] = _hash(list(history), "rank", target) % 50
        scores.top_ids[i] = target + np.arange(top)
        scores.top_logprobs[i] = scores.logprobs[i] - np.arange(top)
    return scores


class _Pending:
    def __init__(self, runtime: FakeRuntime, plan: StepPlan, sampling: SamplingBatch) -> None:
        self.runtime, self.plan = runtime, plan
        self.sampling = replace(sampling, allowed_mask=sampling.mask(), grammar_mask=None)
        self.value: StepResult | None = None

    def result(self) -> StepResult:
        self.runtime.run_until(self)
        assert self.value is not None
        return self.value


class FakeRuntime:
    """Executes steps in order, each when its result is first asked for (as a device would, later)."""

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        max_model_len: int = 64,
        vocab_size: int = 40,
        steps_in_flight: int = 1,
        seconds_a_token: float = 0.0,
        windows: tuple[int, ...] = (0,),
    ) -> None:
        self.limits = RuntimeLimits(num_blocks, block_size, max_model_len, vocab_size, windows)
        self.steps_in_flight, self.kernels = steps_in_flight, ""
        self.seconds_a_token = seconds_a_token
        self.store = [EMPTY] * ((num_blocks + 1) * block_size)  # the null block's stay empty
        self.queue: deque[_Pending | list[int]] = deque()
        self.sampled: dict[str, int] = {}  # by the last step executed
        self.plans: list[StepPlan] = []
        self.computed_tokens = 0
        self.closed = False

    def execute(self, plan: StepPlan, sampling: SamplingBatch) -> _Pending:
        assert plan.slices
        assert sum(isinstance(entry, _Pending) for entry in self.queue) < self.steps_in_flight
        assert len(sampling.temperature) == sum(s.sample for s in plan.slices)
        self.plans.append(plan)
        pending = _Pending(self, plan, sampling)
        self.queue.append(pending)
        return pending

    def run_until(self, pending: _Pending) -> None:
        while pending.value is None:
            current = self.queue.popleft()
            if isinstance(current, _Pending):
                current.value = self._run(current.plan, current.sampling)
            else:
                self._wipe(current)

    def wipe_allocated(self, pool: BlockPool) -> None:
        """From now on a block loses its content when it is handed out, between the steps before and those after."""
        allocate = pool.allocate

        def allocated(count: int) -> list[int]:
            blocks = allocate(count)
            self.queue.append(blocks)
            return blocks

        pool.allocate = allocated  # type: ignore[method-assign]

    def _wipe(self, blocks: list[int]) -> None:
        size = self.limits.block_size
        for block in blocks:
            self.store[block * size : (block + 1) * size] = [EMPTY] * size

    def close(self) -> None:
        self.closed = True

    def _slot(self, piece: SequenceSlice, group: int, position: int) -> int:
        size = self.limits.block_size
        return piece.tables[group][position // size] * size + position % size

    def _history(self, piece: SequenceSlice, length: int) -> list[tuple[int, int]]:
        found = []
        for group, window in enumerate(self.limits.windows):
            for position in range(max(0, length - window) if window else 0, length):
                token, *written = self.store[self._slot(piece, group, position)]
                assert written == [position, group], "a slot was never written, or by another"
                found.append((token, position))
        return found

    def _tokens(self, piece: SequenceSlice) -> Sequence[int]:
        if IN_FLIGHT not in piece.token_ids:
            return piece.token_ids
        assert self.steps_in_flight > 1
        assert len(piece.token_ids) == 1
        return [self.sampled[piece.request_id]]

    def _run(self, plan: StepPlan, sampling: SamplingBatch) -> StepResult:
        written = set()
        for piece in plan.slices:
            assert len(piece.token_ids) > 0
            assert len(piece.tables) == len(self.limits.windows)
            for offset, token in enumerate(self._tokens(piece)):
                for group in range(len(piece.tables)):
                    slot = self._slot(piece, group, piece.start + offset)
                    assert slot not in written, "two tokens of one step share a slot"
                    assert slot < self.limits.num_blocks * self.limits.block_size, "a token has no block"
                    written.add(slot)
                    self.store[slot] = (token, piece.start + offset, group)
        num_tokens = sum(len(piece.token_ids) for piece in plan.slices)
        self.computed_tokens += num_tokens
        sampled = [piece for piece in plan.slices if piece.sample]
        assert sampling.positions.tolist() == [piece.start + len(piece.token_ids) for piece in sampled]
        tokens, logprobs, scores, pooled = [], [], {}, {}
        for piece in plan.slices:
            if piece.score_targets is not None:
                histories = [self._history(piece, piece.start + i + 1) for i in range(len(piece.score_targets))]
                scores[piece.request_id] = scores_of(histories, piece.score_targets, piece.score_top)
            if piece.pool_rows:
                end = piece.start + len(piece.token_ids)
                rows = [hidden_of(self._history(piece, i + 1)) for i in range(end - piece.pool_rows, end)]
                pooled[piece.request_id] = np.sum(rows, 0)
            if piece.sample:
                row = len(tokens)
                history = self._history(piece, piece.start + len(piece.token_ids))
                tokens.append(next_token(history, sampling, row, self.limits.vocab_size))
                wanted = -1 if sampling.num_logprobs is None else int(sampling.num_logprobs[row])
                logprobs.append(None if wanted < 0 else TokenLogprobs(-1.5, 2, tuple(range(wanted)), (-0.5,) * wanted))
        self.sampled = {piece.request_id: token for piece, token in zip(sampled, tokens, strict=True)}
        given = logprobs if any(p is not None for p in logprobs) else None
        seconds = self.seconds_a_token * num_tokens
        return StepResult(np.array(tokens, np.int32), given, scores, seconds, pooled=pooled)


def expected_tokens(
    request: Request, seed: int, limits: RuntimeLimits, eos: frozenset[int], longest: int | None = None
) -> list[int]:
    """What a request yields when it runs alone: no blocks, no batching, no scheduler.

    ``longest``: tokens of the longest sequence, where that is not what all blocks hold."""
    alone = Request(request.request_id, request.prompt_token_ids, request.params)
    alone.seed = seed
    params = request.params
    if longest is None:
        longest = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    end = longest if params.max_tokens is None else alone.num_prompt_tokens + params.max_tokens
    while alone.num_tokens < end:
        sampling = SamplingBatcher(limits.vocab_size, eos).batch((alone,), (alone.num_tokens,))
        history = [(token, position) for position, token in enumerate(alone.token_ids)]
        token = next_token(seen(history, limits.windows), sampling, 0, limits.vocab_size)
        alone.token_ids.append(token)
        if alone.num_output_tokens > params.min_tokens and (
            token in params.stop_token_ids or (token in eos and not params.ignore_eos)
        ):
            break
    return alone.output_token_ids
