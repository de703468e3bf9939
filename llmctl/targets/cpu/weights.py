"""The weights of a CPU runtime out of an engine: planes as they lie in the mapped files, no copy of a linear weight."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llmctl.graph.dtypes import BY_SAFETENSORS
from llmctl.graph.graph import Graph
from llmctl.targets.base import BuildOptions
from llmctl.targets.cpu.planes import packed_linears, table_names
from llmctl.targets.cpu.runtime import CpuWeights
from llmctl.targets.planes import WeightPlane


def engine_weights(graph: Graph, options: BuildOptions, planes: Mapping[str, WeightPlane]) -> CpuWeights:
    """An engine's planes by the role they play."""
    arrays = {name: _array(plane) for name, plane in planes.items()}
    tables = table_names(graph)
    return CpuWeights(
        linears=packed_linears(graph, options, arrays),
        tables={name: arrays[name] for name in tables},
        table_dtypes={name: BY_SAFETENSORS[planes[name].dtype].tag for name in tables},
        vectors={name: arrays[name] for name in graph.weights if name in arrays and name not in tables},
    )


def _array(plane: WeightPlane) -> NDArray[np.generic]:
    return np.asarray(plane.data).reshape(plane.shape)
