"""Perplexity through the engine; ``divergence.py`` compares two models on the same text.

Perplexities can only be compared under one protocol, so every result states it: the text's token count and hash, the
tokenizer's hash, the context, the stride, and how many tokens were scored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmctl.checkpoint.reader import Checkpoint
from llmctl.engine.generate import score_all
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import SequenceSlice, StepPlan
from llmctl.errors import UsageError
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import checkpoint_runtime
from llmctl.text.tokenizer import Tokenizer

_BATCH = 8  # windows scored at once

OnProgress = Callable[[int, int], None]
Window = tuple[list[int], int]
"""Token ids, and how many of the last are scored."""


@dataclass(frozen=True)
class Protocol:
    """How a text is cut and scored.

    Attributes:
        context: tokens in a window.
        stride: tokens from one window's start to the next; each window after the first scores its last ``stride``
            tokens only. Equal to ``context``: windows without overlap, each scored from its second token on.
        max_tokens: leading tokens of the text that are used; None for all.
    """

    context: int = 512
    stride: int = 512
    max_tokens: int | None = None

    def windows(self, tokens: Sequence[int]) -> list[Window]:
        """(window, how many of its last tokens are scored), in text order; a last window of one token is dropped.

        Raises:
            UsageError: a context or stride that makes no sense, or less than two tokens.
        """
        if not 1 <= self.stride <= self.context or self.context < 2:
            raise UsageError(f"stride {self.stride}: expected 1 to the context, {self.context} (at least 2)")
        text = list(tokens[: self.max_tokens])
        if len(text) < 2:
            raise UsageError(f"perplexity needs at least 2 tokens of text, found {len(text)}")
        found: list[Window] = []
        scored = 1  # tokens up to here are scored, or have no context
        for start in range(0, len(text), self.stride):
            end = min(start + self.context, len(text))
            fresh = end - max(scored, start + 1)
            if fresh > 0:
                found.append((text[start:end], fresh))
            scored = end
            if end == len(text):
                break
        return found


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity with its protocol.

    Attributes:
        perplexity: ``exp(-mean log-probability)`` over ``scored_tokens`` tokens.
        text_sha256: of the token ids used; tokenizer_sha256: of tokenizer.json.
    """

    perplexity: float
    scored_tokens: int
    tokens: int
    context: int
    stride: int
    text_sha256: str
    tokenizer_sha256: str

    def to_json(self) -> dict[str, Any]:
        """The result as JSON data."""
        return asdict(self)


def measure_perplexity(
    checkpoint: Checkpoint, text: str, protocol: Protocol, on_progress: OnProgress | None = None
) -> Perplexity:
    """Perplexity of a model on a text, scored by the engine in f32 on the reference runtime.

    Raises:
        UsageError: too little text; a context longer than the model's.
    """
    tokenizer = Tokenizer.from_files(checkpoint.aux_files(), where=str(checkpoint.path))
    tokens = tokenizer.encode(text, add_special_tokens=False)[: protocol.max_tokens]
    windows = protocol.windows(tokens)
    engine = _engine(checkpoint, protocol.context)
    try:
        perplexity = perplexity_of(engine, windows, on_progress)
    finally:
        engine.close()
    return Perplexity(
        perplexity=perplexity,
        scored_tokens=sum(fresh for _, fresh in windows),
        tokens=len(tokens),
        context=protocol.context,
        stride=protocol.stride,
        text_sha256=hashlib.sha256(torch.tensor(tokens, dtype=torch.int32).numpy().tobytes()).hexdigest(),
        tokenizer_sha256=tokenizer_digest(checkpoint),
    )


def perplexity_of(
    engine: LLMEngine, windows: Sequence[tuple[Sequence[int], int]], on_progress: OnProgress | None = None
) -> float:
    """Perplexity of whatever an engine runs, over the windows of a ``Protocol``.

    Raises:
        CapacityError: a window longer than the engine's max_model_len.
    """
    total, count = 0.0, 0
    for start in range(0, len(windows), _BATCH):
        batch = windows[start : start + _BATCH]
        scores = score_all(engine, [window for window, _ in batch])
        for (_, fresh), values in zip(batch, scores, strict=True):
            total += float(values[-fresh:].astype("float64").sum())
            count += fresh
        if on_progress is not None:
            on_progress(min(start + _BATCH, len(windows)), len(windows))
    return math.exp(-total / count)


def checkpoint_logits(checkpoint: Checkpoint, windows: Sequence[Window]) -> Iterator[Tensor]:
    """The logits that predict each window's scored tokens, f32 ``[scored, vocab]``, on the reference runtime.

    Raises:
        UsageError: a window longer than the model's context.
    """
    runtime = _runtime(checkpoint, max((len(window) for window, _ in windows), default=1), sequences=1)
    try:
        for window, fresh in windows:
            yield runtime.logits(_window_plan(window, runtime.limits.block_size), all_rows=True)[-fresh - 1 : -1]
    finally:
        runtime.close()


def tokenizer_digest(checkpoint: Checkpoint) -> str:
    """sha256 of a checkpoint's tokenizer.json."""
    content = checkpoint.aux_files()["tokenizer.json"]
    return hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()


def _engine(checkpoint: Checkpoint, context: int) -> LLMEngine:
    config = SchedulerConfig(max_num_seqs=_BATCH, max_num_batched_tokens=_BATCH * context, enable_prefix_caching=False)
    return LLMEngine(_runtime(checkpoint, context, _BATCH), config)


def _runtime(checkpoint: Checkpoint, context: int, sequences: int) -> ReferenceRuntime:
    longest = int(checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions") or context)
    if context > longest:
        raise UsageError(f"context {context}: the model's longest is {longest}", param="context")
    blocks = sequences * (-(-context // 16) + 1)
    return checkpoint_runtime(checkpoint, num_blocks=blocks, max_model_len=context)


def _window_plan(window: Sequence[int], block_size: int) -> StepPlan:
    return StepPlan((SequenceSlice("window", window, 0, range(-(-len(window) // block_size)), sample=True),))
