"""What the caller wants of an engine when it is loaded, as one value from the command line to the memory plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmctl.config import EngineOptions, parse_bytes
from llmctl.engine.step import LoraLimits
from llmctl.errors import UsageError
from llmctl.graph.dtypes import COMPUTE_DTYPES, KV_NAMES, KV_SPELLINGS
from llmctl.targets.machine import check_threads

if TYPE_CHECKING:
    from llmctl.targets.base import StepLimits, Target


@dataclass(frozen=True)
class EngineRequest:
    """Limits of a run; None: what the engine was built with, or its target's default.

    Attributes:
        max_model_len: longest sequence, tokens. block_size: tokens a KV block. dtype: dtype to compute in.
        target: what it must have been built for, as ``--target`` spells it: ``cpu``, ``cpu:avx2``, ``cuda:sm_90``.
        max_num_batched_tokens, max_num_seqs: tokens and sampled rows of the largest step.
        kv_cache_dtype: what the KV cache is made of. kv_cache_bytes: its size; None sizes it from the memory available.
        budget: bytes for everything; None takes a share of the memory available.
        gpu_memory_utilization: that share, on a GPU. enforce_eager, threads: how a step is launched, CPU threads.
        lora: adapters that requests may run with; None: none.
        whole_context: layers with a window keep every token as well, in one block table a sequence: for whoever makes
            step plans without a scheduler.
    """

    max_model_len: int | None = None
    block_size: int | None = None
    dtype: str | None = None
    target: str | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    kv_cache_dtype: str | None = None
    kv_cache_bytes: int | None = None
    budget: int | None = None
    gpu_memory_utilization: float | None = None
    enforce_eager: bool | None = None
    threads: int | None = None
    lora: LoraLimits | None = None
    whole_context: bool = False

    @classmethod
    def of(cls, config: EngineOptions) -> EngineRequest:
        """The request that a command's settings make.

        Raises:
            UsageError: ``kv_cache_memory`` is no size, ``dtype`` or ``kv_cache_dtype`` none, ``gpu_memory_utilization``
                no share, ``threads`` more than there are processors, or numbers of adapters that cannot be.
        """
        check_threads(config.threads)
        size, share = config.kv_cache_memory, config.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise UsageError(
                f"--gpu-memory-utilization: expected a share above 0 and up to 1, found {share:g}",
                fix="--gpu-memory-utilization 0.9",
                param="gpu_memory_utilization",
            )
        return cls(
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            dtype=None if check_dtype(config.dtype) == "auto" else config.dtype,
            target=None if config.target == "auto" else config.target,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            kv_cache_dtype=_kv_cache_dtype(config.kv_cache_dtype),
            kv_cache_bytes=parse_bytes(size, param="kv_cache_memory") if size is not None else None,
            gpu_memory_utilization=share,
            enforce_eager=config.enforce_eager or None,
            threads=config.threads,
            lora=_lora(config),
        )

    def step_limits(self, target: Target) -> StepLimits:
        """The largest step: as asked, else the target's own."""
        asked = {"max_num_batched_tokens": self.max_num_batched_tokens, "max_num_seqs": self.max_num_seqs}
        return replace(target.step_limits, **{name: value for name, value in asked.items() if value is not None})

    def check_honoured(self, target: Target) -> None:
        """Refuse what means nothing to a target, and cannot be had from it otherwise.

        Raises:
            UsageError: naming the option.
        """
        if self.threads is not None and "threads" not in target.run_options:
            raise UsageError(
                f"--threads {self.threads}: expected an engine of a target that has this option, found {target.name}",
                fix="leave it out",
                param="threads",
            )

    def without_effect(self, target: Target) -> Iterator[str]:
        """A line for each option that a target passes over: what was asked for is so, or not to be had, without it."""
        for name, why in _NO_EFFECT.items():
            value = getattr(self, name)
            if value is not None and name not in target.run_options:
                option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value:g}")
                yield f"{option} has no effect on an engine for {target.name}: {why}"


_NO_EFFECT = {
    "gpu_memory_utilization": "it takes no GPU's memory; --kv-cache-memory sizes its KV cache",
    "enforce_eager": "it records no steps",
}


def check_lora_enabled(config: EngineOptions, given: Mapping[str, bool]) -> None:
    """Refuse options of adapters without ``--enable-lora``. ``given``: by name, whether they are set."""
    for name, is_set in given.items():
        if is_set and not config.enable_lora:
            raise UsageError(f"--{name.replace('_', '-')} needs --enable-lora", fix="add --enable-lora", param=name)


def _lora(config: EngineOptions) -> LoraLimits | None:
    sizes = {name: getattr(config, name) for name in ("max_loras", "max_lora_rank", "max_cpu_loras")}
    if not config.enable_lora:
        default = EngineOptions()
        check_lora_enabled(config, {name: value != getattr(default, name) for name, value in sizes.items()})
        return None
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, found {value}", param=name)
    cached = config.max_loras if config.max_cpu_loras is None else config.max_cpu_loras
    if cached < config.max_loras:
        raise UsageError(
            f"--max-cpu-loras: expected at least --max-loras {config.max_loras}, found {cached}",
            fix="leave it out",
            param="max_cpu_loras",
        )
    return LoraLimits(config.max_loras, config.max_lora_rank, cached)


def check_dtype(name: str) -> str:
    """The same ``--dtype``, if it is one.

    Raises:
        UsageError: it is none.
    """
    if name not in ("auto", *COMPUTE_DTYPES):
        known = ", ".join(COMPUTE_DTYPES)
        raise UsageError(f"--dtype: expected one of auto, {known}, found '{name}'", param="dtype")
    return name


def _kv_cache_dtype(name: str) -> str | None:
    if name == "auto":
        return None
    if name not in KV_SPELLINGS:
        known = ", ".join(KV_NAMES)
        raise UsageError(f"--kv-cache-dtype: expected one of auto, {known}, found '{name}'", param="kv_cache_dtype")
    return KV_SPELLINGS[name]
