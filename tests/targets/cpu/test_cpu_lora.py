"""Adapters on the native CPU kernels: against the reference, merged weights, and themselves in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_engines import cpu_runtime
from cpu_graphs import each_variant, greedy, library
from random_adapters import random_adapter, with_products
from random_models import write_model
from tiny_checkpoint import dense_tensors, linear_shapes, write_arrays, write_dense, write_gptq

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.checkpoint.adapters.adapter import Adapter
from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.config import BuildConfig
from llmctl.engine.step import LoraLimits, SequenceSlice, StepPlan
from llmctl.errors import UnsupportedModelError
from llmctl.graph.graph import Graph
from llmctl.targets.cpu.adapters import _rounded
from llmctl.targets.cpu.binding import Lowering
from llmctl.targets.cpu.packing import engine_weights
from llmctl.targets.cpu.runtime import CpuRuntime
from llmctl.targets.cpu.toolchain import Variant, find_compiler
from llmctl.targets.lora import lora_graph, lora_ops
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import checkpoint_runtime

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.xdist_group("cpu_kernels"),
]
LORA = LoraLimits(4, 24, 4)
SHAPES = linear_shapes()
ATTENTION = {name: shape for name, shape in SHAPES.items() if "self_attn" in name}
DOWN = {name: shape for name, shape in SHAPES.items() if "down_proj" in name}
ADAPTERS = [
    random_adapter(SHAPES, 16, seed=1),
    random_adapter(ATTENTION, 3, seed=2),
    random_adapter(DOWN, 24, seed=3, scale=0.5),
]
"""All modules, some, one; ranks of one panel, less than one, and more. Slot 3 stays empty."""
Piece = tuple[int, int, int]
"""Tokens of a prompt from, to; the adapter's slot."""


def runtime_of(model: Path, variant: Variant | None, lora: LoraLimits | None = LORA, **options: object) -> CpuRuntime:
    sizes = EngineRequest(kv_cache_bytes=4 << 20, max_num_seqs=40, max_num_batched_tokens=160, lora=lora)
    runtime = cpu_runtime(model, sizes=sizes, library=library(variant) if variant else None, **options)
    if lora is not None:
        assert runtime.adapters is not None
        for slot, adapter in enumerate(ADAPTERS):
            runtime.adapters.put(slot, runtime.adapters.prepare(adapter))
    return runtime


def tokens_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 90, count).tolist()


def scores(runtime: CpuRuntime, *pieces: Piece) -> list[np.ndarray]:
    """Of each piece the log-probability of every next token, computed in one step; sequences do not share blocks."""
    slices = []
    for index, (seed, count, slot) in enumerate(pieces):
        ids = tokens_of(seed, count + 1)
        blocks = range(4 * index, 4 * index + 4)
        slices.append(SequenceSlice(str(index), ids[:-1], 0, blocks, False, ids[1:], adapter=slot))
    found = runtime.execute(StepPlan(tuple(slices)), greedy(0)).result().scores
    return [found[str(index)].logprobs for index in range(len(pieces))]


def expected(runtime: ReferenceRuntime, seed: int, count: int, slot: int) -> np.ndarray:
    ids = tokens_of(seed, count + 1)
    piece = SequenceSlice("a", ids[:-1], 0, range(4), False, adapter=slot)
    logits = runtime.logits(StepPlan((piece,)), all_rows=True)
    return torch.log_softmax(logits, -1)[range(count), ids[1:]].numpy()


MIXED: Sequence[Piece] = (
    *[(1, 1, 0), (2, 9, -1), (3, 17, 1), (4, 1, 0), (5, 5, 2), (6, 1, -1), (7, 30, 0), (8, 1, 2), (9, 2, 3)],
    *[(10, 1, 1), (11, 1, 0), (12, 1, 0), (13, 1, 0)],
)
"""Rows of one token and of many; five of one adapter, one of others; an empty slot."""
PREFILL: Sequence[Piece] = ((20, 60, 0), (21, 50, 1), (22, 20, -1), (23, 25, 2))
"""So many rows that the threads share them, in patches: more than 64 a thread."""


@each_variant
@pytest.mark.parametrize("passes", [None, ("none",)])
def test_in_float32_it_is_the_reference_and_the_merged_model(
    variant: Variant, passes: tuple[str, ...] | None, tmp_path: Path
) -> None:
    """Within what float32 sums differ by: 2e-5 of log-probabilities."""
    if "emulated" in variant.name or "bf16" in variant.name:
        pytest.skip("its float32 kernels are those of avx512vnni")
    model = write_dense(tmp_path / "dense")
    runtime = runtime_of(model, variant, dtype="float32", passes=passes)
    reference = checkpoint_runtime(open_checkpoint(model), passes=(), num_blocks=8, lora=LORA)
    assert reference.adapters is not None
    for slot, adapter in enumerate(ADAPTERS):
        reference.adapters.put(slot, reference.adapters.prepare(adapter))
    found = scores(runtime, *MIXED)
    for piece, got in zip(MIXED, found, strict=True):
        np.testing.assert_allclose(got, expected(reference, *piece), atol=2e-5)
    whole = checkpoint_runtime(
        open_checkpoint(
            write_arrays(tmp_path / "merged", with_products(dense_tensors(), ADAPTERS[0]), dtype="float32")
        ),
        num_blocks=8,
    )
    for piece, got in zip(MIXED, found, strict=True):
        if piece[2] == 0:
            np.testing.assert_allclose(got, expected(whole, *piece[:2], -1), atol=2e-5)
    runtime.close()


