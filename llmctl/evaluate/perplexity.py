"""Perplexity of a model on a text; ``divergence.py`` compares two models on the same text.

Perplexities can only be compared under one protocol: the same tokens of the text, cut and scored alike.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmctl.checkpoint.reader import Checkpoint
from llmctl.engine.generate import score_all
from llmctl.engine.llm_engine import LLMEngine
from llmctl.errors import LlmctlError, UsageError
from llmctl.evaluate.distributions import OnProgress, Window, pieces, targets_of
from llmctl.text.tokenizer import Tokenizer

_BATCH = 8  # windows scored at once


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


def score(distributions: Iterable[Tensor], windows: Sequence[Window], on_progress: OnProgress | None = None) -> float:
    """Mean negative log-likelihood of the windows' scored tokens, nats.

    Args:
        distributions: over the same windows (see ``distributions.py``).
        on_progress: told how many tokens are scored.

    Raises:
        LlmctlError: the model computes something that is not finite.
    """
    total, count = sum(scored for _, scored in windows), 0
    nll = 0.0
    for (index, positions), log_probs in zip(pieces(windows), distributions, strict=True):
        nll -= float(log_probs.gather(1, targets_of(windows[index], positions)[:, None]).sum(dtype=torch.float64))
        count += len(positions)
        if on_progress is not None:
            on_progress(count, total)
    check_finite("the model", nll)
    return nll / total


def check_finite(who: str, value: float) -> None:
    """Refuse a mean of log-probabilities that is no number.

    Raises:
        LlmctlError: as said.
    """
    if not math.isfinite(value):
        raise LlmctlError(f"{who} gives text log-probabilities that are not finite", fix="check its weights")


def scored_windows(checkpoint: Checkpoint, text: str, protocol: Protocol) -> tuple[list[int], list[Window]]:
    """The tokens of a text that a protocol uses, as a checkpoint's tokenizer makes them, and their windows.

    Raises:
        UsageError: too little text; a context longer than the model's.
    """
    check_context(protocol, checkpoint)
    tokenizer = Tokenizer.from_files(checkpoint.aux_files(), where=str(checkpoint.path))
    tokens = tokenizer.encode(text, add_special_tokens=False)[: protocol.max_tokens]
    return tokens, protocol.windows(tokens)


def check_context(protocol: Protocol, checkpoint: Checkpoint) -> None:
    """Refuse windows that the model was not made for.

    Raises:
        UsageError: as said.
    """
    longest = longest_context(checkpoint)
    if longest is not None and protocol.context > longest:
        raise UsageError(f"context {protocol.context}: the model's longest is {longest}", param="context")


def longest_context(checkpoint: Checkpoint) -> int | None:
    """Tokens of the longest context that a checkpoint's config speaks of; None: of none."""
    found = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
    return int(found) if found else None


def token_digest(tokens: Sequence[int]) -> str:
    """sha256 of token ids as i32."""
    return hashlib.sha256(np.array(tokens, np.int32).tobytes()).hexdigest()


def perplexity_from(nll: float) -> float:
    """``exp(nll)``; infinite where that is beyond a float."""
    return math.exp(nll) if nll < math.log(sys.float_info.max) else math.inf


def perplexity_of(engine: LLMEngine, windows: Sequence[Window], on_progress: OnProgress | None = None) -> float:
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


def tokenizer_digest(checkpoint: Checkpoint) -> str:
    """sha256 of a checkpoint's tokenizer.json."""
    content = checkpoint.aux_files()["tokenizer.json"]
    return hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()
