"""``llmctl bench profile``: its account of bytes and multiply-adds, its line, and runs on small engines."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_checkpoint
from click.testing import Result
from random_models import write_model

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.bench import profile_report
from llmctl.bench.config import BenchProfileConfig
from llmctl.bench.step_profile import Need, Profile, StepBench, Wanted, growth
from llmctl.config import BuildConfig
from llmctl.errors import UsageError
from llmctl.targets.cpu import profiling
from llmctl.targets.cpu.packing import engine_weights
from llmctl.targets.cpu.profiling import CpuProfiler, step_work
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.targets.step_work import Bounds, Work

Bench = Callable[..., Result]
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    model = tiny_checkpoint.write_gptq(folder / "model", bits=4)
    return build_engine(BuildConfig(model=str(model), target="cpu", output=str(folder / "engine")))


@needs_compiler
def test_work_of_a_step(engine: Path) -> None:
    loaded = load_engine(engine, EngineRequest(kv_cache_bytes=1 << 20))
    graph, settings = loaded.graph, tiny_checkpoint.config()
    linears = dict(engine_weights(loaded.graph, loaded.options, loaded.weights).linears)
    work = step_work(graph, linears, "bfloat16", [(9, 1), (0, 20)])

    layer_macs = sum(rows * columns for rows, columns in tiny_checkpoint.linear_shapes().values())
    head_macs = settings["vocab_size"] * settings["hidden_size"]
    assert work.int_macs == 21 * layer_macs + 2 * head_macs  # the head runs on the two sampled rows only
    heads, layers = settings["num_attention_heads"], settings["num_hidden_layers"]
    head_dim = settings["hidden_size"] // heads
    seen = 10 + sum(range(1, 21))  # keys that each query sees
    assert work.float_macs == layers * heads * 2 * seen * head_dim
    # Attention over int8 keys multiplies integers.
    integers = step_work(graph, linears, "int8", [(9, 1), (0, 20)])
    assert (integers.int_macs, integers.float_macs) == (work.int_macs + work.float_macs, 0)
    padded = -(-head_dim // 16) * 16
    assert work.kv_bytes == layers * 2 * (10 + 20) * settings["num_key_value_heads"] * padded * 2
    stored = sum(p.data.nbytes for n, p in loaded.weights.items() if n.rpartition(".")[2].startswith("tile"))
    assert work.weight_bytes == stored


@needs_compiler
def test_a_window_bounds_what_attention_reads(engine: Path) -> None:
    loaded = load_engine(engine, EngineRequest(kv_cache_bytes=1 << 20))
    linears = dict(engine_weights(loaded.graph, loaded.options, loaded.weights).linears)
    ops = tuple(
        replace(op, attrs={**op.attrs, "window": 8}) if op.kind == "attention" else op for op in loaded.graph.ops
    )
    windowed = replace(loaded.graph, ops=ops)
    long, short = (step_work(windowed, linears, "bfloat16", [(before, 1)]) for before in (100, 7))
    assert (long.kv_bytes, long.float_macs) == (short.kv_bytes, short.float_macs)
    assert long.kv_bytes < step_work(loaded.graph, linears, "bfloat16", [(100, 1)]).kv_bytes


@needs_compiler
def test_of_experts_those_that_are_chosen_are_read(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3_moe")
    path = build_engine(BuildConfig(model=str(model), target="cpu", output=str(tmp_path / "engine")))
    loaded = load_engine(path, EngineRequest(kv_cache_bytes=1 << 20, max_num_seqs=32))
    runtime = open_runtime(loaded, threads=2)
    profiler = CpuProfiler(loaded, runtime, None)  # type: ignore[arg-type]
    bench = StepBench(profiler, step_tokens=32, steps=1)
    one, many = bench.plan([(0, 1)]), bench.plan([(0, 1)] * 32)
    assert profiler.experts_read(*one) == 2 / 6
    assert 2 / 6 < profiler.experts_read(*many) <= 1
    work, whole = (step_work(loaded.graph, profiler.linears, "bfloat16", [(0, 1)], share) for share in (2 / 6, 1.0))
    assert profiler.work([(0, 1)], *one) == work
    experts = sum(profiler.linears[op.weights[0]].data.nbytes for op in loaded.graph.ops if op.kind == "grouped_linear")
    assert whole.weight_bytes - work.weight_bytes == experts * 4 // 6
    assert whole.float_macs == work.float_macs
    runtime.close()


def test_growth_fits_a_line() -> None:
    def point(context: int, step: float) -> Profile:
        work = Work(weight_bytes=1000, kv_bytes=context * 64, int_macs=1, float_macs=1)
        bounds = Bounds(1e9, 1e9)
        parts = {"attention": context / 4}
        return Profile("", 1, context, step, (step, step), parts, 0.0, work, bounds, bounds.microseconds(work))

    line = growth([point(c, 100 + 0.5 * c) for c in (512, 1024, 4096)])
    found = (line.step, line.attention, line.predicted, line.bound)
    np.testing.assert_allclose(found, (0.5, 0.25, 0.064, 0.064), rtol=1e-9)
    assert line.worst < 1e-9
    assert growth([point(100, 1.0), point(200, 4.0), point(300, 9.0)]).worst > 0.05


def test_growth_of_a_cache_that_does_not_grow() -> None:
    """Every context is longer than attention's window: there is nothing to predict from."""
    still = {"step": 0.001, "attention": 0.0, "predicted": 0.0, "bound": 1e-9, "worst": 0.01}
    said = profile_report._growth_line(still)
    assert "step 1, its attention 0, predicted from KV bytes 0, of the read bound 0 (no context makes them more" in said
    assert "predicted from KV bytes 1 (ratio 1.00)" in profile_report._growth_line({**still, "predicted": 0.001})


def test_bounds_of_what_there_is() -> None:
    work = Work(weight_bytes=600, kv_bytes=400, int_macs=0, float_macs=50)
    assert Bounds(1e9, 1e9, 1e9).microseconds(work) == {"read": pytest.approx(1.0), "float": pytest.approx(0.05)}
    assert set(Bounds(1e9, 1e9).microseconds(replace(work, int_macs=1))) == {"read", "int8"}


SIZES = ("--batches", "1,3", "--context", "20", "--prefill", "32", "--contexts", "16,32,64", "--steps", "5")


@needs_compiler
@pytest.mark.parametrize("more", [(), ("--from-source",)])
def test_a_run(
    engine: Path, tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr(profiling, "BIG", 1 << 20)
    chart = tmp_path / "profile.svg"
    result = bench("profile", "--model", str(engine), *SIZES, "--threads", "2", "--svg", str(chart), "--json", *more)
    assert result.exit_code == 0, result.stderr
    doc = json.loads(result.stdout)
    assert [s["name"] for s in doc["steps"]] == ["decode, batch 1", "decode, batch 3", "prefill of 32"]
    assert (doc["threads"], doc["parts"]) == (2, "op")
    for step in doc["steps"] + doc["contexts"]:
        assert {"linear", "attention"} <= set(step["parts"])
        assert 0 < sum(step["parts"].values()) < 10 * step["step"]
        assert min(step["bounds"]["read"], step["bounds"]["int_macs"]) > 1e6
        assert set(step["bound"]) == {"read", "int8"}
    kv = [p["work"]["kv_bytes"] for p in doc["contexts"]]
    assert kv == [kv[0], 2 * kv[0], 4 * kv[0]]
    assert "linear" in result.stderr
    assert "slope, us per 1,000 tokens of context" in result.stderr
    drawn = ET.parse(chart).getroot()
    words = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("read") == 6
    assert {"decode, batch 1", "context 64", "linear", "sampling, host, gaps"} <= set(words)


def test_a_run_on_torch(tiny_engine: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmctl.targets.reference import profiling as on_torch

    monkeypatch.setattr(on_torch, "BIG", 1 << 20)
    result = bench("profile", "--model", str(tiny_engine), *SIZES, "--only", "decode,prefill", "--json")
    assert result.exit_code == 0, result.stderr
    doc = json.loads(result.stdout)
    assert doc["target"] == "reference"
    for step in doc["steps"]:
        assert {"linear", "attention"} <= set(step["parts"])
        assert 0 < sum(step["parts"].values()) < 10 * step["step"]
        assert set(step["bound"]) == {"read", "float"}
    result = bench("profile", "--model", str(tiny_engine), *SIZES, "--from-source")
    assert result.exit_code == 2
    assert "--from-source" in result.stderr


def test_ctrl_c_keeps_the_steps_that_were_measured(
    tiny_engine: Path, tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmctl.targets.reference import profiling as on_torch

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(on_torch, "BIG", 1 << 20)
    monkeypatch.setattr(StepBench, "prefill", interrupted)
    chart = tmp_path / "profile.svg"
    args = ("profile", "--model", str(tiny_engine), *SIZES[2:], "--batches", "1", "--steps", "1")
    result = bench(*args, "--svg", str(chart), "--json")
    assert result.exit_code == 130, result.stderr
    doc = json.loads(result.stdout)
    assert (doc["interrupted"], [step["name"] for step in doc["steps"]]) == (True, ["decode, batch 1"])
    assert "interrupted: what was measured until then is in the result" in result.stderr
    assert chart.exists()
    monkeypatch.setattr(StepBench, "decode", interrupted)
    result = bench(*args)
    assert (result.exit_code, result.stdout) == (130, "")


def needed(longest: int = 8192, **more: object) -> Need:
    return Wanted.of(BenchProfileConfig(**more), longest).need  # type: ignore[arg-type]


def test_sizes_that_nobody_named_are_what_the_engine_takes() -> None:
    assert needed(2048) == Need(length=2048, step_tokens=512, sequences=32, each=200)
    assert needed(300, only="prefill,growth") == Need(300, 300, 1, 0)
    for more, said in (({"prefill": 301}, "--prefill 301"), ({"contexts": "16,301"}, "--contexts 301")):
        with pytest.raises(UsageError, match=f"{said}: the engine takes 300 tokens"):
            needed(300, **more)


def test_only_what_is_asked_for_must_fit() -> None:
    assert needed() == Need(length=8192, step_tokens=512, sequences=32, each=200)
    assert needed(only="decode") == Need(200, 512, 32, 200)
    assert needed(only="prefill", prefill=700) == Need(700, 700, 1, 0)
    assert needed(only="growth", contexts="64,1000") == Need(1000, 512, 1, 0)
    assert [needed(only="decode").blocks(size) for size in (16, 64)] == [13 * 32, 4 * 32]
    assert [needed(only="growth", contexts="64,1000").blocks(size) for size in (16, 64)] == [63, 16]
    assert needed().blocks(16) == 512


def test_sequences_of_a_batch_share_no_block() -> None:
    limits = SimpleNamespace(num_blocks=109, block_size=64, vocab_size=100)
    bench = StepBench(SimpleNamespace(runtime=SimpleNamespace(limits=limits)), step_tokens=512, steps=1)  # type: ignore[arg-type]
    plan, _ = bench.plan([(191, 1)] * 36)
    assert len({block for row in plan.slices for block in row.block_ids}) == 36 * 3
    with pytest.raises(AssertionError, match="the same block"):
        bench.plan([(199, 1)] * 32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "decod"], "unknown 'decod': expected some of decode, prefill, growth"),
        (["--batches", "0"], "'0': expected whole numbers of at least 1"),
        (["--contexts", "64,x"], "'64,x': expected whole numbers of at least 1"),
        (["--steps", "0"], "--steps: expected at least 1, found 0"),
        (["--svg", f"{__file__}/out.svg"], "test_bench_profile.py is not a folder"),
    ],
)
def test_options_are_checked_before_the_engine_is_opened(words: list[str], said: str, bench: Bench) -> None:
    result = bench("profile", "--model", "nowhere", *words)
    assert result.exit_code == 2
    assert said in result.stderr
