"""The engine that a plan made, as if built with other options: what a choice among them is measured on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from llmctl.artifact.loader import LoadedEngine
from llmctl.artifact.plan import BuildPlan
from llmctl.checkpoint.assemble import assemble
from llmctl.checkpoint.safetensors_io import numpy_dtype, plane_bytes
from llmctl.targets.base import BuildOptions
from llmctl.targets.planes import WeightPlane


def with_options(engine: LoadedEngine, plan: BuildPlan, options: BuildOptions) -> LoadedEngine:
    """The engine with those options; weights that they store alike are shared.

    Args:
        engine: what ``plan`` made, loaded. options: of the same graph, dtype and cache.

    Raises:
        CheckpointError: a weight that they store otherwise cannot be read.
    """
    weights = dict(engine.weights)
    target, graph = plan.target, plan.graph
    for name, planes in target.planes(graph, options, plan.checkpoint.describe).items():
        if planes == plan.planes[name]:  # all of them: one alike by name and shape may hold other numbers
            continue
        contents = target.pack(name, partial(assemble, graph.weights[name], plan.checkpoint), planes, graph, options)
        for plane in plan.planes[name]:
            del weights[plane.name]
        for plane in planes:
            array = np.frombuffer(plane_bytes(contents[plane.name]), numpy_dtype(plane.dtype)).reshape(plane.shape)
            weights[plane.name] = WeightPlane(plane.dtype, plane.shape, array)
    return replace(engine, manifest=replace(engine.manifest, options=options), weights=weights)
