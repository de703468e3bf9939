"""scripts/gpu_check.sh --engine where there is no GPU: speed, loads, workers that die, tasks on a pretended device,
engine folders, a dry run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path
from typing import Any

import gpu_engine
import numpy as np
import pytest
import torch
from engine_check import (
    dry,
    folder,
    http_serve,
    kernel_trace,
    loads,
    models,
    place,
    report,
    right,
    speed,
    supervise,
)  # fmt: skip
from engine_check.session import Session, Setting
from engine_check_cases import BF16, SCRIPTS, SMALL, TINY, VARIANT, W4, small

from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.bench.workloads import LengthRange, random_items
from llmctl.targets.cuda.launch import missing_device
from llmctl.text.tokenizer import Tokenizer

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


@pytest.mark.slow
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
