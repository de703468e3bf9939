"""scripts/gpu_check.sh --engine where there is no GPU: arithmetic, traces, targets, reports, workers that die, a dry
run from end to end, and the part ``right`` on emulated kernels."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
sys.path.insert(0, str(Path(__file__).parents[1] / "targets" / "cuda" / "emulation"))

import gpu_engine  # noqa: E402
from emulator import missing  # noqa: E402
from engine_check import (  # noqa: E402
    chart,
    dry,
    folder,
    goals,
    http_serve,
    kernel_trace,
    loads,
    models,
    place,
    report,
    right,
    speed,
    steps,
    supervise,
    tiny,
    trial,
)  # fmt: skip
from engine_check.session import Session, Setting  # noqa: E402

from llmctl.artifact.loader import load_engine  # noqa: E402
from llmctl.artifact.request import EngineRequest  # noqa: E402
from llmctl.bench.workloads import LengthRange, random_items  # noqa: E402
from llmctl.targets.cuda.launch import missing_device  # noqa: E402
from llmctl.text.tokenizer import Tokenizer  # noqa: E402

W4, BF16 = "Llama-3-8B 4-bit", "Llama-3-8B bf16"
SMALL = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 3000, "head_dim": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
TINY = right.Scale(
    size=tiny.Size(hidden=128, intermediate=192, layers=1, vocab=96, positions=128), prompts=(18, 3, 7), more=3,
    chunk=9, batches=(3, 1, 2), requests=((10, 9), (9, 5), (30, 4)), blocks=4, tokens=32, seqs=3, budget=16,
)  # fmt: skip
LONE = tiny.Heads(2, 1, 64)


def small(kind: str = "4-bit", shape: str = "Llama-3-8B") -> models.Model:
    return models.Model(shape, kind, {**models.SHAPES[shape], **SMALL})


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


VARIANT = tiny.Variant("w4", "float16", "int8", LONE)


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
        ("nan", False, "logits off by inf"),
        ("token", False, "sampled"),
        ("seeded", False, "seeded: row"),
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


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize(
    "variant",
    [
        tiny.Variant("w4", "float16", "int8", LONE),
        pytest.param(tiny.Variant("w8", "bfloat16", "same", LONE), marks=pytest.mark.slow),
        pytest.param(tiny.Variant("dense", "bfloat16", "fp8_e4m3", LONE, "qwen3"), marks=pytest.mark.slow),
        pytest.param(tiny.Variant("w4", "bfloat16", "fp8_e4m3", tiny.Heads(4, 2, 64)), marks=pytest.mark.slow),
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


# Speed, loads


def test_cases_on_a_dry_runtime() -> None:
    opened = speed.Opened(place.HostPlace(dry.DryRuntime), small(), seqs=4)
    found = speed.decode_case(opened, 2, 40)
    assert found["tok/s"] == pytest.approx(2 / found["ms"] * 1e3)
    assert found["GB"] == small().decode_bytes(2, 40) / 1e9
    prompt = speed.prefill_case(opened, 64)
    assert prompt["TFLOP/s"] == pytest.approx(small().prefill_flops(64) / prompt["ms"] / 1e9)
    assert speed.launch_cost(opened)["launches"] == len(small().graph.ops)
    with pytest.raises(MemoryError, match="do not fit"):
        speed.decode_case(opened, 10**6, 128)
    opened.close()


def test_loads_through_the_engine() -> None:
    opened = speed.Opened(place.HostPlace(dry.DryRuntime), small(), seqs=4)
    load = loads.Load(3, 20, 5, 2)
    found = loads.run_load(opened.runtime, load)
    assert found["rounds"] == 2
    assert found["tok/s range"][0] <= found["tok/s"] <= found["tok/s range"][1]
    engine = loads.decoding(opened.runtime, loads.Load(3, 20, 30, 1))
    assert {output.request_id for output in engine.step()} == {"7-0", "7-1", "7-2"}
    loads.drop(engine)
    assert not engine.has_unfinished()


def test_figures_of_a_round() -> None:
    round_ = loads.Served(2.0, [[0.5, 1.0, 1.2], [0.7, 1.0, 2.0]])
    assert (round_.rate, round_.first_ms) == (3.0, pytest.approx(600))
    assert round_.gap_ms == pytest.approx(400)
    found = loads.figures([round_, loads.Served(1.0, [[0.1, 0.2]])], loads.ONE)
    assert (found["tok/s"], found["tok/s range"]) == (2.5, [2.0, 3.0])


# Traces


def test_gaps_of_a_trace() -> None:
    spans = [(0.0, 4.0, "a"), (5.0, 5.0, "b<int>(x)"), (8.0, 4.0, "c")]
    assert kernel_trace.gaps(spans) == [1.0, 0.0]
    assert (kernel_trace.busy(spans), kernel_trace.span(spans)) == (11.0, 12.0)
    twice = [*spans, *((start + 100, us, name) for start, us, name in spans)]
    found = kernel_trace.replay_gaps(twice, 2)
    assert (found["kernels"], found["busy us"], found["gap us in the trace"]) == (3, 11.0, 1.0)
    assert found["us by kernel"] == {"b": 5.0, "a": 4.0, "c": 4.0}
    with pytest.raises(ValueError, match="3 kernels traced in 2 replays"):
        kernel_trace.replay_gaps(spans, 2)


def test_gaps_between_steps_are_the_largest() -> None:
    spans = [(start + 10 * step + 3 * (step == 2), 3.0, "k") for step in range(3) for start in (0.0, 4.0)]
    found = kernel_trace.engine_gaps(spans, 3)
    assert found["idle share"] == pytest.approx((1 + 3 + 1 + 6 + 1) / 30)
    assert found["between steps"] == pytest.approx((3 + 6) / 30)
    assert found["longest gap us"] == 6.0


# Targets, reports, charts


def decode(batch: int, context: int, ms: float, gb_s: float = 2000.0) -> dict[str, Any]:
    found = {"batch": batch, "context": context, "ms": ms, "spread": 0.01, "tok/s": batch / ms * 1e3, "GB": 5.0}
    return {**found, "GB/s": gb_s}


def served(rate: float, first: float, way: str) -> dict[str, Any]:
    return {
        "way": way, "load": "a load", "rounds": 2, "tok/s": rate, "tok/s range": [rate, rate], "TTFT ms": first,
        "TTFT ms range": [first, first], "between tokens ms": 3.0,
    }  # fmt: skip


RESULTS: dict[str, Any] = {
    "rates": {"copy GB/s": 2500.0, "read GB/s": 3000.0, "matmul TFLOP/s": 700.0},
    "right": {"w4 …": {"wrong": [], "wrong in all": 0, "largest error": 0.01, "limit": 0.02}},
    "trial": {"decode": {"4-bit": {"B1 L512": 3.0, "B64 L512": 10.0}}, "prefill": {"4-bit": {"512": 20.0}}},
    "models": {
        W4: {
            "decode": {"B1 L512": decode(1, 512, 3.1), "B64 L512": decode(64, 512, 11.0)},
            "prefill": {
                "8192": {"tokens": 8192, "ms": 300.0, "spread": 0.0, "tok/s": 27000.0, "TFLOP/s": 420.0, "host ms": 2.0}
            },
            "served": {"1": served(280.0, 14.0, "in process"), "64": served(4100.0, 300.0, "in process")},
            "http": {
                "1": served(305.0, 16.0, "over HTTP"), "start to ready s": 3.5, "folder written in s": 20.0,
                "stages of a start s": {"imports": 1.0, "in all": 3.2},
            },
            "gaps": {
                "1": {"in a step": {"busy us": 3050.0, "kernels": 290, "us by kernel": {"k": 900.0}},
                      "engine": {"between steps": 0.01, "idle share": 0.04}},
                "64": {"in a step": {"busy us": 10560.0, "kernels": 290, "us by kernel": {"k": 900.0}},
                       "engine": {"between steps": 0.02, "idle share": 0.04}},
            },
        },
    },
}  # fmt: skip


def test_targets_are_reached_missed_or_not_measured() -> None:
    words = {v.goal.name.partition(":")[0]: (v.word, v.found) for v in goals.judge(RESULTS)}
    assert words["small models as the reference"][0] == "reached"
    assert words["one stream, 4-bit, 128 in, 256 out"] == ("reached", "305 tok/s (over HTTP)")
    assert words["one stream, 4-bit, 128 in"][0] == "MISSED"
    assert words["64 at once, 4-bit, 512 in, 256 out"] == ("reached", "4,100 tok/s (in process)")
    assert words["64 at once, bf16, 512 in, 256 out"] == ("not measured", "")
    assert words["decode steps"] == ("MISSED", "1.10 × (the worst of 2 cases: 4-bit B64 L512)")
    assert words["idle in a decode step"] == ("MISSED", "4.0% (batch 64, 4-bit)")
    assert words["idle between decode steps"][0] == "reached"
    assert words["prefill of 8,192 tokens"] == ("reached", "60.0% (Llama-3-8B 4-bit)")
    assert words["start to ready, 4-bit"][0] == "reached"


def test_nothing_measured_is_no_target_reached() -> None:
    assert all(v.reached is None for v in goals.judge({}))


def test_a_wrong_model_is_a_failure() -> None:
    found = report.as_document(
        {"measured": True}, supervise.Report({"right": {"w8": {"wrong": ["x"], "wrong in all": 3}}})
    )
    assert report.failed(found) == ["w8: x"]
    assert goals.judge(found["results"])[0].word == "MISSED"


def test_report_files(tmp_path: Path) -> None:
    grown = supervise.Report(
        {**RESULTS, "facts": {"card": "a GPU"}}, ["decode x: gone"], ["trial: no time left"], {"right": 3.2}
    )
    report.write(tmp_path, {"date": "today", "measured": True}, grown)
    document = json.loads((tmp_path / "gpu_engine.json").read_text())
    assert document["facts"] == {"date": "today", "measured": True, "card": "a GPU"}
    text = (tmp_path / "gpu_engine.md").read_text()
    assert "| Llama-3-8B 4-bit | 64 | 512 | 11.000 | 1.0% | 5,818 | 2,000 | 67% | 1.10 |" in text
    assert "| Llama-3-8B 4-bit | 8,192 | 300.0 | 27,000 | 420 | 60% | 2.0 |  |" in text
    assert "## Failed\n\n* decode x: gone" in text
    assert "## Left out\n\n* trial: no time left" in text
    assert "Qwen" not in text
    for name in ("gpu_engine.svg", "gpu_engine_prefill.svg"):
        ET.fromstring((tmp_path / name).read_text())
    assert not list(tmp_path.glob(".*"))


def test_a_dry_run_has_reached_no_target(tmp_path: Path) -> None:
    report.write(tmp_path, {"measured": False}, supervise.Report(RESULTS))
    table = (tmp_path / "gpu_engine.md").read_text().partition("## Targets")[2].partition("##")[0]
    assert "305 tok/s" not in table
    assert table.count("not measured") == len(goals.GOALS) - 1


def test_charts_have_a_point_for_every_case_and_the_bound() -> None:
    text = chart.decode_chart(RESULTS)
    assert text is not None
    assert text.count("<circle") == 2
    assert text.count("<polyline") == 2
    assert "read bound" in text
    assert chart.charts({}) == {}
    slow = {"models": {W4: {"decode": {"B1 L512": decode(1, 512, 3.0)}}}}
    assert "bound" not in chart.charts(slow)["gpu_engine.svg"]


def test_the_trial_is_read_and_compared(tmp_path: Path) -> None:
    document = {
        "results": {
            "w4 B1 L512": {"ms": 3.0}, "w4 B1 L512 graph for 8192": {"ms": 9.0}, "bfloat16 B64 L512": {"ms": 8.0},
            "w4 prefill 512": {"eager ms": 22.0, "graph ms": 20.0}, "rates": {"copy GB/s": 1}, "seconds": {"x": 1},
        },
        "problems": ["one"],
    }  # fmt: skip
    (tmp_path / "source.json").write_text(json.dumps(document))
    found = trial.run_trial(
        f"cp {tmp_path / 'source.json'} $OUT/trial.json; test $TRIAL_SECONDS = 16", tmp_path / "o", 20
    )
    assert found["ending"] == "exit code 0"
    assert found["decode"] == {"4-bit": {"B1 L512": 3.0}, "bf16": {"B64 L512": 8.0}}
    assert found["prefill"] == {"4-bit": {"512": 20.0}}
    ours = {"trial": found, "models": {W4: {"decode": {"B1 L512": decode(1, 512, 3.3)}}}}
    assert trial.ratios(ours) == {"4-bit B1 L512": pytest.approx(1.1)}
    with pytest.raises(RuntimeError, match="exit code 3, and no trial"):
        trial.run_trial("echo broken; exit 3", tmp_path / "empty", 20)
    with pytest.raises(RuntimeError, match="ended after 1 s"):
        trial.run_trial("exec sleep 30", tmp_path / "slow", 1)


# Workers

WORKER = """
    import os, sys, time
    sys.path.insert(0, {scripts!r})
    from engine_check.supervise import LeftOut, work

    state = []
    def run(task, budget, emit):
        state.append(task)
        emit(["done", task], len(state))
        if task == "dies": os._exit(7)
        if task == "crashes": os.abort()
        if task == "hangs": time.sleep(60)
        if task == "fails": raise ValueError("no\\ngood")
        if task == "loses": raise RuntimeError("an illegal address")
        if task == "is left": raise LeftOut("no packages")

    events = os.fdopen(int(sys.argv[sys.argv.index("--events") + 1]), "w")
    work(run, sys.stdin, events, lambda: state[-1] == "loses")
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(supervise, "GRACE", 0.5)
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(WORKER).format(scripts=str(SCRIPTS)))
    return [sys.executable, str(path)]


