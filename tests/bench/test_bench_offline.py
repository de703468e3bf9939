"""``bench throughput`` and ``bench latency`` on a tiny model, through the engine and through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from llmctl.bench import offline
from llmctl.bench.config import BenchThroughputConfig
from llmctl.bench.inprocess import BenchedEngine, StepWork, prepare_engine, run_batches, run_items
from llmctl.bench.workloads import WorkItem
from llmctl.engine.llm_engine import LLMEngine

Bench = Callable[..., Result]


@pytest.fixture(scope="module")
def opened(tiny_engine: Path) -> BenchedEngine:
    config = BenchThroughputConfig(model=str(tiny_engine), kv_cache_memory="8MiB", max_num_batched_tokens=64)
    return prepare_engine(config)


def test_every_token_has_a_timestamp_and_every_step_is_counted(opened: BenchedEngine) -> None:
    words = "the quick brown fox jumps over the lazy dog and then sits down to read a book about engines "
    items = [WorkItem(words * (1 + i % 3), 0, 3 + i) for i in range(6)]
    done: list[int] = []
    before = opened.engine.stats()
    run = run_items(opened.engine, opened.tokenizer, items, lambda r: done.append(r.index))
    after = opened.engine.stats()
    assert sorted(done) == list(range(6))
    for record, item in zip(run.records, items, strict=True):
        assert record.error is None
        assert record.output_tokens == len(record.chunk_times) == item.output_tokens
        assert record.input_tokens == len(opened.tokenizer.encode(item.prompt))
        assert record.start < record.chunk_times[0]
        assert record.chunk_times == sorted(record.chunk_times)
        assert record.chunk_times[-1] == record.end
    assert run.duration == max(r.end for r in run.records) - run.records[0].start
    steps = run.steps
    assert steps.prompt_steps + steps.decode_steps == after.num_steps - before.num_steps
    assert steps.prompt_tokens + steps.decode_tokens == after.num_scheduled_tokens - before.num_scheduled_tokens
    assert steps.prompt_steps > 1, "a budget of 64 tokens needs several steps for these prompts"
    assert steps.prompt_seconds + steps.decode_seconds == pytest.approx(run.duration)
    assert not opened.engine.has_unfinished()


def test_step_kinds() -> None:
    steps = StepWork()
    steps.add(computed=100, sampled=0, seconds=2.0)
    steps.add(computed=30, sampled=3, seconds=1.0)
    steps.add(computed=4, sampled=4, seconds=0.5)
    assert steps == StepWork(2, 3.0, 130, 1, 0.5, 4)


def test_static_batches_end_before_the_next_begins(opened: BenchedEngine) -> None:
    items = [WorkItem("one two three four", 0, length) for length in (2, 9, 3, 4, 5)]
    run = run_batches(opened.engine, opened.tokenizer, items, 2)
    assert [r.output_tokens for r in run.records] == [2, 9, 3, 4, 5]
    assert [r.index for r in run.records] == [0, 1, 2, 3, 4]
    ends = [max(r.end for r in run.records[i : i + 2]) for i in (0, 2, 4)]
    begins = [min(r.chunk_times[0] for r in run.records[i : i + 2]) for i in (0, 2, 4)]
    assert begins[1] > ends[0]
    assert begins[2] > ends[1]
    assert {r.start for r in run.records} == {run.records[0].start}, "all wait from the start"
    steps = run.steps
    assert steps.prompt_steps + steps.decode_steps == 9 + 4 + 5


def document(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


def test_throughput(bench: Bench, tiny_engine: Path, tmp_path: Path) -> None:
    args = ("throughput", "--model", str(tiny_engine), "--kv-cache-memory", "8MiB", "--num-prompts", "5")
    load = ("--input-len", "8-24", "--output-len", "4-6", "--repeats", "2", "--json")
    base = ("--baseline", str(tmp_path / "base.json"), "--max-regression", "99%")
    doc = document(bench(*args, *load, *base, "--update-baseline", "--slo", "decode_tokens_per_second>0"))
    assert (doc["completed"], doc["failed"], doc["num_requests"], doc["kind"]) == (10, 0, 10, "throughput")
    assert doc["total_num_tokens"] == doc["total_input_tokens"] + doc["total_output_tokens"]
    assert doc["tokens_per_second"] == pytest.approx(doc["total_num_tokens"] / doc["elapsed_time"])
    assert 4 * 10 <= doc["total_output_tokens"] <= 6 * 10
    assert doc["prefill_tokens_per_second"] > 0
    assert doc["peak_rss_bytes"] > 10 * 2**20
    assert doc["threads"] >= 1
    assert doc["engine"]["target"] == "reference"
    assert [g["metric"] for g in doc["gates"]] == ["completed", "failed_ratio", "decode_tokens_per_second"]
    again = document(bench(*args, *load, *base))
    assert again["total_input_tokens"] == doc["total_input_tokens"]
    assert set(again["baseline"]["delta"]) == {"tokens_per_second", "output_throughput"}
    assert bench(*args, *load[2:], *base).exit_code == 2, "another input length is other work"


def test_continuous_against_static_batching(bench: Bench, tiny_engine: Path) -> None:
    args = ("throughput", "--model", str(tiny_engine), "--kv-cache-memory", "8MiB", "--max-num-seqs", "2")
    load = ("--num-prompts", "6", "--input-len", "4", "--output-len", "2-20", "--repeats", "2")
    result = bench(*args, *load, "--batching", "static", "--json")
    doc = document(result)
    found = doc["batching"]
    assert found["batch_size"] == 2
    assert (doc["completed"], found["static"]["completed"]) == (12, 12)
    assert doc["total_output_tokens"] == found["static"]["total_output_tokens"], "the same lengths"
    row = found["ratios"]["output_throughput"]
    one, other = row["repeats"]
    assert row["ratio"] == pytest.approx((one * other) ** 0.5)
    assert row["low"] * row["high"] == pytest.approx(row["ratio"] ** 2), "the interval is of this ratio"
    assert (row["method"], row["confidence"]) == ("student-t", 0.95)
    assert "continuous / static" in result.stderr
    assert bench(*args, "--num-prompts", "2", "--batching", "static").exit_code == 2
    assert bench(*args, "--batching", "dynamic").exit_code == 2


@pytest.mark.parametrize(
    "options",
    [
        ("throughput", "--num-prompts", "1025", "--num-warmups", "0"),
        ("latency", "--batch-size", "1025", "--max-num-seqs", "1025", "--num-iters", "1", "--num-iters-warmup", "0"),
    ],
)
def test_more_requests_at_once_than_a_server_would_queue(
    bench: Bench, tiny_engine: Path, options: tuple[str, ...]
) -> None:
    result = bench(*options, "--model", str(tiny_engine), "--input-len", "1", "--output-len", "1", "--json")
    assert document(result)["completed"] == 1025


def test_latency(bench: Bench, tiny_engine: Path, tmp_path: Path) -> None:
    args = ("latency", "--model", str(tiny_engine), "--kv-cache-memory", "8MiB", "--batch-size", "2")
    load = ("--input-len", "9", "--output-len", "5", "--num-iters", "4", "--num-iters-warmup", "1", "--json")
    doc = document(bench(*args, *load, "--junit", str(tmp_path / "j.xml")))
    assert doc["avg_latency"] == pytest.approx(sum(doc["latencies"]) / 4)
    assert len(doc["latencies"]) == 4
    assert list(doc["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert min(doc["latencies"]) <= doc["percentiles"]["50"] <= max(doc["latencies"])
    assert doc["percentiles"]["50"] == doc["median_latency"]
    assert (doc["total_input_tokens"], doc["total_output_tokens"]) == (4 * 2 * 9, 4 * 2 * 5)
    assert (tmp_path / "j.xml").read_text().count("<testcase") == 2
    assert bench(*args, *load, "--slo", "avg_latency<=0").exit_code == 4


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("throughput",), "--model: expected"),
        (("throughput", "--model", "/nowhere/at/all"), "/nowhere/at/all"),
        (("throughput", "--model", "ENGINE", "--slo", "avg_latncy<=3"), "did you mean 'avg_latency'"),
        (("throughput", "--model", "ENGINE", "--slo", "request_goodput>=3"), "goodput is a figure of bench serve"),
        (("throughput", "--model", "ENGINE", "--num-prompts", "0"), "--num-prompts: expected at least 1"),
        (("throughput", "--model", "ENGINE", "--input-len", "x"), "--input-len 'x'"),
        (("throughput", "--model", "ENGINE", "--kv-cache-memory", "lots"), "expected a size"),
        (("latency", "--model", "ENGINE", "--batch-size", "65"), "add --max-num-seqs 65"),
        (("latency", "--model", "ENGINE", "--metric-percentiles", "50,x"), "numbers from 0 to 100"),
        (("latency", "--model", "ENGINE", "--num-iters", "0"), "--num-iters: expected at least 1"),
        (
            ("latency", "--model", "ENGINE", "--output-len", "100000"),
            "100128 tokens, prompt and output; the engine takes 512",
        ),
        (
            ("throughput", "--model", "ENGINE", "--input-len", "8-400"),
            "528 tokens, prompt and output; the engine takes 512",
        ),
        (
            ("throughput", "--model", "ENGINE", "--max-model-len", "100"),
            "--max-model-len is 100 (fix: shorter --input-len or --output-len, or more --max-model-len)",
        ),
        (
            (
                "latency",
                "--model",
                "ENGINE",
                "--input-len",
                "300",
                "--no-enable-chunked-prefill",
                "--max-num-batched-tokens",
                "256",
            ),
            "--input-len 300: without chunked prefill a prompt has at most --max-num-batched-tokens, 256",
        ),
    ],
)
def test_usage_errors_before_the_engine_is_loaded(
    bench: Bench, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("llmctl.artifact.start.open_runtime", lambda *_, **__: pytest.fail("loaded"))
    result = bench(*(str(tiny_engine) if a == "ENGINE" else a for a in args))
    assert result.exit_code == 2, result.stderr
    assert said in result.stderr


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_ctrl_c_while_prompts_are_made_keeps_what_had_ended(
    bench: Bench, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Between repeats and iterations no step runs, and what had ended is as good as ever."""
    random_items, made = offline.random_items, [0]

    def interrupted(*args: Any, **more: Any) -> Any:
        made[0] += 1
        if made[0] == 3:
            raise KeyboardInterrupt
        return random_items(*args, **more)

    monkeypatch.setattr(offline, "random_items", interrupted)
    sizes = {"throughput": ("--num-warmups", "0", "--num-prompts", "2"), "latency": ("--num-iters-warmup", "0")}[kind]
    common = ("--model", str(tiny_engine), "--kv-cache-memory", "8MiB", "--input-len", "4", "--output-len", "2")
    result = bench(kind, *common, *sizes, "--repeats", "4" if kind == "throughput" else "1", "--json")
    assert result.exit_code == 130
    doc = json.loads(result.stdout)
    assert (doc["interrupted"], doc["completed"]) == (True, 2)


