"""What a scheduler is told: its limits and its policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmctl.config import EngineConfig, itl_target_seconds
from llmctl.engine.waiting_queue import POLICIES
from llmctl.errors import UsageError


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits and policy of the scheduler; vLLM's option names.

    Attributes:
        max_num_seqs: requests running at once. max_num_batched_tokens: tokens computed a step.
        enable_prefix_caching: reuse computed blocks of equal prefixes.
        enable_chunked_prefill: prompts may be computed over several steps. Without it a prompt longer than
            ``max_num_batched_tokens`` is refused; only the recompute of a preempted request that has outgrown the
            budget is ever cut.
        policy: of the waiting queue: ``fcfs``, ``priority`` or ``fair`` (``waiting_queue``).
        max_num_queued_reqs: requests waiting beyond which new ones are refused.
        itl_target: seconds that a step may take in which prompts are computed beside decodes; 0: any; None: a multiple
            of what the decodes take alone (``step_cost``). Without chunked prefill it has no effect.
        shed: end requests that missed their TTFT deadline before they were ever scheduled.

    Raises:
        UsageError: a value out of range.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    policy: str = "fcfs"
    max_num_queued_reqs: int = 1024
    itl_target: float | None = 0.0
    shed: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, found {getattr(self, name)}", param=name)
        if self.itl_target is not None and not 0 <= self.itl_target < math.inf:
            raise UsageError(f"itl_target: expected 0 or more seconds, found {self.itl_target}", param="itl_target")
        if self.policy not in POLICIES:
            raise UsageError(
                f"scheduling_policy: expected {', '.join(POLICIES)}, found '{self.policy}'", param="scheduling_policy"
            )

    @classmethod
    def from_engine_config(cls, config: EngineConfig) -> SchedulerConfig:
        """The scheduler's share of a command's settings."""
        return cls(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            enable_chunked_prefill=config.enable_chunked_prefill,
            policy=config.scheduling_policy,
            max_num_queued_reqs=config.max_num_queued_reqs,
            itl_target=itl_target_seconds(config.itl_target),
            shed=config.shed,
        )
