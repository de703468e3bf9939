"""What the caller wants of an engine when it is loaded, as one value from the command line to the memory plan."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.config import EngineConfig, parse_bytes


@dataclass(frozen=True)
class EngineRequest:
    """Limits of a run; None: what the engine was built with.

    Attributes:
        max_model_len: longest sequence, tokens. block_size: tokens a KV block. dtype: dtype to compute in.
        target: what it must have been built for, as ``--target`` spells it: ``cpu``, ``cpu:avx2``, ``cuda:sm_90``.
        max_num_batched_tokens, max_num_seqs: tokens and sampled rows of the largest step.
        kv_cache_bytes: KV cache size; None sizes it from the memory available.
        budget: bytes for everything; None takes a share of the memory available.
    """

    max_model_len: int | None = None
    block_size: int | None = None
    dtype: str | None = None
    target: str | None = None
    max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens
    max_num_seqs: int = EngineConfig.max_num_seqs
    kv_cache_bytes: int | None = None
    budget: int | None = None

    @classmethod
    def of(cls, config: EngineConfig) -> EngineRequest:
        """The request that a command's settings make.

        Raises:
            UsageError: ``kv_cache_memory`` is no size.
        """
        size = config.kv_cache_memory
        return cls(
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            dtype=None if config.dtype == "auto" else config.dtype,
            target=None if config.target == "auto" else config.target,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            kv_cache_bytes=parse_bytes(size, param="kv_cache_memory") if size else None,
        )
