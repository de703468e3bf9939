"""What a cpu target makes of a build's options."""

from __future__ import annotations

from llmctl.config import BuildConfig
from llmctl.errors import UsageError
from llmctl.graph.graph import Graph
from llmctl.graph.passes import DEFAULT_PASSES
from llmctl.targets.base import BuildOptions
from llmctl.targets.cpu.abi import KEYS
from llmctl.targets.cpu.packing import has_dense_head
from llmctl.targets.options import check_kv_cache_dtype, check_lm_head, check_passes, max_model_len

KV_DTYPES = ("bfloat16", "float32", "int8")


def cpu_passes(names: tuple[str, ...] | None, activations: str) -> tuple[str, ...]:
    """The graph passes of a build.

    Raises:
        UsageError: a pass that the native kernels do not know; int8 activations asked for, which they have anyway.
    """
    passes = check_passes(names, "auto", DEFAULT_PASSES, DEFAULT_PASSES)
    if activations == "int8":
        raise UsageError(
            "--activations: expected auto for a cpu target, whose quantized linears take int8 rows by themselves",
            param="activations",
        )
    return passes


def cpu_options(config: BuildConfig, graph: Graph) -> BuildOptions:
    """Every "auto" resolved for the native kernels.

    Raises:
        UsageError: an option that they cannot honour.
    """
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    if dtype == "float16":
        raise UsageError(
            "--dtype: expected bfloat16 or float32 for a cpu target, found 'float16'",
            fix="--dtype bfloat16",
            param="dtype",
        )
    if config.block_size % KEYS:
        raise UsageError(
            f"--block-size: expected a multiple of {KEYS} for a cpu target, found {config.block_size}",
            param="block_size",
        )
    return BuildOptions(
        dtype,
        max_model_len(config, graph),
        config.block_size,
        check_kv_cache_dtype(config.kv_cache_dtype, "cpu", dtype, KV_DTYPES),
        graph.passes,
        _lm_head(config.lm_head, dtype, graph),
    )


def head_is_free(dtype: str, graph: Graph) -> bool:
    """Whether ``--lm-head`` decides how the output head is stored."""
    return dtype != "float32" and has_dense_head(graph)


def _lm_head(name: str, dtype: str, graph: Graph) -> str:
    if head_is_free(dtype, graph):
        quantized = any(weight.quant is not None for weight in graph.weights.values())
        return name if name != "auto" else "int8" if quantized else "dense"
    where = "a float32 engine" if dtype == "float32" else "a checkpoint whose output head is quantized"
    return check_lm_head(name, where)
