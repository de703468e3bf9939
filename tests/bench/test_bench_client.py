"""The load generator against real HTTP: its timestamps are the server's, and every failure is one."""

from __future__ import annotations

import asyncio
import gc
import re
import statistics
from collections.abc import Callable

import pytest
from fake_openai_server import FakeServer, Reply
from hypothesis import given
from hypothesis import strategies as st

from llmctl.bench.client import LoadRun, Target, quiet_collector, run_load
from llmctl.bench.sse import Choice, Delta, SseLines, decode_event, token_text
from llmctl.bench.workloads import WorkItem

Start = Callable[..., FakeServer]


def load(
    fake: FakeServer,
    count: int = 4,
    *,
    tokens: int = 5,
    concurrency: int | None = None,
    chat: bool = False,
    keep_alive: bool = False,
    timeout: float = 20.0,
    arrivals: list[float] | None = None,
    count_chunks: bool = False,
    max_seconds: float | None = None,
) -> LoadRun:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    target = Target(
        fake.url + path, "m", chat, keep_alive=keep_alive, timeout=timeout, keep_text=True, count_chunks=count_chunks
    )
    items = [WorkItem(f"prompt {i}", 2, tokens) for i in range(count)]
    return asyncio.run(run_load(target, items, arrivals or [0.0] * count, concurrency, max_seconds=max_seconds))


def test_what_exists_is_not_collected_while_a_load_runs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmctl.bench.client.quiet_collector", quiet_collector)  # not the tests' own
    frozen: list[int] = []
    target, item = Target(start().url + "/v1/completions", "m", False), WorkItem("p", 1, 2)
    gc.unfreeze()
    try:
        asyncio.run(run_load(target, [item], [0.0], None, lambda _: frozen.append(gc.get_freeze_count())))
        assert frozen[0] > 1_000
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()  # as all tests find it, see tests/conftest.py


@pytest.mark.parametrize("arrivals", [[0.0] * 5, [0.0, 0.01, 0.02, 30.0, 60.0]])
def test_a_load_whose_time_is_up_sends_no_more(start: Start, arrivals: list[float]) -> None:
    run = load(start(Reply(first_delay=0.3)), 5, concurrency=2, arrivals=arrivals, max_seconds=0.2)
    assert [record.index for record in run.records] == [0, 1]
    assert all(record.ok for record in run.records), "what is under way is seen to its end"
    assert run.not_sent == 3
    assert run.duration >= 0.3


@pytest.mark.parametrize("chat", [False, True])
def test_timestamps_agree_with_the_servers(start: Start, chat: bool) -> None:
    """Client and server read the same monotonic clock, so every interval can be bracketed."""
    fake = start(Reply(first_delay=0.03, gap=0.01))
    run = load(fake, 8, tokens=6, concurrency=4, chat=chat)
    seen = {s.body["messages"][0]["content"] if chat else s.body["prompt"]: s for s in fake.seen}
    lags = []
    for i, record in enumerate(run.records):
        theirs = seen[f"prompt {i}"]
        assert record.error is None
        assert record.start <= theirs.arrived
        assert len(record.chunk_times) == len(theirs.sent) == 6
        assert all(sent <= got for sent, got in zip(theirs.sent, record.chunk_times, strict=True))
        assert record.ttft >= theirs.sent[0] - theirs.arrived
        assert record.end >= record.chunk_times[-1]
        lags += [got - sent for sent, got in zip(theirs.sent, record.chunk_times, strict=True)]
        assert record.text == " word" * 6
        assert (record.prompt_tokens, record.completion_tokens, record.finish_reason) == (2, 6, "length")
    assert statistics.median(lags) < 0.05
    assert run.duration >= max(s.sent[-1] for s in fake.seen) - min(s.arrived for s in fake.seen)
    assert run.cpu_seconds > 0


def test_chunks_of_several_tokens_are_gaps_by_what_is_known_of_them(start: Start) -> None:
    fake = start(Reply(tokens_per_chunk=4))
    (record,) = load(fake, 1, tokens=10).records
    assert len(record.chunk_times) == 3
    assert record.output_tokens == 10
    assert (record.itl_token_source, len(record.itls)) == ("unknown", 2)
    (record,) = load(fake, 1, tokens=10, count_chunks=True).records
    assert record.chunk_counts == [4, 8, 10]
    assert (record.itl_token_source, record.chunk_tokens, len(record.itls)) == ("usage", [4, 4, 2], 6)
    assert sum(record.itls) == pytest.approx(record.chunk_times[-1] - record.chunk_times[0])
    (record,) = load(start(Reply()), 1, tokens=10).records
    assert (record.itl_token_source, len(record.itls)) == ("single", 9)


def test_ctrl_c_keeps_what_has_ended(start: Start) -> None:
    """As asyncio.run does at a Ctrl-C: the task is cancelled; it returns what it has."""
    fake = start(Reply(), Reply(), Reply("hang"))
    target = Target(fake.url + "/v1/completions", "m", chat=False)
    ended: list[int] = []
    sent: list[int] = []

    async def run() -> LoadRun:
        items = [WorkItem(f"prompt {i}", 2, 3) for i in range(6)]
        loading = run_load(
            target, items, [0.0] * 6, 1, lambda record: ended.append(record.index), on_sent=lambda: sent.append(1)
        )
        task = asyncio.ensure_future(loading)
        while len(ended) < 2 or len(fake.seen) < 3:
            await asyncio.sleep(0.005)
        task.cancel()
        return await task

    found = asyncio.run(run())
    assert found.interrupted
    assert [record.index for record in found.records] == ended
    assert len(sent) == len(ended) + 1, "one is under way"
    assert all(record.error is None and record.output_tokens == 3 for record in found.records)


