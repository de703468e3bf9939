"""Native CPU runtimes over real engine folders."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.config import BuildConfig
from llmctl.targets.cpu.runtime import CpuRuntime
from llmctl.targets.cpu.target import CpuTarget

_FOLDERS: list[TemporaryDirectory[str]] = []
_SIZES = EngineRequest(kv_cache_bytes=4 << 20, max_num_seqs=8)


def cpu_runtime(
    model: Path,
    threads: int = 2,
    target: str = "cpu",
    sizes: EngineRequest = _SIZES,
    library: Path | None = None,
    **options: object,
) -> CpuRuntime:
    """The runtime of a checkpoint built with these options, on the engine's kernels or on those of ``library``."""
    _FOLDERS.append(TemporaryDirectory())
    output = Path(_FOLDERS[-1].name) / "engine"
    build_engine(BuildConfig(model=str(model), target=target, output=str(output), **options))  # type: ignore[arg-type]
    engine = load_engine(output, sizes)
    with nullcontext() if library is None else patch.object(CpuTarget, "library", lambda *_: library):
        runtime = open_runtime(engine, threads=threads)
    assert isinstance(runtime, CpuRuntime)
    return runtime
