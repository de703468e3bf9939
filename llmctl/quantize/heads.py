"""What each ``--lm-head`` costs in perplexity: one text through one engine, its output head stored each way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmctl.artifact.loader import LoadedEngine, load_engine
from llmctl.artifact.plan import BuildPlan
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.artifact.variant import with_options
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.errors import LlmctlError
from llmctl.evaluate.distributions import OnProgress, Window
from llmctl.evaluate.perplexity import Protocol, perplexity_of
from llmctl.graph.experts import multiplications
from llmctl.targets.planes import Plane, total_bytes
from llmctl.text.tokenizer import Tokenizer

_CONTEXT = 512
_MAX_TOKENS = 4096
_MIN_TOKENS = 32
_ROWS = 64  # logits made at once: the head is read once for so many
_SEQUENCES = 2
_MAX_WORK = 4e12
"""Multiply-adds that a comparison may take: under a minute at 100 G/s, the slowest of the kernels' useful variants."""


@dataclass(frozen=True)
class HeadEffect:
    """One way to store the head: its bytes, and the perplexity of the whole engine with it."""

    lm_head: str
    bytes: int
    perplexity: float


@dataclass(frozen=True)
class HeadComparison:
    """Every ``--lm-head`` on the same ``tokens`` tokens of text, in windows of ``context``; ``chosen``: the built."""

    chosen: str
    text: str
    tokens: int
    context: int
    heads: tuple[HeadEffect, ...]

    def change(self, head: HeadEffect) -> float:
        """A head's perplexity over the dense one's, less 1."""
        dense = next(h for h in self.heads if h.lm_head == "dense")
        return head.perplexity / dense.perplexity - 1


def compare_heads(
    path: Path,
    plan: BuildPlan,
    tokenizer: Tokenizer,
    text: str,
    name: str,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> HeadComparison | None:
    """Measure the engine that ``plan`` made at ``path``; None when ``--lm-head`` decides nothing there.

    A large model is measured on the leading part of the text that ``_MAX_WORK`` allows.

    Args:
        name: what the result calls the text.
        on_progress: told which head is measured, how many windows are scored, and of how many.

    Raises:
        LlmctlError: the engine does not run here, or the model is too large for even a short text.
    """
    heads = plan.target.lm_heads(plan.graph, plan.options)
    if not heads:
        return None
    tokens = tokenizer.encode(text, add_special_tokens=False)
    tokens = tokens[: min(_MAX_TOKENS, _affordable(plan, len(heads)))]
    if len(tokens) < 2:
        raise LlmctlError("the text has no two tokens")
    if max(tokens) >= plan.graph.vocab_size:
        raise LlmctlError(f"the tokenizer gives id {max(tokens)}, the model has {plan.graph.vocab_size}")
    protocol = Protocol(context := min(_CONTEXT, plan.options.max_model_len), context)
    windows, block = protocol.windows(tokens), plan.options.block_size
    request = EngineRequest(
        max_model_len=context,
        max_num_batched_tokens=context,
        max_num_seqs=_ROWS,
        kv_cache_bytes=_SEQUENCES * -(-context // block) * block * plan.memory.kv_per_token,
        whole_context=True,
    )
    if on_progress is not None:
        on_progress(heads[0], 0, len(heads) * len(windows))
    engine, sizes = load_engine(path, request), _sizes(plan, heads)
    effects: list[HeadEffect] = []
    for head in heads:
        swapped = with_options(engine, plan, replace(plan.options, lm_head=head))
        done = len(effects) * len(windows)
        tell = None if on_progress is None else _of_all(on_progress, head, done, len(heads) * len(windows))
        effects.append(HeadEffect(head, sizes[head], _perplexity(swapped, windows, tell)))
    return HeadComparison(plan.options.lm_head, name, len(tokens), context, tuple(effects))


def _affordable(plan: BuildPlan, heads: int) -> int:
    """Tokens of text that every head can be measured on."""
    macs = sum(multiplications(plan.graph, op) for op in plan.graph.products())
    tokens = int(_MAX_WORK / (heads * macs))
    if tokens < _MIN_TOKENS:
        raise LlmctlError(f"a model of {macs / 1e9:.0f} G weights would take minutes")
    return tokens


def _sizes(plan: BuildPlan, heads: Sequence[str]) -> dict[str, int]:
    """Bytes that each head's kernel reads: its planes, but for those that all have (a table of tied embeddings)."""
    planes: dict[str, set[Plane]] = {
        head: set(plan.target.planes(plan.graph, replace(plan.options, lm_head=head))[plan.graph.head])
        for head in heads
    }
    common: set[Plane] = set.intersection(*planes.values())
    return {head: total_bytes(found - common) for head, found in planes.items()}


def _of_all(on_progress: Callable[[str, int, int], None], head: str, before: int, total: int) -> OnProgress:
    """A head's progress as that of the whole comparison."""
    return lambda done, _: on_progress(head, before + done, total)


def _perplexity(engine: LoadedEngine, windows: list[Window], on_progress: OnProgress | None) -> float:
    config = SchedulerConfig(
        engine.sizes.max_num_seqs, engine.sizes.max_num_batched_tokens, enable_prefix_caching=False
    )
    llm = LLMEngine(open_runtime(engine), config)
    try:
        return perplexity_of(llm, windows, on_progress)
    finally:
        llm.close()
