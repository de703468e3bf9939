"""``llmctl bench serve`` end to end against the scripted server: exit codes, documents, files."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from fake_openai_server import FakeServer, Reply, count_tokens

Start = Callable[..., FakeServer]
Bench = Callable[..., Result]
BenchServe = Callable[..., tuple[int, dict[str, Any], Result]]

# `vllm bench serve` writes these, in this order (metadata comes after num_prompts).
VLLM_KEYS = (
    "date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency "
    "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput "
    "output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests"
).split() + [
    f"{word}_{name}_ms"
    for name in ("ttft", "tpot", "itl", "e2el")
    for word in ("mean", "median", "std", "p50", "p90", "p99")
]
OUR_KEYS = (
    "failed_ratio goodput_ratio schema_version kind num_repeats interrupted short_outputs output_token_source "
    "itl_token_source not_sent failures workload "
    "server client environment definitions repeats confidence baseline notes gates exit_code"
).split()

FAILURES = ["http_500", "cut", "stop_early", "malformed", "error_event", "empty", "not_sse", "abort"]


def test_a_good_run(start: Start, bench_serve: BenchServe) -> None:
    fake = start(Reply(first_delay=0.01, gap=0.002))
    code, doc, result = bench_serve(fake, "--slo", "p99_ttft_ms<=20000", "--goodput", "ttft:20000")
    assert code == 0, result.stderr
    assert list(doc) == [*VLLM_KEYS, *OUR_KEYS]
    assert doc["request_rate"] == "inf"
    assert (doc["completed"], doc["failed"], doc["model_id"], doc["backend"]) == (6, 0, "fake/model", "openai")
    assert doc["total_output_tokens"] == 30
    assert doc["total_input_tokens"] == sum(count_tokens(s.body["prompt"]) for s in fake.seen)
    assert doc["output_throughput"] == pytest.approx(30 / doc["duration"])
    assert doc["request_goodput"] == pytest.approx(6 / doc["duration"])
    assert (doc["output_token_source"], doc["workload"]["prompt_length_source"]) == ("usage", "server")
    assert [set(g) for g in doc["gates"]] == [{"metric", "op", "limit", "observed", "passed", "kind", "note"}] * 3
    assert doc["client"]["cpu_seconds"] > 0
    assert "TTFT" in result.stderr, "the table goes to stderr beside --json"


def test_what_is_sent(start: Start, bench_serve: BenchServe) -> None:
    fake = start()
    bench_serve(fake, "--temperature", "0.5", "--extra-body", '{"top_k": 3}', "--header", "X-A=b", "--api-key", "s3")
    for seen in fake.seen:
        body = seen.body
        assert 4 <= count_tokens(body.pop("prompt")) <= 9
        assert body == {
            **{"model": "fake/model", "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}},
            **{"temperature": 0.5, "ignore_eos": True, "top_k": 3},
        }
        assert (seen.headers["x-a"], seen.headers["authorization"]) == ("b", "Bearer s3")


def test_chat_and_a_url_ending_in_v1(start: Start, bench: Bench) -> None:
    fake = start()
    result = bench(
        *(
            "serve",
            "--base-url",
            fake.url + "/v1",
            "--backend",
            "openai-chat",
            "--num-prompts",
            "3",
            "--input-len",
            "5",
        ),
        *("--output-len", "4", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    assert {s.path for s in fake.seen} == {"/v1/chat/completions"}
    assert len(fake.seen) == 4, "one warm-up, three counted"
    assert json.loads(result.stdout)["completed"] == 3


@pytest.mark.parametrize("kind", FAILURES)
def test_one_failed_request_is_exit_code_3(start: Start, bench_serve: BenchServe, kind: str) -> None:
    code, doc, result = bench_serve(start(Reply(), Reply(kind), Reply()), "--slo", "p99_ttft_ms<=0.0001")
    assert code == 3
    assert (doc["completed"], doc["failed"]) == (4, 2)
    (failure,) = doc["failures"]
    assert failure["count"] == 2
    assert failure["messages"][0][:20] in result.stderr
    assert doc["exit_code"] == 3


@pytest.mark.parametrize("kind", [*FAILURES, "hang"])
def test_all_failed_never_passes(start: Start, bench_serve: BenchServe, kind: str) -> None:
    options = ("--max-failed-ratio", "1", "--slo", "failed>=0", "--request-timeout", "0.4")
    code, doc, _ = bench_serve(start(Reply(kind)), *options)
    assert code == 3
    assert doc["completed"] == 0
    assert doc["p99_ttft_ms"] is None


def test_failures_may_be_allowed(start: Start, bench_serve: BenchServe) -> None:
    script = [Reply(), Reply(), Reply("http_500")]
    assert bench_serve(start(*script), "--max-failed-ratio", "0.34")[0] == 0
    assert bench_serve(start(*script), "--max-failed-ratio", "0.3")[0] == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--slo", "p99_ttft_ms<=0.001"), 4),
        (("--slo", "p99.9_itl_ms<=20000", "--slo", "median_e2el_ms>=20000"), 4),
        (("--slo", "p75_tpot_ms<=20s"), 0),
        (("--goodput", "ttft:0", "--min-goodput", "50%"), 4),
        (("--goodput", "ttft:20000", "tpot:20000", "--min-goodput", "100%"), 0),
        (("--goodput", "e2el:20000", "--min-goodput", "1e9"), 4),
        (("--slo", "p99_ttft_ms<=0.001", "--exit-zero"), 0),
        (("--percentile-metrics", "ttft", "--slo", "p99_itl_ms<=20000"), 0),
    ],
)
def test_objectives(start: Start, bench_serve: BenchServe, options: tuple[str, ...], expected: int) -> None:
    code, doc, _ = bench_serve(start(), *options)
    assert code == expected
    assert all(g["observed"] is not None for g in doc["gates"])


def test_no_server_is_a_run_time_error(bench: Bench) -> None:
    result = bench("serve", "--base-url", "http://127.0.0.1:9", "--model", "m", "--ready-timeout", "0")
    assert result.exit_code == 1
    assert "no server answers" in result.stderr
    assert "llmctl serve" in result.stderr
    assert result.stderr.count("\n") == 1


def test_ready_timeout_waits_for_the_server(start: Start, bench_serve: BenchServe) -> None:
    code, doc, _ = bench_serve(start(), "--ready-timeout", "5")
    assert code == 0
    assert 0 <= doc["server"]["ready_wait_seconds"] < 5


def test_chunks_of_several_tokens_are_counted_by_usage_where_the_server_gives_it(
    start: Start, bench_serve: BenchServe
) -> None:
    fake = start(Reply(tokens_per_chunk=2))
    _, doc, _ = bench_serve(fake, "--num-warmups", "1")
    assert doc["itl_token_source"] == "usage"
    asked = ["continuous_usage_stats" in seen.body["stream_options"] for seen in fake.seen]
    assert asked == [False, True] + [True] * 6, "only once a chunk of several tokens was seen"
    _, doc, result = bench_serve(start(Reply(tokens_per_chunk=2, continuous=False)), "--num-warmups", "1")
    assert doc["itl_token_source"] == "unknown"
    assert "some chunks carry several tokens and nothing says how many" in result.stderr
    fake = start()
    assert bench_serve(fake, "--num-warmups", "1")[1]["itl_token_source"] == "single"
    assert len(fake.seen) == 7


def test_chunks_of_several_tokens_are_counted_by_a_tokenizer(
    start: Start, bench_serve: BenchServe, tiny_llama: Path
) -> None:
    options = ("--tokenizer", str(tiny_llama))
    _, doc, _ = bench_serve(start(Reply(tokens_per_chunk=2)), *options)
    assert doc["itl_token_source"] == "tokenizer"


def test_shared_prefixes(start: Start, bench_serve: BenchServe) -> None:
    fake = start()
    _, doc, _ = bench_serve(fake, "--prefix-len", "12", "--num-prefixes", "2")
    assert (doc["workload"]["prefix_len"], doc["workload"]["num_prefixes"]) == (12, 2)
    assert all(16 <= count_tokens(seen.body["prompt"]) <= 21 for seen in fake.seen)
    assert len({seen.body["prompt"][:20] for seen in fake.seen}) == 2


def test_without_tokenizer_lengths_are_said_to_be_approximate(start: Start, bench_serve: BenchServe) -> None:
    code, doc, result = bench_serve(start(tokenize=False))
    assert code == 0
    assert doc["workload"]["prompt_length_source"] == "approximate"
    assert "approximate" in result.stderr


def test_a_server_without_models_needs_model(start: Start, bench_serve: BenchServe) -> None:
    assert bench_serve(start(models=()))[0] == 2
    assert bench_serve(start(models=()), "--model", "m")[0] == 0


def test_the_median_is_one_column(start: Start, bench: Callable[..., Result]) -> None:
    made = bench("serve", "--base-url", start().url, "--num-prompts", "2", "--output-len", "3", "--num-warmups", "0")
    header = next(line for line in made.stdout.splitlines() if line.split()[:1] == ["ms"])
    assert header.split() == ["ms", "mean", "median", "std", "p90", "p99"]


def test_a_gateways_unlisted_model_is_asked_for(start: Start, bench_serve: BenchServe) -> None:
    fake = start(models=("a", "b"))
    code, doc, made = bench_serve(fake, "--model", "hidden")
    assert (code, doc["model_id"], {seen.body["model"] for seen in fake.seen}) == (0, "hidden", {"hidden"})
    assert f"warning: {fake.url}/v1/models does not list 'hidden': it has a, b; asked all the same" in made.stderr
    fake = start(models=("a", "b"), first_script=[Reply("http_404")])
    code, _, made = bench_serve(fake, "--model", "typo")
    assert (code, fake.seen) == (2, [])
    assert f"error: {fake.url}: no model 'typo': it has a, b (fix: --model a)" in made.stderr


def test_short_outputs_and_counted_chunks_are_reported(start: Start, bench_serve: BenchServe) -> None:
    _, doc, _ = bench_serve(start(Reply(usage=False, tokens=3)))
    assert (doc["short_outputs"], doc["output_token_source"], doc["total_output_tokens"]) == (6, "chunks", 18)


def test_detailed_lists_and_vllms_metadata(start: Start, bench_serve: BenchServe) -> None:
    _, doc, _ = bench_serve(start(Reply(), Reply("http_500")), "--save-detailed", "--metadata", "gpu=none", "run=7")
    assert list(doc)[6:10] == ["num_prompts", "gpu", "run", "request_rate"]
    for key in ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors", "generated_texts"):
        assert len(doc[key]) == 6, key
    assert sum(bool(e) for e in doc["errors"]) == 3
    assert doc["generated_texts"][doc["errors"].index("")] == " word" * 5


def test_repeats_pool_and_give_intervals(start: Start, bench_serve: BenchServe) -> None:
    fake = start(Reply(first_delay=0.005))
    _, doc, _ = bench_serve(fake, "--repeats", "3")
    assert (doc["num_prompts"], doc["completed"], len(doc["repeats"])) == (6, 18, 3)
    assert doc["duration"] == pytest.approx(sum(r["duration"] for r in doc["repeats"]))
    assert len({s.body["prompt"] for s in fake.seen}) == 18, "a repeat would hit the prefix cache of the one before"
    interval = doc["confidence"]["median_ttft_ms"]
    assert interval["count"] == 3
    values = [r["median_ttft_ms"] for r in doc["repeats"]]
    assert interval["mean"] == pytest.approx(sum(values) / 3)
    assert interval["low"] <= interval["mean"] <= interval["high"]
    assert "completed" not in doc["confidence"]


def test_baseline_made_compared_and_replaced(start: Start, bench_serve: BenchServe, tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    compare = ("--baseline", str(path), "--max-regression", "50%")
    fast, slow = start(Reply()), start(Reply(first_delay=0.12))
    assert bench_serve(fast, *compare)[0] == 2, "no baseline yet"
    code, doc, _ = bench_serve(fast, *compare, "--update-baseline", "--save-detailed")
    assert code == 0
    assert doc["num_repeats"] == 3
    stored = json.loads(path.read_text())
    assert "itls" not in stored
    assert stored["output_throughput"] == doc["output_throughput"]

    # A past that no machine, however busy, keeps up with: the same server then regresses.
    stored = _hundred_times_as_fast(stored)
    path.write_text(json.dumps(stored))
    code, doc, result = bench_serve(slow, *compare)
    assert code == 5, result.stderr
    assert doc["baseline"]["delta"]["output_throughput"]["regressed"]
    assert [g["kind"] for g in doc["gates"]].count("regression") == 4
    assert json.loads(path.read_text()) == stored, "a failed run must not touch the baseline"
    assert bench_serve(slow, *compare, "--slo", "p99_ttft_ms<=0.1")[0] == 4, "an objective missed comes first"
    assert bench_serve(start(Reply("cut")), *compare, "--update-baseline")[0] == 3
    assert json.loads(path.read_text()) == stored

    code, _, result = bench_serve(fast, *compare, "--max-concurrency", "2")
    assert code == 2
    assert "max_concurrency 3 there, 2 here" in result.stderr
    assert bench_serve(slow, *compare, "--update-baseline")[0] == 0
    assert json.loads(path.read_text())["median_ttft_ms"] >= 120


def _hundred_times_as_fast(result: dict[str, Any]) -> dict[str, Any]:
    """A result of one run with its throughputs times 100 and its milliseconds over 100."""
    factors = {"throughput": 100, "ms": 0.01}
    kinds = {key: key.rpartition("_")[2] for key, value in result.items() if isinstance(value, int | float)}
    faster = {key: result[key] * factors[kind] for key, kind in kinds.items() if kind in factors}
    return {**result, **faster, "repeats": []}


def test_files(start: Start, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = start(Reply(), Reply("error_event"))
    base = ("serve", "--base-url", fake.url, "--num-prompts", "4", "--input-len", "4", "--output-len", "3")
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    out = tmp_path / "new" / "folder"
    result = bench(
        *(*base, "--repeats", "2", "--slo", "p99_ttft_ms<=0.0001", "--label", "a|b", "--num-warmups", "0"),
        *("--junit", str(out / "j.xml"), "--markdown", str(out / "m.md"), "--csv", str(out / "c.csv")),
        *("--github-action-benchmark", str(out / "gab"), "--save-result", "--result-dir", str(out)),
        *("--result-filename", "r.json"),
    )
    assert result.exit_code == 3
    assert "TTFT" in result.stdout
    names = ["c.csv", "gab-bigger-is-better.json", "gab-smaller-is-better.json", "j.xml", "m.md", "r.json"]
    assert sorted(p.name for p in out.iterdir()) == names, "nothing half written is left"

    doc = json.loads((out / "r.json").read_text())
    suite = ET.parse(out / "j.xml").getroot()[0]
    cases = suite.findall("testcase")
    assert [c.get("name") for c in cases] == [f"{g['metric']} {g['op']} {g['limit']:g}" for g in doc["gates"]]
    assert [c.find("failure") is None for c in cases] == [g["passed"] for g in doc["gates"]]
    assert suite.get("failures") == "2"
    assert "engine died" in "".join(suite.itertext())

    markdown = (out / "m.md").read_text()
    assert "FAILED" in markdown
    assert "engine died" in markdown
    assert summary.read_text().startswith("before\n")
    assert markdown in summary.read_text()

    rows = list(csv.DictReader((out / "c.csv").open()))
    assert [r["repeat"] for r in rows] == ["1", "2", "all"]
    assert float(rows[2]["output_throughput"]) == doc["output_throughput"]
    assert rows[0]["label"] == "a|b"

    bigger = json.loads((out / names[1]).read_text())
    smaller = json.loads((out / names[2]).read_text())
    assert "output_throughput" in {r["name"] for r in bigger}
    assert {r["unit"] for r in smaller} == {"ms"}
    assert {"name", "unit", "value"} <= set(smaller[0])


def test_default_file_name_is_vllms(
    start: Start, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake = start()
    args = ("serve", "--base-url", fake.url, "--num-prompts", "2", "--output-len", "2", "--input-len", "3")
    result = bench(*args, "--save-result", "--max-concurrency", "2")
    assert result.exit_code == 0
    (path,) = tmp_path.iterdir()
    date = json.loads(path.read_text())["date"]
    assert path.name == f"openai-infqps-concurrency2-model-{date}.json"
    assert f"wrote {path.name}" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.txt", None, "No such file"),
        ("empty.txt", "", "no prompts in it"),
        ("bad.jsonl", "{", "not JSON"),
        ("chat.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}', "add --endpoint /v1/chat/completions"),
    ],
)
def test_a_data_set_is_checked_before_the_server_is_waited_for(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, said: str
) -> None:
    monkeypatch.setattr("llmctl.bench.serve.await_server", lambda *_: pytest.fail("asked the server"))
    if content is not None:
        (tmp_path / name).write_text(content)
    result = bench("serve", "--dataset-name", "file", "--dataset-path", str(tmp_path / name), "--ready-timeout", "60")
    assert result.exit_code == 2
    assert said in result.stderr


def test_file_dataset(start: Start, bench_serve: BenchServe, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one two"}\n{"prompt": "three", "output_len": 2}\n')
    fake = start()
    code, doc, _ = bench_serve(fake, "--dataset-name", "file", "--dataset-path", str(path))
    assert code == 0
    assert sorted(s.body["prompt"] for s in fake.seen) == ["one two"] * 3 + ["three"] * 3
    assert doc["total_output_tokens"] == 3 * 5 + 3 * 2
    assert all("ignore_eos" not in s.body for s in fake.seen)


def test_open_loop(start: Start, bench_serve: BenchServe) -> None:
    code, doc, _ = bench_serve(start(), "--request-rate", "60", "--burstiness", "0.5")
    assert code == 0
    assert doc["request_rate"] == 60.0
    assert doc["duration"] >= 6 / 60


def test_as_a_process(start: Start, tmp_path: Path) -> None:
    """stdout of the real command is one JSON document, stderr has no traceback, the exit code is the verdict's."""
    fake = start(Reply(), Reply("cut"))
    environment = {**os.environ, "GITHUB_STEP_SUMMARY": str(tmp_path / "s.md")}
    command = [sys.executable, "-m", "llmctl", "bench", "serve", "--base-url", fake.url, "--json"]
    done = subprocess.run(
        [*command, "--num-prompts", "4", "--output-len", "4", "--input-len", "4"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == 3
    assert json.loads(done.stdout)["exit_code"] == 3
    assert "Traceback" not in done.stderr
    environment_seen = json.loads(done.stdout)["environment"]
    assert environment_seen["cpu_model"]
    assert 0 <= environment_seen["cpu_busy_before"] <= 1
    assert (tmp_path / "s.md").read_text().startswith("### ")


def test_ctrl_c_keeps_what_was_measured(start: Start, tmp_path: Path) -> None:
    fake = start(Reply(first_delay=0.05))
    command = [sys.executable, "-m", "llmctl", "bench", "serve", "--base-url", fake.url, "--json"]
    options = ["--num-prompts", "5000", "--max-concurrency", "4", "--output-len", "4", "--input-len", "4"]
    files = ["--junit", str(tmp_path / "j.xml"), "--baseline", str(tmp_path / "b.json"), "--update-baseline"]
    process = subprocess.Popen(
        [*command, *options, *files, "--repeats", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while len(fake.seen) < 20 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    doc = json.loads(out)
    assert (doc["interrupted"], doc["exit_code"], doc["num_repeats"], doc["failed"]) == (True, 130, 1, 0)
    assert 10 < doc["completed"] < 5000
    assert doc["repeats"][0]["interrupted"]
    assert doc["confidence"] == {}
    assert [path.name for path in tmp_path.iterdir()] == ["j.xml"], "a run that was cut short is no baseline"
    assert "Traceback" not in err
    assert "interrupted: what was measured until then is in the result" in err


def test_a_first_run_may_have_no_baseline(start: Start, bench_serve: BenchServe, tmp_path: Path) -> None:
    path = str(tmp_path / "base.json")
    code, _, result = bench_serve(start(), "--baseline", path)
    assert code == 2
    assert f"make it with --baseline {path} --update-baseline, or let a first run pass" in result.stderr
    options = ("--baseline", path, "--allow-missing-baseline", "--repeats", "1", "--markdown", str(tmp_path / "m.md"))
    code, doc, _ = bench_serve(start(), *options)
    assert (code, doc["baseline"]) == (0, None)
    assert doc["notes"] == [
        f"no baseline yet: nothing was compared with {path}; the same run with --update-baseline makes it"
    ]
    assert f"- note: no baseline yet: nothing was compared with {path}" in (tmp_path / "m.md").read_text()
    assert bench_serve(start(), *options, "--update-baseline")[0] == 0
    code, doc, _ = bench_serve(start(), *options, "--max-regression", "10000%")
    assert (code, doc["notes"], doc["baseline"]["path"]) == (0, [], path)


def test_annotations_in_a_job_of_github(start: Start, bench_serve: BenchServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    code, _, result = bench_serve(start(Reply(), Reply("cut")))
    assert code == 3
    found = [line for line in result.stderr.splitlines() if line.startswith("::")]
    assert found == ["::error title=llmctl bench serve::3 of 6 requests failed (50.0%25; allowed 0.0%25)"]


def test_a_full_disk_does_not_lose_the_result(
    start: Start, bench_serve: BenchServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    code, doc, result = bench_serve(start(), "--junit", str(tmp_path / "j.xml"))
    assert code == 1
    assert doc["completed"] == 6
    assert f"error: cannot write {tmp_path / 'j.xml'}: No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []
