"""scripts/profile_cpu.py: its account of bytes and multiply-adds, its line, and a run on a small engine."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
from random_models import write_model

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.config import BuildConfig
from llmctl.targets.cpu.packing import engine_weights
from llmctl.targets.cpu.toolchain import find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")

sys.path.append(str(Path(__file__).parents[2] / "scripts"))  # what the script imports from its own folder
_SPEC = importlib.util.spec_from_file_location("profile_cpu", Path(__file__).parents[2] / "scripts" / "profile_cpu.py")
assert _SPEC is not None
assert _SPEC.loader is not None
sys.modules["profile_cpu"] = script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    model = tiny_checkpoint.write_gptq(folder / "model", bits=4)
    return build_engine(BuildConfig(model=str(model), target="cpu", output=str(folder / "engine")))


def test_work_of_a_step(engine: Path) -> None:
    loaded = load_engine(engine, EngineRequest(kv_cache_bytes=1 << 20))
    graph, settings = loaded.graph, tiny_checkpoint.config()
    linears = dict(engine_weights(loaded.graph, loaded.options, loaded.weights).linears)
    work = script.step_work(graph, linears, "bfloat16", [(9, 1), (0, 20)])

    layer_macs = sum(rows * columns for rows, columns in tiny_checkpoint.linear_shapes().values())
    head_macs = settings["vocab_size"] * settings["hidden_size"]
    assert work.int_macs == 21 * layer_macs + 2 * head_macs  # the head runs on the two sampled rows only
    heads, layers = settings["num_attention_heads"], settings["num_hidden_layers"]
    head_dim = settings["hidden_size"] // heads
    seen = 10 + sum(range(1, 21))  # keys that each query sees
    assert work.float_macs == layers * heads * 2 * seen * head_dim
    # Attention over int8 keys multiplies integers.
    integers = script.step_work(graph, linears, "int8", [(9, 1), (0, 20)])
    assert (integers.int_macs, integers.float_macs) == (work.int_macs + work.float_macs, 0)
    padded = -(-head_dim // 16) * 16
    assert work.kv_bytes == layers * 2 * (10 + 20) * settings["num_key_value_heads"] * padded * 2
    stored = sum(p.data.nbytes for n, p in loaded.weights.items() if n.rpartition(".")[2].startswith("tile"))
    assert work.weight_bytes == stored


def test_a_window_bounds_what_attention_reads(engine: Path) -> None:
    loaded = load_engine(engine, EngineRequest(kv_cache_bytes=1 << 20))
    linears = dict(engine_weights(loaded.graph, loaded.options, loaded.weights).linears)
    ops = tuple(
        replace(op, attrs={**op.attrs, "window": 8}) if op.kind == "attention" else op for op in loaded.graph.ops
    )
    windowed = replace(loaded.graph, ops=ops)
    long, short = (script.step_work(windowed, linears, "bfloat16", [(before, 1)]) for before in (100, 7))
    assert (long.kv_bytes, long.float_macs) == (short.kv_bytes, short.float_macs)
    assert long.kv_bytes < script.step_work(loaded.graph, linears, "bfloat16", [(100, 1)]).kv_bytes


def test_of_experts_those_that_are_chosen_are_read(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3_moe")
    path = build_engine(BuildConfig(model=str(model), target="cpu", output=str(tmp_path / "engine")))
    loaded = load_engine(path, EngineRequest(kv_cache_bytes=1 << 20, max_num_seqs=32))
    runtime = open_runtime(loaded, threads=2)
    bench = script.Bench(loaded, runtime, None, steps=1)
    one, many = bench._plan([(0, 1)]), bench._plan([(0, 1)] * 32)
    assert bench._experts_read(*one) == 2 / 6
    assert 2 / 6 < bench._experts_read(*many) <= 1
    work, whole = (script.step_work(loaded.graph, bench.linears, "bfloat16", [(0, 1)], share) for share in (2 / 6, 1.0))
    experts = sum(bench.linears[op.weights[0]].data.nbytes for op in loaded.graph.ops if op.kind == "grouped_linear")
    assert whole.weight_bytes - work.weight_bytes == experts * 4 // 6
    assert whole.float_macs == work.float_macs
    runtime.close()


def test_growth_fits_a_line() -> None:
    def point(context: int, step: float) -> object:
        work = script.Work(weight_bytes=1000, kv_bytes=context * 64, int_macs=1, float_macs=1)
        return script.Profile("", 1, context, step, (step, step), {"attention": context / 4}, 0.0, work, 1e9, 1e9)

    line = script.growth([point(c, 100 + 0.5 * c) for c in (512, 1024, 4096)])
    found = (line.step, line.attention, line.predicted, line.bound)
    np.testing.assert_allclose(found, (0.5, 0.25, 0.064, 0.064), rtol=1e-9)
    assert line.worst < 1e-9
    assert script.growth([point(100, 1.0), point(200, 4.0), point(300, 9.0)]).worst > 0.05


def test_a_run(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "profile.json"
    sizes = ["--batches", "1,3", "--context", "20", "--prefill", "32", "--contexts", "16,32,64", "--steps", "5"]
    words = ["profile_cpu.py", "--engine", str(engine), *sizes, "--threads", "2", "--json", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(script, "_BIG", 1 << 20)
    assert script.main() == 0
    result = json.loads(output.read_text())
    assert [s["name"] for s in result["steps"]] == ["decode, batch 1", "decode, batch 3", "prefill of 32"]
    for step in result["steps"] + result["contexts"]:
        assert {"linear", "attention"} <= set(step["ops"])
        assert 0 < sum(step["ops"].values()) < 1.5 * step["step"]
        assert min(step["read"], step["int8"]) > 1e6
    kv = [p["work"]["kv_bytes"] for p in result["contexts"]]
    assert kv == [kv[0], 2 * kv[0], 4 * kv[0]]
    table = capsys.readouterr().out
    assert "| linear |" in table
    assert "slope, µs per 1,000 tokens of context" in table


def parsed(*words: str) -> object:
    return script.needed(script._parser().parse_args(["--engine", "e", *words]))


def test_only_what_is_asked_for_must_fit() -> None:
    assert parsed() == script.Need(length=8192, step_tokens=512, sequences=32, cache=8192)
    assert parsed("--only", "decode") == script.Need(200, 512, 32, 208 * 32)
    assert parsed("--only", "prefill", "--prefill", "700") == script.Need(700, 700, 1, 704)
    assert parsed("--only", "growth", "--contexts", "64,1000") == script.Need(1000, 512, 1, 1008)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "decod"], "unknown 'decod': expected some of decode, prefill, growth"),
        (["--batches", "0"], "'0': expected a whole number of at least 1"),
        (["--steps", "x"], "'x': expected a whole number of at least 1"),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: expected a file in a folder that exists"),
    ],
)
def test_options_are_checked_before_the_engine_is_opened(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["profile_cpu.py", "--engine", "nowhere", *words])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_only_a_cpu_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint.write_dense(tmp_path / "model")
    other = build_engine(BuildConfig(model=str(model), target="reference", output=str(tmp_path / "engine")))
    monkeypatch.setattr(sys, "argv", ["profile_cpu.py", "--engine", str(other), "--context", "20", "--contexts", "16"])
    assert script.main() != 0
    assert "expected a cpu engine, found reference" in capsys.readouterr().err