def tasks(*names: str, seconds: float = 30, worker: str = "a") -> list[supervise.Task]:
    return [supervise.Task(name, seconds, 0, worker) for name in names]


def test_what_a_task_does_costs_the_others_nothing(worker: list[str]) -> None:
    found = supervise.Report()
    seen = []
    wanted = tasks("one", "dies", "two", "crashes", "three", "fails", "four", "loses", "five", "is left", "six")
    supervise.supervise(wanted, worker, 100, found, lambda grown: seen.append(len(grown.results.get("done", {}))))
    # A worker's count begins anew after one that died or lost its device, and goes on after one that failed.
    assert found.results["done"] == {
        "one": 1, "dies": 2, "two": 1, "crashes": 2, "three": 1, "fails": 2, "four": 3, "loses": 4, "five": 1,
        "is left": 2, "six": 3,
    }  # fmt: skip
    assert found.problems == [
        "dies: the worker died: exit code 7", "crashes: the worker died: signal SIGABRT", "fails: ValueError: no good",
        "loses: RuntimeError: an illegal address",
    ]  # fmt: skip
    assert found.left_out == ["is left: no packages"]
    assert seen == sorted(seen)
    assert set(found.seconds) == {task.name for task in wanted}


def test_a_task_that_hangs_is_ended(worker: list[str]) -> None:
    found = supervise.Report()
    supervise.supervise([*tasks("hangs", seconds=0.5), *tasks("one")], worker, 100, found)
    assert found.problems == ["hangs: not done after 0 s, ended"]
    assert found.results["done"] == {"hangs": 1, "one": 1}


