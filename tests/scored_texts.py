"""What checkpoints and runtimes make of a text, by the parts that ``llmctl eval`` and engines are made of."""

from __future__ import annotations

import numpy as np

from llmctl.checkpoint.reader import Checkpoint
from llmctl.engine.generate import score_all
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import Runtime
from llmctl.evaluate.distributions import CheckpointDistributions
from llmctl.evaluate.divergence import Divergence, divergence
from llmctl.evaluate.perplexity import Protocol, perplexity_from, score, scored_windows


def perplexity(checkpoint: Checkpoint, text: str, protocol: Protocol) -> float:
    """Of the tokens that the protocol scores."""
    _, windows = scored_windows(checkpoint, text, protocol)
    return perplexity_from(score(CheckpointDistributions(checkpoint, windows), windows))


def compare(original: Checkpoint, other: Checkpoint, text: str, protocol: Protocol) -> Divergence:
    """``other`` against ``original``."""
    _, windows = scored_windows(original, text, protocol)
    return divergence(CheckpointDistributions(original, windows), CheckpointDistributions(other, windows), windows)


def scores(runtime: Runtime, tokens: list[list[int]]) -> np.ndarray:
    """Log-probabilities of all tokens but the first of each sequence, one sequence after the other."""
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, enable_prefix_caching=False)
    engine = LLMEngine(runtime, config)
    try:
        return np.concatenate(score_all(engine, tokens))
    finally:
        engine.close()
