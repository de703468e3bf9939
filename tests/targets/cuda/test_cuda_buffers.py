"""No two buffers that are alive share bytes, and no step of any size needs more scratch memory than was reserved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from meta_runtime import meta_runtime
from tiny_models import FAMILIES, LLAMA, MIXTURES, QUANTS, tiny_graph

from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import Graph
from llmctl.graph.lora import insert_lora
from llmctl.graph.passes import PASSES, apply_passes
from llmctl.targets.base import RuntimeSizes
from llmctl.targets.cuda import buffers as cuda_buffers
from llmctl.targets.cuda import ops as cuda_ops
from llmctl.targets.cuda.buckets import padded
from llmctl.targets.cuda.buffers import BufferPlan, plan_buffers, scratch_bytes, scratch_sizes
from llmctl.targets.cuda.inputs import StepShape
from llmctl.targets.cuda.runtime import CudaRuntime
from llmctl.targets.cuda.target import CUDA_PASSES

INT8 = (*CUDA_PASSES, "int8_activations")
OLMO2 = {**FAMILIES["llama"], "model_type": "olmo2"}
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


# -- activations ---------------------------------------------------------------------------------------------------


def _lifetimes(graph: Graph) -> dict[str, tuple[int, int]]:
    """Of every buffer that an op makes, the first and the last op that need it."""
    made = {name: i for i, op in enumerate(graph.ops) for name in op.outputs}
    lives = {name: (first, first) for name, first in made.items()}
    for i, op in enumerate(graph.ops):
        for name in op.inputs:
            if name in made:
                lives[name] = made[name], i
    gather = next(op for op in graph.ops if op.kind == "gather_rows")
    lives[gather.inputs[0]] = made[gather.inputs[0]], len(graph.ops)  # rows of it may be asked for again
    return lives


def _in_place(graph: Graph) -> set[tuple[str, str]]:
    """(input, output) of the ops whose output may lie where their input does."""
    return {(op.inputs[1], op.outputs[0]) for op in graph.ops if op.kind == "lora"}


def check_plan(graph: Graph, dtype: str = "float16") -> BufferPlan:
    """Every buffer has room, and none that is alive with another shares bytes with it."""
    plan, lives, allowed = plan_buffers(graph, dtype), _lifetimes(graph), _in_place(graph)
    gather = next(i for i, op in enumerate(graph.ops) if op.kind == "gather_rows")
    assert plan.placements.keys() == lives.keys()
    for name, place in plan.placements.items():
        storage = plan.storages[place.storage]
        assert place.columns == graph.buffers[name].width
        assert place.start + place.columns <= place.width
        assert place.width * DTYPES[place.dtype].nbytes <= storage.row_bytes
        assert storage.on_rows == (lives[name][0] >= gather)
    for a, b in combinations(plan.placements, 2):
        first, second = sorted((a, b), key=lambda name: lives[name])
        together = lives[second][0] <= lives[first][1]
        p, q = plan.placements[first], plan.placements[second]
        if not together or p.storage != q.storage:
            continue
        if lives[second][0] == lives[first][1] and (first, second) in allowed and p == q:
            continue
        assert (p.width, p.dtype) == (q.width, q.dtype), f"{first} and {second}"
        assert p.start + p.columns <= q.start or q.start + q.columns <= p.start, f"{first} and {second}"
    return plan


def _subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))


def _with_adapters(graph: Graph) -> Graph:
    modules = {"gpt2": ("c_attn", "c_fc"), "phi3": ("qkv_proj", "o_proj")}.get(graph.family, ("q_proj", "v_proj"))
    return insert_lora(graph, modules, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_that_are_alive_do_not_overlap(family: str) -> None:
    """Under any set of passes, with adapters and without."""
    fusing = tuple(name for name in PASSES if name != "int8_activations")
    for passes in _subsets(fusing):
        graph = tiny_graph(FAMILIES[family], QUANTS["w8a8"], passes)
        check_plan(graph)
        check_plan(apply_passes(graph, ("int8_activations",)))
    check_plan(_with_adapters(tiny_graph(FAMILIES[family], None, CUDA_PASSES)))
    check_plan(_with_adapters(tiny_graph(FAMILIES[family], None, ())))


@pytest.mark.parametrize("family", MIXTURES)
def test_nor_do_those_of_mixtures(family: str) -> None:
    for passes in ((), CUDA_PASSES):
        graph = tiny_graph(MIXTURES[family], QUANTS["w4"], passes)
        plan = check_plan(graph)
        assert {plan.placements[op.outputs[0]].dtype for op in graph.ops if op.kind == "route"} == {"int32"}


def test_adapters_add_in_place_only_where_nothing_else_reads() -> None:
    graph = _with_adapters(tiny_graph(FAMILIES["llama"], None, ()))
    plain = next(op for op in graph.ops if op.kind == "lora")
    plan = check_plan(graph)
    assert plan.placements[plain.outputs[0]] == plan.placements[plain.inputs[1]]
    ops = [op if op.kind != "add" else op.with_(inputs=(plain.inputs[1], op.inputs[1])) for op in graph.ops]
    plan = check_plan(replace(graph, ops=tuple(ops)))
    assert plan.placements[plain.outputs[0]].storage != plan.placements[plain.inputs[1]].storage


def test_storages_are_used_again() -> None:
    """As many layers as one likes take the memory of two."""
    sizes = [
        check_plan(tiny_graph({**FAMILIES["llama"], "num_hidden_layers": n}, None, CUDA_PASSES)).bytes(100, 10)
        for n in (2, 8)
    ]
    assert sizes[0] == sizes[1]


def test_outputs_of_a_merged_linear_lie_side_by_side() -> None:
    graph = tiny_graph(LLAMA, None, CUDA_PASSES)
    buffers = plan_buffers(graph, "bfloat16").allocate(7, 2, "meta")
    qkv = next(op for op in graph.ops if "splits" in op.attrs)
    (whole,) = buffers.outputs(qkv, 5)
    assert whole.shape == (5, 512)
    assert whole.is_contiguous()
    parts = [buffers.view(name, 5) for name in qkv.outputs]
    assert [part.shape[1] for part in parts] == [256, 128, 128]
    assert [part.storage_offset() for part in parts] == [0, 256, 384]
    assert {part.stride() for part in parts} == {(512, 1)}


# -- scratch -------------------------------------------------------------------------------------------------------


def _bind_all(runtime: CudaRuntime, every: bool) -> None:
    """Every program that some step of the runtime's sizes needs; of all token counts with ``every``, else of those that
    steps are padded to."""
    sizes, width = runtime._sizes, runtime._arena.table_width
    most = sizes.max_num_batched_tokens
    counts = range(1, most + 1) if every else sorted({min(padded(n), most) for n in range(1, most + 1)})
    for tokens in counts:
        for decode in (True, False):
            runtime._body(StepShape(tokens, min(tokens, sizes.max_num_seqs), width, True, decode))
    for seats in runtime._buckets:
        runtime._body(StepShape(seats, seats, width, False, True))
        for whole in (True, False):
            runtime._head_program(seats, whole)
    runtime.run_largest()


SCRATCH: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    **{f"llama-{quant}": (FAMILIES["llama"], quant, CUDA_PASSES) for quant in QUANTS},
    "llama-w8a8-int8": (FAMILIES["llama"], "w8a8", INT8),
    "llama-unfused": (FAMILIES["llama"], "w4", ("merge_qkv", "merge_gate_up")),
    "phi-w4_act_order": (FAMILIES["phi"], "w4_act_order", CUDA_PASSES),
    **{f"{family}-{quant}": (MIXTURES[family], quant, CUDA_PASSES) for family in MIXTURES for quant in ("w4", "dense")},
    "olmo2-w4": (OLMO2, "w4", CUDA_PASSES),
    "llama-8b-w4": (LLAMA_8B, "w4", CUDA_PASSES),
    "llama-8b-w8a8": (LLAMA_8B, "w8a8", INT8),
}


@pytest.mark.parametrize("name", SCRATCH)
def test_no_step_needs_more_scratch_than_was_reserved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of up to 300 tokens, beyond the rows from which linears are dense products; an 8B model's sizes too."""
    config, quant, passes = SCRATCH[name]
    graph = tiny_graph(config, QUANTS[quant], passes)
    runtime = meta_runtime(monkeypatch, graph, max_num_batched_tokens=300, max_num_seqs=40)
    _bind_all(runtime, every=False)


