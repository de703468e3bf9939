"""Plain data between the engine and a runtime: what one step computes, how its rows are sampled, what came out.

No tensors of any device library here; numpy arrays only where a batch is numeric. What is made anew for every
token is a msgspec struct: a frozen dataclass takes about five times as long to make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llmctl.checkpoint.adapters.adapter import Adapter

IN_FLIGHT = -1
"""In place of a slice's single token id: the token that the step executed just before this one samples for the
request of the same ``request_id``. Only a runtime with ``steps_in_flight`` above 1 is given it."""


class SequenceSlice(msgspec.Struct, frozen=True):
    """The tokens of one request that one step computes.

    Attributes:
        request_id: the request.
        token_ids: the tokens to compute, positions ``start .. start+len-1``; a single one may be ``IN_FLIGHT``.
        start: tokens of this request that are in the KV cache already, or are put there by the step before.
        block_ids: the request's block table, long enough to hold ``start + len(token_ids)`` tokens. A runtime may
            keep what it made of a tuple for as long as it is given that very tuple again. Where a window hides a block
            from this token on, the table of its group may name ``RuntimeLimits.null_block``.
        sample: the logits of the last token are sampled (false inside a chunked prefill).
        score_targets: when set, the log-probability of ``score_targets[i]`` after ``token_ids[:i+1]`` is wanted
            (prompt log-probabilities, perplexity); at most ``len(token_ids)`` ids.
        score_top: how many of the most likely tokens are wanted beside each of them.
        pool_rows: the hidden states (after the final norm, before the output head) of so many tokens from the end on
            are wanted, added up (embeddings); 0: none.
        adapter: slot of the LoRA adapter that it runs with; -1: none.
        more_block_ids: the tables of the further KV groups (``RuntimeLimits.windows``); ``block_ids`` is the first's.
    """

    request_id: str
    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    sample: bool
    score_targets: Sequence[int] | None = None
    score_top: int = 0
    pool_rows: int = 0
    adapter: int = -1
    more_block_ids: tuple[Sequence[int], ...] = ()

    @property
    def tables(self) -> tuple[Sequence[int], ...]:
        """A block table for each KV group."""
        return (self.block_ids, *self.more_block_ids)

    @property
    def logits_rows(self) -> int:
        """Rows of logits that it takes: one for each target, and one if it is sampled."""
        return (0 if self.score_targets is None else len(self.score_targets)) + self.sample


class StepPlan(msgspec.Struct, frozen=True):
    """One step: slices in batch order. ``SamplingBatch`` row i belongs to the i-th slice with ``sample`` true."""

    slices: tuple[SequenceSlice, ...]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters of R rows. A field is None when no row asks for that op.

    Order of ops: logit bias / token mask -> penalties -> (greedy argmax, or) temperature -> top-k -> top-p -> min-p
    -> one draw by inverse CDF with the uniform ``philox(seed, position)``, so that a seed gives the same tokens in
    any batch.

    Attributes:
        temperature: f32 [R]; 0 means greedy (exact argmax, lowest id on ties).
        seeds: u64 [R]; positions: i64 [R], index of the token being sampled in its sequence.
        top_k: i32 [R], 0 = off; top_p: f32 [R], 1 = off; min_p: f32 [R], 0 = off.
        repetition_penalty: f32 [R], 1 = off, over prompt and output.
        presence_penalty, frequency_penalty: f32 [R], 0 = off, over output.
        prompt_ids / output_ids: per row i32 [n], given when any penalty is.
        bias_rows, bias_ids: i32 [n]; bias_values: f32 [n]: additive logit bias in coordinate form (-inf forbids).
        allowed_mask: u32 [R, ceil(V/32)], bit v%32 of word v//32 set when token v may be sampled (allowed_token_ids).
        grammar_mask: makes the mask that holds in its place where a grammar restricts some row. See ``mask``.
        num_logprobs: i32 [R]; -1 = none, 0 = the sampled token's only, n = the n most likely as well.
            Log-probabilities are of the model's raw distribution (before bias, penalties and temperature), as OpenAI
            and vLLM report them.

    Nobody changes an array of a batch. From step to step the same array object may come again.
    """

    temperature: NDArray[np.float32]
    seeds: NDArray[np.uint64]
    positions: NDArray[np.int64]
    top_k: NDArray[np.int32] | None = None
    top_p: NDArray[np.float32] | None = None
    min_p: NDArray[np.float32] | None = None
    repetition_penalty: NDArray[np.float32] | None = None
    presence_penalty: NDArray[np.float32] | None = None
    frequency_penalty: NDArray[np.float32] | None = None
    prompt_ids: tuple[NDArray[np.int32], ...] | None = None
    output_ids: tuple[NDArray[np.int32], ...] | None = None
    bias_rows: NDArray[np.int32] | None = None
    bias_ids: NDArray[np.int32] | None = None
    bias_values: NDArray[np.float32] | None = None
    allowed_mask: NDArray[np.uint32] | None = None
    num_logprobs: NDArray[np.int32] | None = None
    grammar_mask: Callable[[], NDArray[np.uint32]] | None = None

    @property
    def masked(self) -> bool:
        """Whether there is a mask."""
        return self.allowed_mask is not None or self.grammar_mask is not None

    def mask(self) -> NDArray[np.uint32] | None:
        """The mask of the step's rows. To be asked for once, in ``execute``, as late as may be: a grammar takes some
        ten µs a row to say what comes next, which pass unnoticed while a device computes the logits."""
        return self.allowed_mask if self.grammar_mask is None else self.grammar_mask()


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one sampled position: the sampled token's, its rank (1 = most likely), and the top n."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class TokenScores(msgspec.Struct, frozen=True, array_like=True, eq=False):
    """Log-probabilities of n given tokens: what ``TokenLogprobs`` is for one, in arrays.

    Attributes:
        logprobs: f32 [n]. ranks: i32 [n], 1 = most likely.
        top_ids: i32 [n, k], top_logprobs: f32 [n, k]: the most likely tokens, best first, of equals the lowest id
            first; k is no more than the vocabulary.
    """

    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]

    @classmethod
    def zeros(cls, count: int, top: int = 0) -> TokenScores:
        """Of ``count`` tokens, to be ``put`` in."""
        return cls(
            np.zeros(count, np.float32),
            np.zeros(count, np.int32),
            np.zeros((count, top), np.int32),
            np.zeros((count, top), np.float32),
        )

    def __len__(self) -> int:
        return len(self.logprobs)

    def put(self, start: int, part: TokenScores) -> None:
        """Take in those of the tokens from ``start`` on."""
        for name in self.__struct_fields__:
            getattr(self, name)[start : start + len(part)] = getattr(part, name)

    def part(self, start: int, count: int, top: int) -> TokenScores:
        """Those of ``count`` tokens from ``start`` on, with the ``top`` most likely (a view)."""
        rows = slice(start, start + count)
        tops = self.top_ids[rows, :top], self.top_logprobs[rows, :top]
        return TokenScores(self.logprobs[rows], self.ranks[rows], *tops)

    def entries(self, counts: Iterable[int]) -> list[TokenLogprobs | None]:
        """One a token, with as many of the most likely ones as ``counts`` says; None where it says -1."""
        columns = (getattr(self, name).tolist() for name in self.__struct_fields__)
        rows = zip(*columns, counts, strict=True)
        return [
            TokenLogprobs(own, rank, tuple(ids[:n]), tuple(top[:n])) if n >= 0 else None
            for own, rank, ids, top, n in rows
        ]


