"""Distributions over windows of text: which rows, and that an engine's are of its own arithmetic."""

from __future__ import annotations

from pathlib import Path

import tiny_checkpoint
import torch

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.config import BuildConfig
from llmctl.evaluate.distributions import ROWS, CheckpointDistributions, RuntimeDistributions, Window, pieces


def test_pieces_are_the_scored_positions_once() -> None:
    windows: list[Window] = [(range(3 * ROWS), 2 * ROWS + 1), ([1, 2], 1)]
    found = [(index, position) for index, positions in pieces(windows) for position in positions]
    assert found == [(0, p) for p in range(ROWS - 1, 3 * ROWS)] + [(1, 1)]
    assert max(len(positions) for _, positions in pieces(windows)) == ROWS


def test_an_engines_distributions_are_the_models(tmp_path: Path) -> None:
    model = tiny_checkpoint.write_gptq(tmp_path / "tiny")
    engine = build_engine(BuildConfig(model=str(model), target="reference", output=str(tmp_path / "engine")))
    generator = torch.Generator().manual_seed(0)
    lengths = [(ROWS + 20, ROWS + 5), (ROWS + 40, 3)]
    windows: list[Window] = [(torch.randint(60, (n,), generator=generator).tolist(), m) for n, m in lengths]
    runtime = open_runtime(load_engine(engine, EngineRequest(max_num_batched_tokens=ROWS)))
    try:
        own = list(RuntimeDistributions(runtime, windows))
    finally:
        runtime.close()
    for one, other in zip(own, CheckpointDistributions(open_checkpoint(model), windows), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