def test_time_runs_out(worker: list[str]) -> None:
    found = supervise.Report()
    supervise.supervise([supervise.Task("one", 5, 1000, "a"), supervise.Task("two", 5, 0, "a")], worker, 100, found)
    assert found.left_out == ["one: no time left"]
    assert found.results["done"] == {"two": 1}


def test_another_label_is_another_worker(worker: list[str]) -> None:
    found = supervise.Report()
    supervise.supervise([*tasks("one", "two"), *tasks("three", worker="b")], worker, 100, found)
    assert found.results["done"] == {"one": 1, "two": 2, "three": 1}


# What only a GPU runs, on a pretended one


class Event:
    """Of torch.cuda."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.moment = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return (other.moment - self.moment) * 1e3


class Profile:
    """Of torch.profiler: a trace of four kernels for every run of a runtime that ``count`` counts."""

    count = 0

    def __init__(self, **_: Any) -> None:
        Profile.count = 0

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def export_chrome_trace(self, path: str) -> None:
        kernels = [
            {"ph": "X", "cat": "kernel", "name": f"void kernel_{i}<int>()", "ts": 10.0 * n + 2 * i, "dur": 1.5}
            for n in range(Profile.count)
            for i in range(4)
        ]
        Path(path).write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "x"}, *kernels]}))


class Counted(dry.DryRuntime):
    """Counts the steps that a trace sees."""

    def execute(self, plan: Any, sampling: Any) -> Any:
        Profile.count += 1
        return super().execute(plan, sampling)

    def decode_replay(self, batch: int, context: int) -> Any:
        inner = super().decode_replay(batch, context)

        def run() -> None:
            Profile.count += 1
            inner()

        return run


class Pretended(place.CudaPlace):
    """A CudaPlace whose device is the CPU's memory."""

    device = "cpu"

    def open(self, *arguments: Any) -> Any:
        return Counted(*arguments)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Setting:
    for name, value in {
        "Event": Event, "synchronize": lambda: None, "empty_cache": lambda: None,
        "mem_get_info": lambda: (2**30, 2**31), "get_device_name": lambda: "a pretended GPU",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(__version__="14"))
    monkeypatch.setattr(kernel_trace, "warm_up", lambda: None)
    return Setting(
        Pretended, lambda: "sm_90", tmp_path, lambda _: tmp_path,
        models=lambda shape, kind, _: models.Model(shape, kind, {**models.SHAPES[shape], **SMALL}),
        variants=(VARIANT,) * 3, scale=TINY, decodes=((1, 64), (4, 64), (2, 100)), prefills=(64, 32),
        one=loads.Load(1, 16, 60, 2), many=loads.Load(4, 24, 60, 1),
        rates=lambda: speed.device_rates(2**16, 32, "cpu"),
    )  # fmt: skip