def test_ctrl_c_while_warming_up_ends_the_run(bench: Bench, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLMEngine, "step", interrupted)
    result = bench("throughput", "--model", str(tiny_engine), "--kv-cache-memory", "8MiB", "--output-len", "2")
    assert (result.exit_code, result.stdout) == (130, "")


@pytest.mark.parametrize("after", [3, 30])
@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_ctrl_c_keeps_what_had_ended(
    bench: Bench, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, after: int
) -> None:
    """Between steps: before anything had ended there is nothing to keep, later what had ended is the result."""
    step, steps = LLMEngine.step, [0]

    def interrupted(self: LLMEngine) -> object:
        steps[0] += 1
        if steps[0] == after:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(LLMEngine, "step", interrupted)
    sizes = {"throughput": ("--num-prompts", "4", "--num-warmups", "0"), "latency": ("--num-iters-warmup", "0")}[kind]
    common = ("--model", str(tiny_engine), "--kv-cache-memory", "8MiB", "--input-len", "8", "--output-len", "5-7")
    result = bench(kind, *common, *sizes, "--repeats", "40", "--json", "--csv", str(tmp_path / "c.csv"))
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
    if after == 3:
        assert (result.stdout, list(tmp_path.iterdir())) == ("", [])
        assert result.stderr.endswith("interrupted\n")
        return
    doc = json.loads(result.stdout)
    assert (doc["interrupted"], doc["exit_code"], doc["failed"]) == (True, 130, 0)
    assert 1 <= doc["completed"] < 40
    assert doc["completed"] == sum(repeat["completed"] for repeat in doc["repeats"])
    assert (tmp_path / "c.csv").exists()
