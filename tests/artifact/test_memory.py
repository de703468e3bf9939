"""The memory plan: checked against sums done by hand, from headers alone, monotone in what it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoint import MAX_POSITION, dense_tensors, linear_shapes

from llmctl.artifact.memory import MemoryPlan, human_bytes, plan_memory
from llmctl.artifact.plan import plan_build
from llmctl.artifact.request import EngineRequest
from llmctl.checkpoint.safetensors_io import SafetensorsFile
from llmctl.config import BuildConfig
from llmctl.engine.step import LoraLimits
from llmctl.graph.graph import Graph
from llmctl.graph.passes import apply_passes
from llmctl.targets.base import BuildOptions, TargetName
from llmctl.targets.reference.target import ReferenceTarget
from llmctl.targets.step_memory import kv_bytes_per_token


@pytest.fixture(scope="module")
def graph(checkpoints: dict[str, Path]) -> Graph:
    return plan_build(BuildConfig(model=str(checkpoints["dense"]))).graph


class Machine(ReferenceTarget):
    """A target whose weights take 1000 bytes."""

    def resident_bytes(self, *_: object) -> int:  # type: ignore[override]
        return 1000


def plan(graph: Graph, block_size: int = 16, **request: object) -> MemoryPlan:
    options = BuildOptions("float32", MAX_POSITION, block_size, "float32", ())
    wanted = EngineRequest(**{"budget": 10**9, **request})  # type: ignore[arg-type]
    return plan_memory(graph, options, Machine(TargetName("reference")), wanted, ())


def test_weights(checkpoints: dict[str, Path]) -> None:
    values = sum(array.size for array in dense_tensors().values())
    dense = plan_build(BuildConfig(model=str(checkpoints["dense"]), target="reference"))
    assert (dense.weights_bytes, dense.memory.weights) == (2 * values, 4 * values)
    quantized = plan_build(BuildConfig(model=str(checkpoints["gptq"]), target="reference", dtype="bfloat16"))
    assert quantized.weights_bytes < dense.weights_bytes
    assert quantized.memory.weights == 2 * values


def test_blocks_that_fit(graph: Graph) -> None:
    per_block = 16 * kv_bytes_per_token(graph, "float32")
    base = plan(graph).weights + plan(graph).activations
    found = plan(graph, budget=base + 7 * per_block + 5)
    assert (found.num_blocks, found.kv_tokens, found.largest_max_model_len) == (7, 112, 112)
    assert not found.fits
    assert plan(graph, budget=base + 7 * per_block, max_model_len=112).fits
    assert plan(graph, budget=base - 1).largest_max_model_len == 0


def test_adapters_take_their_slots_and_what_their_ops_write(graph: Graph) -> None:
    fused = apply_passes(graph, ("fuse_gated_activation",))
    plain, found = plan(fused), plan(fused, lora=LoraLimits(3, 8, 3))
    held = sum(8 * (rows + columns) for rows, columns in linear_shapes().values())
    assert (plain.adapters, found.adapters) == (0, 3 * 4 * held)
    assert found.activations > plain.activations
    assert found.total - found.kv_bytes == plain.fixed + found.adapters + found.activations - plain.activations


def test_default_cache_is_no_larger_than_can_be_used(graph: Graph) -> None:
    found = plan(graph, max_model_len=100, max_num_seqs=3)
    assert found.num_blocks == 3 * 7
    assert plan(graph).largest_max_model_len == MAX_POSITION


def test_given_cache_size_is_kept(graph: Graph) -> None:
    per_block = 16 * kv_bytes_per_token(graph, "float32")
    found = plan(graph, kv_cache_bytes=5 * per_block + 1, max_model_len=80)
    assert (found.num_blocks, found.fits) == (5, True)
    assert not plan(graph, kv_cache_bytes=5 * per_block, max_model_len=81).fits


@given(
    budget=st.integers(0, 10**8),
    length=st.integers(1, MAX_POSITION),
    block=st.sampled_from([1, 8, 16, 32]),
    seqs=st.integers(1, 64),
)
def test_the_advised_length_fits_and_no_longer_one_does(
    graph: Graph, budget: int, length: int, block: int, seqs: int
) -> None:
    def at(tokens: int) -> MemoryPlan:
        return plan(graph, budget=budget, max_model_len=tokens, block_size=block, max_num_seqs=seqs)

    best = at(length).largest_max_model_len
    assert at(length).fits == (length <= best)
    if best > 0:
        assert at(best).fits
    if best < MAX_POSITION:
        assert not at(best + 1).fits


def test_refusal_itemises(graph: Graph) -> None:
    short = plan(graph, budget=700_000)
    assert not short.fits
    for part in ("weights 1000 B", "activations", "KV", f"{MAX_POSITION} tokens", "the budget that was given"):
        assert part in short.shortfall()
    assert plan(graph).fits


def test_dry_run_reads_no_tensor_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whose data section was never written (a sparse hole of the right length) plans as any other, and
    nothing maps, loads or hashes its tensors."""
    from tiny_checkpoint import write_gptq

    from llmctl.checkpoint.reader import Checkpoint, SafetensorsSource
    from llmctl.checkpoint.safetensors_io import read_header

    whole = write_gptq(tmp_path / "m")
    expected = plan_build(BuildConfig(model=str(whole), memory_budget="1GiB")).memory
    file = whole / "model.safetensors"
    header = read_header(file)
    start = min(entry.offset for entry in header.tensors.values())
    head, size = file.read_bytes()[:start], file.stat().st_size
    with file.open("wb") as hollow:
        hollow.write(head)
        hollow.truncate(size)

    def forbidden(*_: object) -> None:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(SafetensorsSource, "load", forbidden)
    monkeypatch.setattr(SafetensorsFile, "plane", forbidden)
    monkeypatch.setattr(Checkpoint, "fingerprint", forbidden)
    monkeypatch.setattr(Checkpoint, "weight", forbidden)
    assert plan_build(BuildConfig(model=str(whole), memory_budget="1GiB")).memory == expected


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1024.0 GiB"), (2**30, "1.0 GiB")]
)
def test_human_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text
