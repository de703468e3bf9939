"""What the targets' rooms share in resolving the options of a build: one mistake has one refusal."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from llmctl.config import BuildConfig
from llmctl.errors import UsageError
from llmctl.graph.dtypes import KV_SPELLINGS, kv_name
from llmctl.graph.family_table import FAMILIES
from llmctl.graph.graph import Graph
from llmctl.targets.base import BuildOptions

logger = logging.getLogger(__name__)

INT8_PASS = "int8_activations"


def check_passes(
    names: tuple[str, ...] | None, activations: str, default: tuple[str, ...], known: Sequence[str]
) -> tuple[str, ...]:
    """The passes that a build's options name.

    Args:
        names: ``--passes``; None: ``default``. activations: ``int8`` adds the pass that makes them.

    Raises:
        UsageError: a pass that is not known.
    """
    wanted = default if names is None else () if names == ("none",) else names
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(
            f"--passes: expected none, or some of {', '.join(known)}, found '{unknown[0]}'", param="passes"
        )
    return wanted if activations != "int8" or INT8_PASS in wanted else (*wanted, INT8_PASS)


def check_range(dtype: str, graph: Graph, checkpoint_dtype: str = "", *, auto: bool) -> str:
    """The compute dtype, which is not float16 for a family whose activations leave its range.

    Args:
        auto: nobody asked for ``dtype``: float16, which the checkpoint's is, becomes bfloat16, and a warning says so.

    Raises:
        UsageError: somebody asked for float16.
    """
    family = FAMILIES.get(graph.family)
    if dtype != "float16" or family is None or not family.wide_range:
        return dtype
    if not auto:
        raise UsageError(
            f"--dtype: expected bfloat16 or float32 for {family.name} models, whose activations leave the range of "
            "float16, found 'float16'",
            fix="--dtype auto",
            param="dtype",
        )
    logger.warning(
        "the checkpoint is %s, but activations of %s models leave its range: computing in bfloat16",
        checkpoint_dtype, family.name,
    )  # fmt: skip
    return "bfloat16"


def check_kv_cache_dtype(name: str, kind: str, dtype: str, known: Sequence[str]) -> str:
    """The KV cache's dtype that an option names, one of ``known``; "auto" is the compute ``dtype``.

    Raises:
        UsageError: another.
    """
    found = {"auto": dtype, **KV_SPELLINGS}.get(name, name)
    if found not in known:
        raise UsageError(
            f"--kv-cache-dtype: expected one of auto, {', '.join(map(kv_name, known))} for a {kind} target that "
            f"computes in {dtype}, found '{name}'",
            param="kv_cache_dtype",
        )
    return found


def check_lm_head(name: str, where: str) -> str:
    """How a head is stored that nobody packs: dense.

    Raises:
        UsageError: another way; ``where`` says what does not have it.
    """
    if name not in ("auto", "dense"):
        raise UsageError(f"--lm-head: expected auto or dense for {where}, found '{name}'", param="lm_head")
    return "dense"


def max_model_len(config: BuildConfig, graph: Graph) -> int:
    """The longest sequence that is asked for, or else the model's own limit, tokens."""
    return graph.max_position if config.max_model_len is None else config.max_model_len


def plain_rebuild_options(built: BuildOptions, default_passes: tuple[str, ...]) -> dict[str, Any]:
    """The options of ``llmctl build`` that lead to ``built`` again, the output head's not among them."""
    int8 = built.passes[-1:] == (INT8_PASS,)
    passes = built.passes[:-1] if int8 else built.passes
    return {
        "dtype": built.dtype,
        "max_model_len": built.max_model_len,
        "block_size": built.block_size,
        "kv_cache_dtype": None if built.kv_cache_dtype == built.dtype else built.kv_cache_dtype,
        "activations": "int8" if int8 else None,
        "lm_head": None,
        "passes": None if passes == default_passes else passes or ("none",),
    }
