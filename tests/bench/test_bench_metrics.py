"""What timestamps mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.bench import metrics
from llmctl.bench.metrics import MetricOptions, RequestRecord, itl_token_source, run_metrics


def record(
    index: int = 0,
    *,
    start: float = 10.0,
    chunks: tuple[float, ...] = (10.2, 10.3, 10.5),
    end: float = 10.6,
    tokens: int | None = None,
    error: str | None = None,
) -> RequestRecord:
    return RequestRecord(
        index,
        7,
        3,
        scheduled=start,
        start=start,
        end=end,
        chunk_times=list(chunks),
        completion_tokens=tokens,
        prompt_tokens=None if tokens is None else 8,
        error=error,
        error_kind=error and "cut",
    )


def test_definitions_on_one_request() -> None:
    r = record(tokens=6)
    assert r.ttft == pytest.approx(0.2)
    assert r.itls == pytest.approx([0.1, 0.2])
    assert r.tpot == pytest.approx(0.3 / 5), "TPOT divides by the server's tokens, ITL knows only chunks here"
    assert r.e2el == pytest.approx(0.6)
    assert (r.input_tokens, r.output_tokens) == (8, 6)
    assert (record().input_tokens, record().output_tokens) == (7, 3)
    assert record(chunks=(10.2,)).tpot is None


def test_gaps_of_tokens() -> None:
    r = record(tokens=6)
    assert r.itl_token_source == "unknown"
    r.counted = [1, 0, 5]
    assert r.itl_token_source == "tokenizer"
    assert r.itls == pytest.approx([0.3 / 5] * 5), "a chunk without a token of its own adds its gap to the next one's"
    r.chunk_counts = [2, 3, 6]
    assert r.itl_token_source == "usage"
    assert r.itls == pytest.approx([0.1, 0.2 / 3, 0.2 / 3, 0.2 / 3])
    assert record(tokens=3).itl_token_source == "single"
    assert [itl_token_source(rs) for rs in ([], [r], [r, record(tokens=3)])] == ["none", "usage", "mixed"]


def test_key_names_and_order_are_vllms() -> None:
    figures = run_metrics([record()], 2.0, MetricOptions(("ttft", "e2el"), (50, 99.9), {"ttft": 100}))
    assert list(figures) == [
        *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"),
        *("request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s"),
        *("max_concurrent_requests", "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p50_ttft_ms", "p99.9_ttft_ms"),
        *("mean_e2el_ms", "median_e2el_ms", "std_e2el_ms", "p50_e2el_ms", "p99.9_e2el_ms"),
        *("failed_ratio", "goodput_ratio"),
    ]


def test_failed_requests_are_counted_and_kept_out_of_latencies() -> None:
    slow_failure = record(1, chunks=(99.0,), end=99.0, error="stream ended")
    figures = run_metrics([record(), slow_failure], 2.0, MetricOptions(goodput={"ttft": 250}))
    assert (figures["completed"], figures["failed"], figures["failed_ratio"]) == (1, 1, 0.5)
    assert figures["p99_ttft_ms"] == pytest.approx(200)
    assert figures["total_output_tokens"] == 3
    assert figures["goodput_ratio"] == 0.5
    assert figures["request_goodput"] == 0.5


def test_nothing_completed_gives_none_not_zero() -> None:
    figures = run_metrics([record(error="x")], 1.0, MetricOptions())
    assert figures["completed"] == 0
    assert figures["failed_ratio"] == 1
    assert figures["p99_ttft_ms"] is None
    assert figures["output_throughput"] == 0
    assert run_metrics([], 0.0, MetricOptions())["failed_ratio"] == 1


times = st.lists(st.floats(0.001, 5), min_size=1, max_size=8)


@given(st.lists(st.tuples(st.floats(0, 20), times), min_size=1, max_size=12))
def test_identities(raw: list[tuple[float, list[float]]]) -> None:
    records = []
    for i, (start, gaps) in enumerate(raw):
        chunks, now = [], start
        for gap in gaps:
            now += gap
            chunks.append(now)
        records.append(record(i, start=start, chunks=tuple(chunks), end=now + 0.1))
    figures = run_metrics(records, 30.0, MetricOptions())
    for r in records:
        assert r.ttft + sum(r.itls) == pytest.approx(r.e2el - 0.1)
        if r.tpot is not None:
            assert r.tpot * (r.output_tokens - 1) == pytest.approx(sum(r.itls))
    tokens = sum(len(gaps) for _, gaps in raw)
    assert figures["output_throughput"] == pytest.approx(tokens / 30)
    assert figures["total_output_tokens"] == tokens
    moments = [r.start for r in records]
    most = max(sum(r.start <= m < r.end for r in records) for m in moments)
    assert figures["max_concurrent_requests"] == most
    assert 0 < figures["max_output_tokens_per_s"] <= tokens  # type: ignore[operator]


def test_failure_summary_and_token_source() -> None:
    records = [record(i, error=f"message {i % 4}") for i in range(9)] + [record(9, tokens=3), record(10)]
    (row,) = metrics.failure_summary(records)
    assert row == {"kind": "cut", "count": 9, "messages": ["message 0", "message 1", "message 2"]}
    assert metrics.output_token_source(records) == "mixed"
    assert metrics.output_token_source([record(tokens=3)]) == "usage"
    assert metrics.output_token_source([record()]) == "chunks"
    assert metrics.output_token_source([]) == "none"


def test_detailed_lists_have_one_entry_a_request() -> None:
    lists = metrics.detailed_lists([record(), record(1, error="cut")])
    assert {len(v) for v in lists.values()} == {2}
    assert lists["errors"] == ["", "cut"]
    assert lists["output_lens"] == [3, 0]