def test_every_task_on_a_pretended_device(pretended: Setting) -> None:
    session, found = Session(pretended), supervise.Report()
    for name in ("facts", "rates", f"decode {W4}", f"served {W4}", f"prefill {W4}", f"decode {BF16}", "right rest"):
        session.run(name, supervise.Budget(60), found.put)
    results = found.results
    assert results["facts"]["card"] == "a pretended GPU"
    assert all(value > 0 for value in results["rates"].values())
    assert set(results["models"][W4]["decode"]) == {"B1 L64", "B4 L64", "B2 L100"}
    assert set(results["models"][W4]["prefill"]) == {"64", "32"}
    assert results["models"][W4]["served"]["4"]["tok/s"] > 0
    assert results["models"][BF16]["launch cost"]["host us a launch"] > 0
    assert any("no decode step" in line or "a decode step" in line for line in results["right"][VARIANT.name]["wrong"])
    assert report.markdown(report.as_document({"measured": True}, found))


def test_traces_on_a_pretended_device(pretended: Setting) -> None:
    session, found = Session(pretended), supervise.Report()
    pretended.gap_context = 64
    session.run(f"gaps {W4}", supervise.Budget(60), found.put)
    gaps = found.results["models"][W4]["gaps"]
    assert set(gaps) == {"1", "4"}
    assert gaps["4"]["in a step"]["kernels"] == 4
    assert gaps["4"]["engine"]["idle share"] == pytest.approx((24 * 1.5 + 23 * 2.5) / (23 * 10 + 7.5), abs=0.05)


