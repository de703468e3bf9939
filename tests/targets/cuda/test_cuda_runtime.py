"""What the CUDA runtime starts in a step, and what it does not do in one: lost fusions, allocations, waiting.

On torch's meta device; what the kernels compute is emulation's business.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from meta_runtime import DeviceAllocations, MetaRuntime, meta_runtime
from runtime_stepping import greedy
from tiny_models import FAMILIES, MIXTURES, QUANTS, VOCAB, tiny_graph

from llmctl.engine.step import IN_FLIGHT, SamplingBatch, SequenceSlice, StepPlan
from llmctl.errors import DeviceMemoryError
from llmctl.targets.cuda import runtime as cuda_runtime
from llmctl.targets.cuda.inputs import StepShape
from llmctl.targets.cuda.pending import CudaStep
from llmctl.targets.cuda.runtime import STEPS_IN_FLIGHT
from llmctl.targets.cuda.target import CUDA_PASSES

INT8 = (*CUDA_PASSES, "int8_activations")


def _decode_step(runtime: MetaRuntime, sequences: int = 4) -> list[str]:
    """What replaying the decode step of a bucket starts, without the dtypes and shapes of the entries' names."""
    names = ("attention_decode", "attention_combine", "rope_kv", "w4a16_stream", "w8a8_gemm", "add_rms_norm_s8",
             "rms_norm_s8", "add_rms_norm", "rms_norm", "quantize_s8", "embed")  # fmt: skip
    return [next((n for n in names if e.startswith(n)), e) for e in runtime.step_launches(sequences, sequences)]


# -- fusions -------------------------------------------------------------------------------------------------------


def test_a_llama_takes_nine_launches_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph({**FAMILIES["llama"], "num_hidden_layers": 3}, QUANTS["w4"], CUDA_PASSES)
    linear = "w4a16_stream"
    # What follows a layer's norm, up to the next one; the last of them is the final norm.
    layer = [linear, "rope_kv", "attention_decode", "attention_combine", linear, "add_rms_norm", linear, linear,
             "add_rms_norm"]  # fmt: skip
    expected = ["feed_tokens", "embed", "rms_norm", *layer * 3, "torch.mm"]
    assert _decode_step(meta_runtime(monkeypatch, graph)) == expected


def test_int8_activations_take_two_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms make int8 rows by themselves; what attention and gating leave is quantized on its own."""
    linear = "w8a8_gemm"
    layer = [linear, "rope_kv", "attention_decode", "attention_combine", "quantize_s8", linear, "add_rms_norm_s8",
             linear, "quantize_s8", linear]  # fmt: skip
    expected = ["feed_tokens", "embed", "rms_norm_s8", *layer, "add_rms_norm_s8", *layer, "add_rms_norm", "torch.mm"]
    graph = tiny_graph(FAMILIES["llama"], QUANTS["w8a8"], INT8)
    assert _decode_step(meta_runtime(monkeypatch, graph)) == expected


LAUNCHES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi", "phi3"), (3, 9)),
    "qwen3": (3, 11),
    "gpt2": (4, 10),
}
"""Before the first layer's linears, and for each layer: Qwen3 has two head norms, GPT-2 adds positions, and its
activation stands between two linears, as Phi's does, whose layers have one norm."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_launches_of_every_family(family: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph(FAMILIES[family], QUANTS["w8"], CUDA_PASSES)
    runtime = meta_runtime(monkeypatch, graph, dtype)
    first, layer = LAUNCHES[family]
    for sequences in (1, 8):
        assert len(_decode_step(runtime, sequences)) == first + 2 * layer + 1


