"""The same cpu engine with its output head stored another way: what a choice of ``--lm-head`` is measured on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmctl.artifact.loader import LoadedEngine, WeightPlane
from llmctl.artifact.plan import BuildPlan
from llmctl.checkpoint.assemble import assemble
from llmctl.targets.cpu.layout import to_planes
from llmctl.targets.cpu.planes import LM_HEAD_BITS, dense_head, linear_formats_of, pack_linear

HEADS = ("dense", *LM_HEAD_BITS)


def free_head(plan: BuildPlan) -> str | None:
    """The weight of the output head, when ``--lm-head`` decides how it is stored.

    None for other targets than the native CPU kernels, float32 engines, and checkpoints that quantize the head.
    """
    if not plan.target.native_cpu or plan.options.dtype == "float32":
        return None
    return dense_head(plan.graph)


def head_planes(engine: LoadedEngine, name: str) -> dict[str, WeightPlane]:
    """The stored planes that the head's kernel reads, by plane name."""
    fmt = linear_formats_of(name, engine.graph, engine.manifest.options)
    assert fmt is not None, "the head is a linear"
    return {f"{name}.{suffix}": engine.weights[f"{name}.{suffix}"] for suffix in fmt.planes()}


def with_head(engine: LoadedEngine, plan: BuildPlan, lm_head: str) -> LoadedEngine:
    """The engine that ``plan`` made, as if built with that ``--lm-head``; all other weights are shared.

    Args:
        lm_head: one of ``HEADS``.

    Raises:
        CheckpointError: the checkpoint's head cannot be read.
    """
    name, options = free_head(plan), replace(plan.options, lm_head=lm_head)
    if name is None or options == plan.options:
        return engine
    fmt = linear_formats_of(name, plan.graph, options)
    assert fmt is not None, "the head is a linear"
    arrays = to_planes(pack_linear(assemble(plan.graph.weights[name], plan.checkpoint), fmt))
    planes = {
        f"{name}.{suffix}": WeightPlane(dtype, shape, np.asarray(arrays[suffix]))
        for suffix, (dtype, shape) in fmt.planes().items()
    }
    kept = {key: plane for key, plane in engine.weights.items() if key not in head_planes(engine, name)}
    return replace(engine, manifest=replace(engine.manifest, options=options), weights=kept | planes)
