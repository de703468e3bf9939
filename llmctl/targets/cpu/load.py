"""The CPU runtime out of an engine folder: planes as they lie in the mapped files, no copy of a linear weight."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmctl.artifact.loader import LoadedEngine, WeightPlane, cpu_library
from llmctl.targets.cpu.planes import packed_linears
from llmctl.targets.cpu.runtime import CpuRuntime, CpuWeights
from llmctl.targets.device import usable_cores

_TABLES = frozenset({"embed", "pos_embed"})
_TABLE_DTYPE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_KV_DTYPE = {"float32": "f32", "bfloat16": "bf16", "int8": "int8"}


def load_cpu_runtime(engine: LoadedEngine, *, threads: int | None = None) -> CpuRuntime:
    """The native runtime of an engine whose target is ``native_cpu``, sized by its memory plan.

    Args:
        threads: native threads; None means one a physical core that this process may use.

    Raises:
        EngineLoadError: the kernel library does not load here.
    """
    library = cpu_library(engine.path, engine.manifest)
    assert library is not None, "the loader checked the target"
    options = engine.manifest.options
    return CpuRuntime(
        engine.graph,
        engine_weights(engine),
        library,
        num_blocks=engine.plan.num_blocks,
        block_size=engine.plan.block_size,
        max_model_len=engine.max_model_len,
        max_num_batched_tokens=engine.request.max_num_batched_tokens,
        max_num_seqs=engine.request.max_num_seqs,
        kv_dtype=_KV_DTYPE[options.kv_cache_dtype],
        threads=threads or physical_cores(),
    )


def engine_weights(engine: LoadedEngine) -> CpuWeights:
    """An engine's planes by the role they play."""
    arrays = {name: _array(plane) for name, plane in engine.weights.items()}
    tables = {op.weights[0] for op in engine.graph.ops if op.kind in _TABLES}
    vectors = {name: arrays[name] for name in engine.graph.weights if name in arrays and name not in tables}
    return CpuWeights(
        linears=packed_linears(engine.graph, engine.manifest.options, arrays),
        tables={name: arrays[name] for name in tables},
        table_dtypes={name: _TABLE_DTYPE[engine.weights[name].dtype] for name in tables},
        vectors=vectors,
    )


def physical_cores() -> int:
    """Physical cores this process may run on (its affinity), at least 1."""
    import psutil  # type: ignore[import-untyped,unused-ignore]

    allowed = usable_cores()
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def _array(plane: WeightPlane) -> NDArray[np.generic]:
    return np.asarray(plane.data).reshape(plane.shape)
