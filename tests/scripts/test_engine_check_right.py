"""The part ``right`` of ``gpu_check.sh --engine``: its models, its steps by hand, and that it finds faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import missing
from engine_check import (
    dry,
    models,
    place,
    right,
    steps,
    tiny,
)  # fmt: skip
from engine_check_cases import LONE, TINY, VARIANT, small

# Arithmetic


def test_bytes_of_a_step_are_those_of_the_planes_that_it_reads() -> None:
    llama = models.model("Llama-3-8B", "4-bit")
    table = 128256 * 4096 * 2
    assert llama.step_bytes() == sum(plane.nbytes for plane in llama.planes.values()) - table
    assert llama.step_bytes() / 1e9 == pytest.approx(4.7, abs=0.01)
    assert llama.kv_bytes(1) == 2 * 32 * 8 * 128 * 2
    assert llama.decode_bytes(64, 512) == llama.step_bytes() + 64 * 512 * llama.kv_bytes(1)
    qwen = models.model("Qwen3-4B", "bf16")
    assert qwen.step_bytes() == sum(plane.nbytes for plane in qwen.planes.values())  # the table is the head as well


def test_operations_are_counted_as_the_trial_counts_them() -> None:
    llama = models.model("Llama-3-8B", "bf16")
    layer = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336
    assert llama.linear_flops() == 2 * 32 * layer
    attention = 4 * 32 * 128 * 512 * 513 / 2 * 32
    assert llama.prefill_flops(512) == 512 * llama.linear_flops() + 2 * 128256 * 4096 + attention
    assert models.model("Llama-3-8B", "4-bit").prefill_flops(512) == llama.prefill_flops(512)


@pytest.mark.parametrize("shape", sorted(models.SHAPES))
@pytest.mark.parametrize("kind", sorted(models.SCHEMES))
def test_random_planes_are_those_of_the_target(shape: str, kind: str) -> None:
    model = models.model(shape, kind)
    made = models.planes_on(model, "meta")
    assert set(made) == set(model.planes)
    for name, plane in model.planes.items():
        assert (tuple(made[name].shape), made[name].dtype) == (plane.shape, models.torch_dtype(plane))


def test_planes_on_the_host_are_those_on_the_device_in_kind() -> None:
    model = small()
    made, arrays = models.planes_on(model, "cpu"), models.host_contents(model)
    assert set(made) == set(arrays)
    for name, plane in model.planes.items():
        tensor = tiny.to_tensor(arrays[name](), plane)
        assert (tensor.shape, tensor.dtype) == (made[name].shape, made[name].dtype)
        if tensor.is_floating_point():
            assert tensor.float().std() == pytest.approx(float(made[name].float().std()), rel=0.3, abs=1e-6)
        else:
            assert int(tensor.max()) == int(made[name].max())


def test_every_quantization_dtype_and_cache_is_a_variant() -> None:
    found = {(v.quant, v.dtype, v.kv) for v in right.VARIANTS}
    assert len(found) == len(right.VARIANTS) == 3 * 2 * 3
    first = right.VARIANTS[: len(right.VARIANTS) // 2]
    assert {v.quant for v in first} == set(tiny.QUANTS)
    assert {v.kv for v in first} == {"same", "int8", "fp8_e4m3"}
    assert len({v.heads for v in first}) == 3


# Steps by hand, the reference with rounded caches


def test_sequences_come_in_order_over_blocks_of_their_own() -> None:
    sequences = steps.Sequences([[1, 2, 3], list(range(20))], blocks=5, block_size=16)
    assert not set(sequences.tables[0]) & set(sequences.tables[1])
    plan, members = sequences.plan([2, 0])
    assert (members, plan.slices[0].token_ids, plan.slices[0].start) == ([0], [1, 2], 0)
    plan, members = sequences.plan([1, 20])
    assert (plan.slices[0].start, sequences.left(1)) == (2, 0)
    with pytest.raises(ValueError, match="0 tokens left, 1 wanted"):
        sequences.plan([1, 0])
    with pytest.raises(ValueError, match="need 3 blocks of 2"):
        steps.Sequences([[1], [1] * 17], blocks=2, block_size=16)


@pytest.mark.parametrize("scale", [right.Scale(), TINY])
def test_every_scenario_runs_every_text_within_the_runtime(scale: right.Scale) -> None:
    texts = [[0] * (n + scale.more) for n in scale.prompts]
    for name, counts in right.SCENARIOS.items():
        sequences = steps.Sequences(texts, scale.blocks, models.BLOCK)
        sizes = []
        for step in counts(sequences, scale):
            _, members = sequences.plan(step)
            assert sum(step) <= scale.tokens
            assert len(members) <= scale.seqs
            sizes.append((sum(step), len(members)))
        if name == "batches":
            assert [n for _, n in sizes[1:]] == list(scale.batches)
        else:
            assert not any(sequences.left(i) for i in range(len(texts)))
        if name == "chunks":
            assert any(tokens > n > 1 for tokens, n in sizes)


def test_rounded_caches() -> None:
    x = torch.tensor([[1.0, -127.0, 0.4], [0.0, 0.0, 0.0]])
    assert torch.equal(tiny.int8_rounded(x), torch.tensor([[1.0, -127.0, 0.0], [0.0, 0.0, 0.0]]))
    assert tiny.e4m3_rounded(torch.tensor([1e6, -449.0, 1.06])).tolist() == [448.0, -448.0, 1.0]
    plain = tiny.TinyModel(tiny.Variant("dense", "float16", "same", LONE), TINY.size)
    rounded = tiny.TinyModel(tiny.Variant("dense", "float16", "int8", LONE), TINY.size)
    text = steps.prompt(30, 96)
    a, b = (tiny.oracle(model, [text], 30).exact[0] for model in (plain, rounded))
    assert 0 < float((a - b).abs().max()) < 0.3


@pytest.mark.parametrize("quant", sorted(tiny.QUANTS))
def test_packed_planes_hold_the_weights(quant: str) -> None:
    model = tiny.TinyModel(tiny.Variant(quant, "bfloat16", "same", LONE), TINY.size)
    weights = dry.unpacked(model.graph, model.planes("cpu"))
    for name, value in model.weights.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(weights[name], value.bfloat16())
        else:
            assert torch.equal(weights[name].dequantize(), value.dequantize())


# The part ``right``


class Faulty(dry.DryRuntime):
    """A runtime with one fault."""

    def __init__(self, fault: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fault, self.eager = fault, arguments[3].enforce_eager

    def execute(self, plan: Any, sampling: Any) -> Any:
        done = super().execute(plan, sampling)
        if self.fault == "token" and plan.slices[0].start > 17:
            done.value.token_ids[0] = (done.value.token_ids[0] + 1) % 96
        if self.fault == "seeded" and (sampling.temperature > 0).any():
            done.value.token_ids[:] = 95 - done.value.token_ids
        return done

    def logits(self, plan: Any) -> torch.Tensor:
        logits = super().logits(plan).clone()
        if self.fault == "position" and plan.slices[0].start == 19:
            logits[0] += torch.linspace(0, 1, 96)
        if self.fault == "nan" and len(plan.slices) == 2:
            logits[0, 3] = torch.nan
        if self.fault == "replay" and not self.eager:
            logits[0, 5] += 1e-6
        return logits


def faulty(fault: str, graphs: bool = False) -> place.HostPlace:
    return place.HostPlace(lambda *arguments: Faulty(fault, *arguments), graphs)


def test_nothing_is_wrong_with_the_reference_itself() -> None:
    found = right.check(faulty("none"), VARIANT, TINY, "sm_90")
    assert found["wrong"] == []
    assert found["largest error"] <= found["limit"]
    assert found["preemptions"][1] > 0
    assert found["preemptions"][2] > 0
    assert found["requests alike at depth 1 and 2"] == "3 of 3"


@pytest.mark.parametrize(
    ("fault", "graphs", "said"),
    [
        ("position", False, "position 19: logits off by"),
        pytest.param("nan", False, "logits off by inf", marks=pytest.mark.slow),
        ("token", False, "sampled"),
        pytest.param("seeded", False, "seeded: row", marks=pytest.mark.slow),
        ("replay", True, "off from eager by"),
    ],
)
def test_faults_are_found(fault: str, graphs: bool, said: str) -> None:
    found = right.check(faulty(fault, graphs), VARIANT, TINY, "sm_90")
    assert any(said in line for line in found["wrong"]), found


def test_decode_steps_that_are_not_replayed_are_told() -> None:
    found = right.check(faulty("none", True), VARIANT, TINY, "sm_90")
    assert any("a decode step" in line for line in found["wrong"])
    assert found["replays"].endswith("0 of them replayed")


def test_other_choices_than_the_reference_are_told() -> None:
    model = tiny.TinyModel(VARIANT, TINY.size)
    judge = tiny.oracle(model, [steps.prompt(6, 96)], 40)
    prompt = steps.prompt(9, 96)
    best = []
    for _ in range(4):
        row = judge.runtime.logits(steps.one_slice([*prompt, *best], models.BLOCK))
        best.append(int(row.argmax()))
    assert judge.strays(prompt, best) == []
    worst = [*best[:2], int(row.argmin()), best[3]]
    assert 2 in judge.strays(prompt, worst)


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize(
    "variant",
    [
        tiny.Variant("w4", "float16", "int8", LONE),
        tiny.Variant("w8", "bfloat16", "same", LONE),
        tiny.Variant("dense", "bfloat16", "fp8_e4m3", LONE, "qwen3"),
        tiny.Variant("w4", "bfloat16", "fp8_e4m3", tiny.Heads(4, 2, 64)),
    ],
    ids=lambda variant: variant.name,
)
def test_the_cuda_runtime_on_emulated_kernels_is_right(variant: tiny.Variant) -> None:
    from machine import EmulatedMachine

    from llmctl.targets.cuda.runtime import CudaRuntime

    def opener(graph: Any, options: Any, planes: Any, sizes: Any) -> CudaRuntime:
        return CudaRuntime(graph, options, planes, sizes, EmulatedMachine(), device="cpu")

    found = right.check(place.HostPlace(opener, graphs=True), variant, TINY, "sm_90")
    assert found["wrong"] == []
    assert found["replays"].startswith(f"{found['rows']} of {found['rows']} rows bit for bit")