def test_time_that_runs_out_in_a_task_is_told(pretended: Setting) -> None:
    session, found = Session(pretended), supervise.Report()
    with pytest.raises(supervise.LeftOut, match="no time for 1 × 64"):
        session.run(f"decode {W4}", supervise.Budget(1), found.put)
    session.run("right first", supervise.Budget(1), found.put)
    assert found.results["right left out"]["first"] == [VARIANT.name] * 2


def test_an_error_in_a_variant_is_its_own(pretended: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    session, found = Session(pretended), supervise.Report()
    monkeypatch.setattr(right, "check", lambda *_: 1 // 0)
    session.run("right rest", supervise.Budget(60), found.put)
    assert found.results["right"][VARIANT.name]["wrong"] == ["ZeroDivisionError: integer division or modulo by zero"]
    monkeypatch.setattr(Session, "lost", lambda _: True)
    with pytest.raises(ZeroDivisionError):
        session.run("right rest", supervise.Budget(60), found.put)


# A folder of random weights


def test_a_folder_of_random_weights_is_an_engine(tmp_path: Path) -> None:
    for kind in ("4-bit", "bf16"):
        model = small(kind)
        folder.write_folder(model, tmp_path / kind)
        loaded = load_engine(tmp_path / kind, EngineRequest(budget=2**30), verify=True, kernels=False)
        assert {name: plane.shape for name, plane in loaded.weights.items()} == {
            name: plane.shape for name, plane in model.planes.items()
        }
        assert str(loaded.manifest.target) == "cuda:sm_90"
        scales = [plane.data for name, plane in loaded.weights.items() if name.endswith("tile_scales")]
        assert all(np.isfinite(data).all() for data in scales)
        assert bool(scales) == (kind == "4-bit")


@pytest.mark.parametrize("size", [3000, 128256])
def test_the_tokenizer_has_the_vocabulary_and_a_token_for_every_word(tmp_path: Path, size: int) -> None:
    for name, content in folder.tokenizer_files(size).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == size
    assert tokenizer.eos_token_ids == {size - 1}
    exactly = LengthRange.parse("64", "x")
    items = random_items(
        3, exactly, exactly, seed=0, stream=0, counter=lambda texts: [len(tokenizer.encode(text)) for text in texts]
    )
    assert all(item.exact for item in items)
    assert tokenizer.decode([size - 2])


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a vocabulary of"):
        folder.tokenizer_files(300)


@pytest.mark.slow
def test_starts_and_loads_over_http(tiny_engine: Path, tmp_path: Path) -> None:
    """On the reference's engine, which any machine can serve."""
    engine = tmp_path / "engine"
    engine.symlink_to(tiny_engine)
    http_serve.written_mark(engine).write_text("1.5")
    found = supervise.Report()
    small_loads = (loads.Load(1, 12, 4, 2), loads.Load(3, 12, 4, 2))
    http_serve.serve_over_http("a model", engine, supervise.Budget(120), found.put, small_loads)
    http = found.results["models"]["a model"]["http"]
    assert http["folder written in s"] == 1.5
    assert 0 < http["start to ready s"] < 60
    assert (http["1"]["rounds"], http["3"]["load"]) == (2, "3 at once, 12 in, 4 out")
    assert http["3"]["tok/s"] > 0
    stages = http["stages of a start s"]
    assert stages.pop("in all") == pytest.approx(sum(stages.values()), abs=0.01)
    assert report.start_rows(found.results)


def test_a_server_that_cannot_be_imported_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, found = supervise.Budget(1), supervise.Report()
    with pytest.raises(supervise.LeftOut, match="not written in time"):
        http_serve.serve_over_http("a model", tmp_path / "x", budget, found.put)
    monkeypatch.setattr(http_serve, "SERVER_PACKAGES", ("json", "no_such_package"))
    with pytest.raises(supervise.LeftOut, match="not installed: no_such_package"):
        http_serve.serve_over_http("a model", tmp_path / "x", budget, found.put)


# The command


def test_parts_choose_tasks() -> None:
    names = [task.name for task in gpu_engine.chosen(["decode", "trial"], "", http=True)]
    assert names[0] == "facts"
    assert all(name == "facts" or name.startswith("decode ") for name in names)
    assert "trial" in [task.name for task in gpu_engine.chosen(["trial"], "a command", http=True)]
    assert {task.name.split()[0] for task in gpu_engine.TASKS} - {"facts"} == set(gpu_engine.PARTS)
    assert gpu_engine.main(["--parts", "decode,nonsense"]) == 2


def test_a_worker_holds_one_models_weights_and_traces_have_their_own() -> None:
    labels = [task.worker for task in gpu_engine.TASKS]
    runs = [label for i, label in enumerate(labels) if not i or labels[i - 1] != label]
    assert len(runs) == len(set(runs))
    for part in ("http", "gaps", "trial"):
        (label,) = {task.worker for task in gpu_engine.TASKS if task.name.split()[0] == part}
        assert labels.count(label) == 1


@pytest.mark.skipif(missing_device() is None, reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(SCRIPTS / "gpu_check.sh"), "--engine", "--output", str(tmp_path)], capture_output=True, text=True,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == gpu_engine.NO_GPU
    assert done.stderr == f"gpu_check --engine: no usable GPU: {missing_device()}\n"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_from_end_to_end(tmp_path: Path) -> None:
    said = json.dumps({"results": {"w4 B1 L64": {"ms": 1}}})
    command = [
        str(SCRIPTS / "gpu_check.sh"), "--engine", "--dry", "--output", str(tmp_path), "--parts",
        "decode,served,prefill,trial", "--trial", f"echo '{said}' > $OUT/trial.json",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "gpu_engine.json").read_text())
    assert document["problems"] == []
    assert document["left out"] == []
    assert document["facts"]["measured"] is False
    found = document["results"]["models"]
    assert set(found) == {W4, BF16, "Qwen3-4B 4-bit", "Qwen3-4B bf16"}
    assert set(found[W4]) == {"opened", "launches", "decode", "launch cost", "served", "prefill"}
    assert document["results"]["trial"]["decode"] == {"4-bit": {"B1 L64": 1}}
    assert "÷ trial" in (tmp_path / "gpu_engine.md").read_text()