@pytest.mark.slow
@pytest.mark.parametrize("sms", [2, 16, 132])
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_of_any_number_of_tokens_does(
    family: str, quant: str, sms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny_graph(FAMILIES[family], QUANTS[quant], INT8 if quant == "w8a8" else CUDA_PASSES)
    runtime = meta_runtime(monkeypatch, graph, max_num_batched_tokens=260, max_num_seqs=70, sms=sms)
    _bind_all(runtime, every=True)


def test_adapters_and_long_contexts_have_scratch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _with_adapters(tiny_graph(FAMILIES["llama"], QUANTS["w4"], CUDA_PASSES))
    sizes = RuntimeSizes(64, 16, 1024, 100, 5)
    found = scratch_sizes(graph, "float16", sizes, 132)
    assert found["lora"] == 100 * 8
    assert found["parts"] == 5 * 2 * 2 * 64  # sequences, heads, two splits of 512, head size
    for module in (cuda_ops, cuda_buffers):
        monkeypatch.setattr(module, "DECODE_SPLIT", 16)
    assert scratch_sizes(graph, "float16", sizes, 132)["parts"] == 5 * 2 * 64 * 64
    assert (
        scratch_bytes({"parts": 3, "counters": 2, "dense": 5}, "float16")
        == 3 * 4 + 2 * 4 + 5 * DTYPES["float16"].nbytes
    )


@pytest.mark.parametrize("with_adapters", [False, True])
def test_norms_of_a_merged_linears_slices_have_scratch(with_adapters: bool) -> None:
    graph = tiny_graph(OLMO2, None, CUDA_PASSES)
    graph = _with_adapters(graph) if with_adapters else graph
    found = scratch_sizes(graph, "float16", RuntimeSizes(64, 16, 1024, 100, 5), 132)
    assert found["normed"] == 100 * graph.buffers["layers.0.q_proj"].width


def test_frozen_scratch_refuses_what_was_not_reserved() -> None:
    scratch = cuda_ops.Scratch("cpu")
    first = scratch.take("workspace", torch.float32, 4, 8)
    scratch.freeze()
    assert scratch.take("workspace", torch.float32, 32).data_ptr() == first.data_ptr()
    assert scratch.take("counters", torch.int32, 0).numel() == 0
    with pytest.raises(RuntimeError, match=r"scratch 'workspace': 33 elements of torch.float32 were not reserved"):
        scratch.take("workspace", torch.float32, 33)
    with pytest.raises(RuntimeError, match="scratch 'dense': 1 elements"):
        scratch.take("dense", torch.float16, 1)
