"""Binding a Graph to native ops: where its buffers lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoint

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.config import BuildConfig
from llmctl.targets.cpu.binding import Lowering
from llmctl.targets.cpu.operands import plan_arena
from llmctl.targets.cpu.packing import engine_weights
from llmctl.targets.cpu.toolchain import find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")


@pytest.mark.parametrize("lm_head", ["dense", "int8"])
@pytest.mark.parametrize(("tokens", "rows"), [(512, 1), (512, 64), (64, 400)])
def test_what_the_tail_reads_outlives_every_chunk_of_rows(tmp_path: Path, lm_head: str, tokens: int, rows: int) -> None:
    """Scoring more rows than fit at once runs the tail again: its outputs must not lie on its first input."""
    model = tiny_checkpoint.write_gptq(tmp_path / "model")
    config = BuildConfig(model=str(model), target="cpu", lm_head=lm_head, output=str(tmp_path / "engine"))
    engine = load_engine(build_engine(config), EngineRequest(kv_cache_bytes=1 << 20))
    lowering = Lowering(engine.graph, engine_weights(engine.graph, engine.options, engine.weights).linears)
    bound = lowering.run()
    plan_arena(lowering.storages, tokens, rows)
    read = {id(v.storage): v.storage for b in bound if b.on_rows for v in b.views.values() if not v.storage.on_rows}
    written = [s for s in lowering.storages if s.on_rows]
    assert len(read) == 1
    (source,) = read.values()
    end = source.offset + source.row_bytes * tokens
    assert written
    assert all(w.offset >= end or w.offset + w.row_bytes * rows <= source.offset for w in written)