def graph_shapes(graph: Graph) -> dict[str, tuple[int, int]]:
    """[out, in] of every module that adapters can act on."""
    shapes: dict[str, tuple[int, int]] = {}
    for op in lora_ops(lora_graph(graph, LORA)):
        name, rows = op.attrs["module"], op.attrs["first_row"] + op.attrs["rows"]
        shapes[name] = max(rows, shapes.get(name, (0, 0))[0]), graph.buffers[op.inputs[0]].width
    return shapes


PLACES: dict[str, tuple[str, dict[str, int], tuple[str, ...] | None]] = {
    "rows that begin inside half a tile": ("gpt2", {"n_embd": 60, "n_head": 4}, None),
    "stored together, and gated": ("phi3", {}, None),
    "wide, in sixteen sums": ("llama", {"intermediate_size": 2100}, None),
    "gate and up of half a tile": ("llama", {"intermediate_size": 72}, None),
    "not fused": ("llama", {"intermediate_size": 72}, ("none",)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("dtype", "within"), [("float32", 5e-5), ("bfloat16", 0.15)])
def test_adapters_act_where_the_reference_has_them_act(place: str, dtype: str, within: float, tmp_path: Path) -> None:
    """Rows of modules that meet inside 16 outputs; partial sums of another length; in both layouts of the matrices; and
    rows of several patches (of 64 rows at most, where outputs are wide), whose sums are made anew for each."""
    family, changes, passes = PLACES[place]
    model = write_model(tmp_path / "m", family, **changes)
    reference = checkpoint_runtime(open_checkpoint(model), passes=(), num_blocks=8, lora=LORA)
    adapter = random_adapter(graph_shapes(checkpoint_graph(open_checkpoint(model))), 20, seed=4, scale=0.5)
    assert reference.adapters is not None
    reference.adapters.put(0, reference.adapters.prepare(adapter))
    sizes = EngineRequest(kv_cache_bytes=4 << 20, max_num_seqs=8, lora=LORA)
    runtime = cpu_runtime(model, sizes=sizes, dtype=dtype, passes=passes)
    assert runtime.adapters is not None
    runtime.adapters.put(0, runtime.adapters.prepare(adapter))
    for seed, count in ((1, 1), (2, 9)):
        found = scores(runtime, (seed, count, 0))[0]
        np.testing.assert_allclose(found, expected(reference, seed, count, 0), atol=within)
        assert np.abs(found - expected(reference, seed, count, -1)).max() > 2 * within
    prefill = [(seed, count, min(slot, 0)) for seed, count, slot in PREFILL]
    for piece, found in zip(prefill, scores(runtime, *prefill), strict=True):
        np.testing.assert_allclose(found, expected(reference, *piece), atol=within)
    runtime.close()


def check_bits(model: Path, variant: Variant, **options: object) -> None:
    with_adapters = runtime_of(model, variant, **options)
    without = runtime_of(model, variant, None, **options)
    together = scores(with_adapters, *MIXED)
    prefill = scores(with_adapters, *PREFILL)
    for piece, got in zip((*MIXED, *PREFILL), (*together, *prefill), strict=True):
        assert np.array_equal(got, scores(with_adapters, piece)[0]), piece
        if piece[2] in (-1, 3):
            assert np.array_equal(got, scores(without, (*piece[:2], -1))[0]), piece
    assert not np.array_equal(together[0], scores(without, (*MIXED[0][:2], -1))[0])
    with_adapters.close()
    without.close()


@each_variant
@pytest.mark.parametrize("kind", ["4 bits", "dense"])
def test_a_request_has_its_bits_in_any_batch_and_without_an_adapter_those_of_an_engine_without(
    variant: Variant, kind: str, tmp_path: Path
) -> None:
    model = write_dense(tmp_path / "m") if kind == "dense" else write_gptq(tmp_path / "m")
    check_bits(model, variant)


KINDS: dict[str, dict[str, Any]] = {
    "act order": {"act_order": True},
    "8 bits": {"bits": 8, "symmetric": True},
    "groups of 16": {"group_size": 16},
}


def test_a_rank_that_an_output_does_not_use_takes_no_bits_from_the_others() -> None:
    """Half of B's columns are zero, as where a fused adapter's blocks lie on a diagonal; the rest is small."""
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 64, generator=random), 0.01 * torch.randn(32, 16, generator=random)
    x = torch.randn(64, 40, generator=random)
    b[:, ::2] = 0
    codes_a, codes_b, a_scales, b_scales = _rounded(a, b)
    low = a_scales[:, None] * (codes_a.float() - 128) @ x
    unit = low.abs().amax(0) / 127  # one for all ranks of a row
    made = b_scales.float()[:, None] * (codes_b.float() - 128) @ ((low / unit).round() * unit)
    assert (made - b @ a @ x).norm() < 0.03 * (b @ a @ x).norm()