def test_without_usage_chunks_are_counted(start: Start) -> None:
    (record,) = load(start(Reply(usage=False, tokens_per_chunk=2)), 1, tokens=10).records
    assert record.completion_tokens is None
    assert record.output_tokens == 5


@pytest.mark.parametrize(
    ("kind", "error_kind", "said"),
    [
        ("http_500", "http_500", "HTTP 500: .*out of cheese"),
        ("cut", "cut", "Payload"),
        ("stop_early", "cut", "without finish_reason"),
        ("malformed", "malformed", "malformed chunk"),
        ("error_event", "server_error", "engine died"),
        ("empty", "empty", "no token came"),
        ("not_sse", "malformed", "expected text/event-stream, found application/json"),
        ("abort", "aborted", "finish_reason 'abort'"),
    ],
)
def test_every_failure_is_one(start: Start, kind: str, error_kind: str, said: str) -> None:
    run = load(start(Reply(kind), Reply()), 2, concurrency=1)
    failed, fine = run.records
    assert failed.error is not None
    assert failed.error_kind == error_kind
    assert re.search(said, failed.error)
    assert failed.end >= failed.start
    assert fine.error is None


def test_a_slow_request_times_out(start: Start) -> None:
    (record,) = load(start(Reply("hang")), 1, timeout=0.3).records
    assert record.error_kind == "timeout"
    assert "0.3 s" in str(record.error)


def test_nobody_listens() -> None:
    (record,) = load(FakeServer(url="http://127.0.0.1:9"), 1).records
    assert record.error_kind == "connect"


def test_a_stream_may_end_without_done_after_its_finish_reason(start: Start) -> None:
    (record,) = load(start(Reply(done=False)), 1).records
    assert record.error is None


@pytest.mark.parametrize("limit", [1, 3, None])
def test_concurrency_is_kept(start: Start, limit: int | None) -> None:
    fake = start(Reply(first_delay=0.01, gap=0.002))
    run = load(fake, 9, concurrency=limit)
    spans = [(r.start, r.end) for r in run.records]
    most = max(sum(a <= moment < b for a, b in spans) for moment, _ in spans)
    assert most == (limit or 9)
    assert [r.start for r in run.records] == sorted(r.start for r in run.records), "first come, first served"


def test_arrival_times_are_kept(start: Start) -> None:
    arrivals = [0.0, 0.05, 0.1, 0.3]
    run = load(start(), 4, arrivals=arrivals)
    origin = run.records[0].scheduled
    for record, arrival in zip(run.records, arrivals, strict=True):
        assert record.scheduled == pytest.approx(origin + arrival)
        assert record.start >= record.scheduled
    assert run.max_send_lag < 0.2


@pytest.mark.parametrize("keep_alive", [False, True])
def test_connections(start: Start, keep_alive: bool) -> None:
    fake = start()
    load(fake, 5, concurrency=1, keep_alive=keep_alive)
    assert len({s.client_port for s in fake.seen}) == (1 if keep_alive else 5)


@given(
    st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), max_size=8),
    st.lists(st.integers(1, 9), min_size=1),
    st.sampled_from([b"\n\n", b"\r\n\r\n", b"\n"]),
)
def test_events_survive_any_cutting(payloads: list[bytes], cuts: list[int], end: bytes) -> None:
    stream = b"".join(b"data: " + p + end for p in payloads) + b": comment\nevent: x\n"
    lines, found, at = SseLines(), [], 0
    for i in range(len(stream)):
        size = cuts[i % len(cuts)]
        found += lines.feed(stream[at : at + size])
        at += size
    found += lines.flush()
    assert found == [p.strip() for p in payloads]


def test_a_last_line_without_newline_is_read() -> None:
    lines = SseLines()
    assert lines.feed(b"data: [DO") == []
    assert lines.feed(b"NE]") == []
    assert lines.flush() == [b"[DONE]"]


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (Choice(text="a"), "a"),
        (Choice(text=""), ""),
        (Choice(text="", finish_reason="stop"), None),
        (Choice(text=None), None),
        (Choice(text="end", finish_reason="stop"), "end"),
        (Choice(delta=Delta(content="")), None),
        (Choice(delta=Delta(content="x")), "x"),
        (Choice(delta=Delta(reasoning_content="r")), "r"),
        (Choice(delta=Delta()), None),
        (decode_event(b'{"choices":[{"delta":{"tool_calls":[{"id":"1"}]}}]}').choices[0], ""),  # type: ignore[index]
        (decode_event(b'{"choices":[{"delta":{"role":"assistant","tool_calls":null}}]}').choices[0], None),  # type: ignore[index]
    ],
)
def test_what_bears_a_token(choice: Choice, text: str | None) -> None:
    assert token_text(choice) == text
