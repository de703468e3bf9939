"""Options that ``llmctl bench serve`` cannot honour, and loads that send nothing: one line, and no load is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result
from fake_openai_server import FakeServer

from llmctl.bench import serve, sweep_measure
from llmctl.bench.client import LoadRun
from llmctl.bench.config import BenchThroughputConfig
from llmctl.bench.offline import run_throughput
from llmctl.bench.progress import Progress
from llmctl.errors import UsageError

Start = Callable[..., FakeServer]
Bench = Callable[..., Result]
BenchServe = Callable[..., tuple[int, dict[str, Any], Result]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--slo", "p99_tfft_ms<=5"), "did you mean 'p99_ttft_ms'?"),
        (("--slo", "request_goodput>=5"), "needs --goodput"),
        (("--goodput", "itl:5"), "unknown metric"),
        (("--goodput", "ttft:5", "stray"), "unexpected argument 'stray'"),
        (("--min-goodput", "95%"), "needs --goodput"),
        (("--num-prompts", "0"), "--num-prompts: expected at least 1"),
        (("--max-concurrency", "0"), "--max-concurrency: expected at least 1"),
        (("--seed", "-1"), "--seed: expected at least 0"),
        (("--api-key", "abc\r"), "--api-key: expected printable characters"),
        (("--request-rate", "0.5", "--load-seconds", "1"), "at --request-rate 0.5 the first request arrives after "),
        (("--load-seconds", "0"), "--load-seconds: expected seconds above 0"),
        (("--num-prefixes", "2"), "--num-prefixes: needs --prefix-len"),
        (("--prefix-len", "-1"), "--prefix-len: expected at least 0"),
        (("--repeats", "0"), "--repeats: expected at least 1"),
        (("--request-rate", "0"), "--request-rate: expected a positive"),
        (("--burstiness", "-1"), "--burstiness: expected a positive"),
        (("--input-len", "9-4"), "--input-len '9-4'"),
        (("--dataset-name", "radnom"), "did you mean 'random'"),
        (("--dataset-name", "file"), "needs --dataset-path"),
        (("--dataset-path", "x.txt"), "takes no --dataset-path"),
        (("--dataset-name", "file", "--dataset-path", "nowhere.txt"), "No such file"),
        (("--percentile-metrics", "ttft,tptot"), "did you mean 'tpot'"),
        (("--metric-percentiles", "50,200"), "numbers from 0 to 100"),
        (("--metadata", "completed=7"), "results have already"),
        (("--metadata", "x"), "KEY=VALUE"),
        (("--extra-body", "[1]"), "JSON object"),
        (("--header", "x"), "KEY=VALUE"),
        (("--backend", "openapi"), "expected one of"),
        (("--base-url", "localhost:8000"), "expected http://"),
        (("--base-url", "http://"), "expected http://"),
        (("--base-url", "http://127.0.0.1:99999"), "expected http://"),
        (("--header", "a=b\nc"), "KEY=VALUE"),
        (("--temperature", "nan"), "--temperature: expected a number"),
        (("--ready-timeout", "inf"), "--ready-timeout: expected seconds"),
        (("--junit", "."), "--junit .: expected a file, found a folder"),
        (("--csv", f"{__file__}/x.csv"), "test_cli_bench_usage.py is not a folder"),
        (("--save-result", "--result-dir", __file__), "test_cli_bench_usage.py is not a folder"),
        (("--baseline", "nowhere.json"), "--update-baseline"),
        (("--update-baseline",), "needs --baseline"),
        (("--allow-missing-baseline",), "needs --baseline"),
        (("--max-regression", "much"), "expected a share"),
        (("--confidence", "95"), "expected a share in (0, 1)"),
        (("--regression-metrics", "ttft"), "unknown metric 'ttft'"),
        (("--tokenizer", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_usage_errors_are_one_line(start: Start, bench_serve: BenchServe, options: tuple[str, ...], said: str) -> None:
    fake = start()
    code, _, result = bench_serve(fake, *options)
    assert code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert not fake.seen, "load was sent before the options were checked"


def test_a_negative_seed_offline() -> None:
    with pytest.raises(UsageError, match="--seed: expected at least 0, found -1"):
        run_throughput(BenchThroughputConfig(model="m", seed=-1), Progress())


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_load_that_sent_nothing_is_no_ctrl_c(
    start: Start, bench_serve: BenchServe, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """The time can be up before the first request is sent."""
    nothing = serve.RepeatRun(LoadRun([], 0.0, 0.0, 0.0, 6, interrupted), "20260101-000000", None)
    monkeypatch.setattr(serve, "_run_once", lambda *_: nothing)
    code, doc, result = bench_serve(start(), "--load-seconds", "5")
    assert (code, doc) == (130 if interrupted else 1, {})
    assert ("no request was sent within the 5 s of a load" in result.stderr) != interrupted


def test_a_load_that_sent_nothing_is_no_point_of_a_sweep(
    start: Start, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = serve.RepeatRun(LoadRun([], 0.0, 0.0, 0.0, 6), "20260101-000000", None)
    monkeypatch.setattr(sweep_measure, "run_once", lambda *_: nothing)
    loads = ("--max-concurrency", "2", "--num-prompts", "6", "--num-warmups", "0")
    for limit, said in (
        ("--load-seconds", "no request was sent within the 5 s of a load"),
        ("--max-duration", "--max-duration 5: over before a request was sent"),
    ):
        result = bench("sweep", "--base-url", start().url, *loads, limit, "5")
        assert result.exit_code == 1
        assert said in result.stderr