@pytest.mark.parametrize("quant", ["w4", "dense"])
def test_a_mixture_takes_one_more_where_several_tokens_meet(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's product, what it chooses, two products of experts and their sum; before the first product the slots
    are sorted, but for a token alone."""
    runtime = meta_runtime(monkeypatch, tiny_graph(MIXTURES["glm4_moe"], QUANTS[quant], CUDA_PASSES))
    for sequences, sorted_first in ((1, []), (8, ["group_slots_m8"])):
        started = list(runtime.step_launches(sequences, sequences))
        at = started.index("route_f16")
        product = "grouped_w4a16_f16_g64_m8" if quant == "w4" else "grouped_dense_f16_m8"
        assert started[at - 1] == "torch.mm"
        mixed = ["route_f16", *sorted_first, product, product, "weighted_sum_f16"]
        assert started[at : at + len(mixed)] == mixed
        assert started.count("route_f16") == 1  # the first layer is dense


def test_every_layer_s_slots_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the layer before lie in the same place."""
    runtime = meta_runtime(monkeypatch, tiny_graph(MIXTURES["qwen2_moe"], None, CUDA_PASSES))
    launched = runtime.step_launches(8, 8)
    assert sum(entry.startswith("grouped_") for entry in launched) == 4
    assert launched.count("group_slots_m8") == 2


def test_executing_a_decode_step_starts_that_and_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows are gathered, and nothing else is started, whatever the padding."""
    runtime = meta_runtime(monkeypatch, tiny_graph(FAMILIES["llama"], QUANTS["w4"], CUDA_PASSES))
    started = runtime.queue.machine.started
    started.clear()
    runtime.execute(_decode(3), greedy(3))
    launches = [entry for entry in runtime.step_launches(4, 4) if not entry.startswith("torch")]  # the logits' product
    assert started == [*launches, "sample_f16"]
    assert started.count("embed_f16") == 1  # which gathers rows too
    started.clear()
    made_ready = runtime.queue.machine.made_ready
    runtime.execute(_decode(3), greedy(3))
    assert started == [*launches, "sample_f16"]
    assert runtime.queue.machine.made_ready == made_ready
    again = runtime.decode_replay(3, 40)
    started.clear()
    again()
    assert started == [*launches, "sample_f16"]
    started.clear()
    runtime.execute(_mixed(), greedy(2))
    assert started.count("embed_f16") == 2


# -- memory --------------------------------------------------------------------------------------------------------


def _decode(sequences: int, start: int = 20, token: int = 1) -> StepPlan:
    return StepPlan(
        tuple(SequenceSlice(str(i), [token], start, tuple(range(4 * i, 4 * i + 3)), True) for i in range(sequences))
    )


def _mixed(*scored: int) -> StepPlan:
    """One row, a chunk, and one that is not sampled, of which tokens may be scored."""
    return StepPlan(
        (
            SequenceSlice("0", [1], 20, (0, 1), True),
            SequenceSlice("1", list(range(13)), 16, (5, 6), True),
            SequenceSlice("2", [4, 5], 0, (7,), False, scored or None),
        )
    )


def _everything(rows: int) -> SamplingBatch:
    """Every parameter that there is."""
    ids = tuple(np.array([1, 2, 2], np.int32) for _ in range(rows))
    ones = np.ones(rows, np.float32)
    return SamplingBatch(
        ones, np.arange(rows, dtype=np.uint64), np.arange(rows), ones.astype(np.int32), ones / 2, ones / 8, ones * 2,
        ones, ones, ids, ids, np.array([0], np.int32), np.array([3], np.int32), np.array([-np.inf], np.float32),
        np.full((rows, VOCAB // 32), 7, np.uint32), np.full(rows, 5, np.int32),
    )  # fmt: skip


@pytest.mark.parametrize("quant", QUANTS)
def test_a_step_allocates_nothing_on_the_device(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a decode step nor a prefill: torch's allocator is not asked for any memory there.

    What sampling with penalties, biases, masks or log-probabilities uploads and sorts is allocated; plain sampling with
    temperature and filters allocates nothing. Results go to host memory, which is not looked at here.
    """
    graph = tiny_graph(FAMILIES["llama"], QUANTS[quant], INT8 if quant == "w8a8" else CUDA_PASSES)
    runtime = meta_runtime(monkeypatch, graph)
    plain = replace(greedy(4), temperature=np.ones(4, np.float32), top_k=np.ones(4, np.int32))
    with DeviceAllocations() as allocations:
        runtime.execute(_decode(4), plain)
        runtime.execute(_decode(4, 21, IN_FLIGHT), plain)
        runtime.execute(_mixed(), greedy(2))
    assert allocations.found == []
    with DeviceAllocations() as allocations:
        runtime.execute(_decode(4), _everything(4))
    assert allocations.found
    with pytest.raises(RuntimeError, match="were not reserved"):
        runtime._model.scratch.take("workspace", torch.float32, 10**9)


def test_allocations_are_seen() -> None:
    x = torch.empty(4, device="meta")
    with torch.inference_mode(), DeviceAllocations() as allocations:
        x.view(2, 2)[0].add_(1)
        torch.zeros(3)
        assert allocations.found == []
        x + x
        torch.empty(2, device="meta")
        assert len(allocations.found) == 2


def test_programs_are_forgotten_the_longest_unused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = meta_runtime(monkeypatch, tiny_graph(FAMILIES["llama"], None, CUDA_PASSES))
    monkeypatch.setattr(cuda_runtime, "_PROGRAMS", 2)
    runtime._programs.clear()
    first, second, third = (StepShape(tokens, 2, 8, True, True) for tokens in (8, 16, 24))
    kept = runtime._body(first)
    runtime._body(second)
    assert runtime._body(first) is kept
    runtime._body(third)
    assert list(runtime._programs) == [first, third]
    assert runtime.execute(_decode(3), greedy(3)).result().execution == "graph"  # graphs stay


# -- waiting -------------------------------------------------------------------------------------------------------


def test_a_step_waits_for_the_step_two_before_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its staging is that one's. Nothing else waits: what would read the device's memory fails on this one."""
    runtime = meta_runtime(monkeypatch, tiny_graph(FAMILIES["llama"], QUANTS["w4"], CUDA_PASSES))
    queue, steps, ended = runtime.queue, [], []
    sampling: Any = (greedy(4), _everything(4), greedy(2), _everything(4), greedy(4))
    for plan, batch in zip((_decode(4), _decode(4), _mixed(3, 4), _decode(4), _decode(4)), sampling, strict=True):
        assert runtime.steps_in_flight == STEPS_IN_FLIGHT == 2
        steps.append(runtime.execute(plan, batch))
        ended.append(queue.marks)
        assert queue.waits == ended[: max(0, len(steps) - 2)]
    queue.waits.clear()
    result = steps[-1].result()
    assert queue.waits == ended[-1:]
    assert result.token_ids.shape == (4,)
    steps[1].result()  # was read when its staging was taken
    assert queue.waits == ended[-1:]


def test_a_step_that_fails_half_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what it had sent already; and nothing is fed from where it may have left its tokens."""
    runtime = meta_runtime(monkeypatch, tiny_graph(FAMILIES["llama"], None, CUDA_PASSES))

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    runtime.execute(_decode(4), greedy(4))
    with monkeypatch.context() as patch:
        patch.setattr(runtime._sampler, "start", fail)
        with pytest.raises(DeviceMemoryError, match="the GPU is out of memory"):
            runtime.execute(_decode(4, 21, IN_FLIGHT), greedy(4))
    assert runtime.queue.waits[-1] == runtime.queue.marks
    with pytest.raises(ValueError, match="the step before sampled no token"):
        runtime.execute(_decode(4, 21, IN_FLIGHT), greedy(4))
    assert runtime.execute(_decode(4, 21), greedy(4)).result().token_ids.shape == (4,)


def test_stagings_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step is told is not written over while the one before is being copied."""
    runtime = meta_runtime(monkeypatch, tiny_graph(FAMILIES["llama"], None, CUDA_PASSES))
    runtime.execute(_decode(4, 20), greedy(4))
    before = [(s.memory.clone(), s.tables.clone()) for s in runtime._slots]
    runtime.execute(_decode(4, 21, 7), greedy(4))
    same = [torch.equal(s.memory, memory) and torch.equal(s.tables, tables)
            for s, (memory, tables) in zip(runtime._slots, before, strict=True)]  # fmt: skip
    assert same == [True, False]


def test_closing_waits_for_what_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = meta_runtime(monkeypatch, tiny_graph(FAMILIES["llama"], None, CUDA_PASSES))
    steps: list[CudaStep] = [runtime.execute(_decode(2), greedy(2)) for _ in range(2)]
    runtime.queue.waits.clear()
    runtime.close()
    assert len(runtime.queue.waits) == len(steps)
    assert not hasattr(runtime, "_model")