@pytest.mark.parametrize("kind", ["4 bits", *KINDS])
def test_behind_int8_activations_adapters_are_as_near_the_reference_as_the_model(kind: str, tmp_path: Path) -> None:
    """Against the reference, which keeps both in float32: about as near with an adapter as without."""
    model = write_gptq(tmp_path / "m", **KINDS.get(kind, {}))
    reference = checkpoint_runtime(open_checkpoint(model), passes=(), num_blocks=8, lora=LORA)
    runtime = runtime_of(model, None)
    assert reference.adapters is not None
    off: dict[int, list[np.ndarray]] = {-1: [], 0: [], 2: []}
    for slot, adapter in enumerate(ADAPTERS):
        reference.adapters.put(slot, reference.adapters.prepare(adapter))
    for seed in range(8):
        base = expected(reference, seed, 30, -1)
        for slot, errors in off.items():
            wanted = expected(reference, seed, 30, slot)
            errors.append(scores(runtime, (seed, 30, slot))[0] - wanted)
            assert slot or np.abs(wanted - base).mean() > 10 * np.abs(errors[-1]).mean()
    without, *having = (np.square(errors).mean() ** 0.5 for errors in off.values())
    assert max(having) < 2 * without
    runtime.close()


@pytest.mark.slow
@each_variant
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"passes": ("none",)}, {"kv_cache_dtype": "int8"}])
@pytest.mark.parametrize("checkpoint", KINDS)
def test_bits_of_other_kinds(variant: Variant, options: dict[str, object], checkpoint: str, tmp_path: Path) -> None:
    check_bits(write_gptq(tmp_path / "m", **KINDS[checkpoint]), variant, **options)


@pytest.mark.parametrize("kind", ["4 bits", "dense"])
def test_adapters_have_no_phase_of_their_own(kind: str, tmp_path: Path) -> None:
    """Each phase ends in a barrier: a step with adapters has those of one without."""
    model = write_dense(tmp_path / "m") if kind == "dense" else write_gptq(tmp_path / "m")
    build_engine(BuildConfig(model=str(model), target="cpu", output=str(tmp_path / "engine")))
    engine = load_engine(tmp_path / "engine", EngineRequest(kv_cache_bytes=1 << 20, lora=LORA))
    linears = engine_weights(engine.graph, engine.options, engine.weights).linears
    without, within = (Lowering(graph, linears).run() for graph in (engine.graph, lora_graph(engine.graph, LORA)))
    assert [bound.kind for bound in within] == [bound.kind for bound in without]
    acted = [place.op.attrs["module"] for bound in within for place in bound.places]
    assert sorted(acted) == sorted(SHAPES)
    assert all("low" in bound.views for bound in within if bound.places)


def test_a_slot_is_emptied_of_what_the_next_adapter_does_not_have(tmp_path: Path) -> None:
    runtime = runtime_of(write_dense(tmp_path / "m"), None)
    assert runtime.adapters is not None
    before = scores(runtime, (1, 8, 1))
    runtime.adapters.put(0, runtime.adapters.prepare(ADAPTERS[1]))
    assert np.array_equal(scores(runtime, (1, 8, 0))[0], before[0])
    runtime.close()


def test_the_pooled_rows_are_those_of_the_step_with_adapters(tmp_path: Path) -> None:
    runtime = runtime_of(write_dense(tmp_path / "m"), None, dtype="float32")
    vectors = []
    for slot in (-1, 0, -1):
        piece = SequenceSlice("a", tokens_of(1, 8), 0, range(4), False, pool_rows=3, adapter=slot)
        vectors.append(runtime.execute(StepPlan((piece,)), greedy(0)).result().pooled["a"])
    assert np.array_equal(vectors[0], vectors[2])
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1
    runtime.close()


def large_adapter() -> Adapter:
    """Of which a value rounds beyond bfloat16's largest."""
    made = random_adapter(ATTENTION, 4)
    made.parts[0].b[0, 0] = torch.finfo(torch.float32).max
    return made


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (random_adapter(DOWN, 25), "expected a rank of at most 24, found 25 of 'model.layers.0.mlp.down_proj'"),
        (large_adapter(), "'model.layers.0.self_attn.q_proj' has values too large for bfloat16"),
        (random_adapter({"lm_head": (96, 64)}, 4), "acts on 'lm_head', which is no linear of a layer"),
    ],
)
def test_what_is_refused(adapter: Adapter, said: str, tmp_path: Path) -> None:
    runtime = runtime_of(write_dense(tmp_path / "m"), None)
    assert runtime.adapters is not None
    with pytest.raises(UnsupportedModelError, match=said):
        runtime.adapters.prepare(adapter)
    runtime.close()