class StepResult(msgspec.Struct, frozen=True):
    """What a step produced.

    Attributes:
        token_ids: i32 [R], in SamplingBatch row order.
        logprobs: one entry per row, None where not asked for; None when nobody asked.
        scores: request id -> the log-probabilities of the slice's ``score_targets``.
        compute_seconds: wall time in which the device computed this step and no other; what passes beyond it is the
            engine's own.
        execution: how a step that can be replayed was run; empty where there is no such choice.
        pooled: request id -> f32 [hidden size], the sum over the slice's ``pool_rows``, added up in float32.
    """

    token_ids: NDArray[np.int32]
    logprobs: Sequence[TokenLogprobs | None] | None = None
    scores: Mapping[str, TokenScores] = {}
    compute_seconds: float = 0.0
    execution: Literal["", "graph", "eager"] = ""
    pooled: Mapping[str, NDArray[np.float32]] = {}


class PendingStep(Protocol):
    """A step that a device may still be running."""

    def result(self) -> StepResult:
        """Block until the step is done."""
        ...


@dataclass(frozen=True, slots=True)
class RuntimeLimits:
    """What a runtime was built and sized for.

    Attributes:
        num_blocks: KV blocks in the pool. block_size: tokens a block.
        max_model_len: longest sequence, tokens. vocab_size: width of the logits.
        windows: of each KV group, whose layers share a block table: how many positions they see, their own included;
            0: all. A block is for one group; those that see most come first.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    windows: tuple[int, ...] = (0,)

    @property
    def null_block(self) -> int:
        """What tables name in place of a block that a window hides for good: a block of zeros, beyond the pool's, which
        kernels may read as long as nothing comes of it, and nobody writes."""
        return self.num_blocks


@dataclass(frozen=True)
class LoraLimits:
    """What a run holds of adapters.

    Attributes:
        slots: adapters on the device at once. rank: the largest that one may have. cached: adapters in the host's
            memory, those on the device among them.
    """

    slots: int
    rank: int
    cached: int


class AdapterHost(Protocol):
    """The adapters of a runtime: so many slots of one size, which slices name."""

    def prepare(self, adapter: Adapter) -> Any:
        """An adapter as this runtime takes it; may run in any thread, beside steps.

        Raises:
            UnsupportedModelError: it does more than this runtime can add, has a larger rank than the slots, or acts on
                a module that they do not hold.
        """
        ...

    def put(self, slot: int, prepared: Any) -> None:
        """Fill a slot with what ``prepare`` made, for the steps that are executed after this."""
        ...


class Runtime(Protocol):
    """Interprets a Graph on some device.

    Attributes:
        limits: what it was built and sized for.
        steps_in_flight: steps that may be handed over before the oldest one's result is asked for. 1: ``execute``
            returns when the step is done. 2: it returns before, steps are executed in the order in which they came,
            and what one of them samples can be fed to the next (``IN_FLIGHT``).
        kernels: which build of its kernels runs and why not a faster one; empty where the engine's target says it.
    """

    limits: RuntimeLimits
    steps_in_flight: int
    kernels: str

    @property
    def adapters(self) -> AdapterHost | None:
        """Those that it was sized for; None: none."""
        ...

    def execute(self, plan: StepPlan, sampling: SamplingBatch) -> PendingStep:
        """Start one step; ``sampling`` has one row per slice of ``plan`` with ``sample`` true.

        A row or slice of a request that has ended meanwhile is computed like any other; nobody reads what it gave.
        """
        ...

    def close(self) -> None:
        """Free the device's memory."""
        ...


class DoneStep(msgspec.Struct, frozen=True):
    """A PendingStep that is already done."""

    value: StepResult

    def result(self) -> StepResult:
        """The result, at once."""
        return self.value
