"""Deadlines and priority classes on a real server: refused when late, made room for, and counted as a client does."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.test_serve_lifecycle import Stream, wait_running
from fixtures import ServerProcess

from llmctl.bench.metrics import RequestRecord, meets_goodput
from llmctl.serving.goodput import OUTCOMES

SHORT = {"prompt": "x é", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def busy(tiny_engine: Path) -> Iterator[ServerProcess]:
    """One seat."""
    with ServerProcess(
        *("--model", str(tiny_engine), "--max-num-seqs", "1", "--shed", "--deadline", "ttft:60000")
    ) as process:
        process.wait_ready(90)
        yield process


def counted(server: ServerProcess, series: str, label: str) -> dict[str, float]:
    """A counter by the values of a label."""
    _, text = server.get("/metrics")
    lines = [line for line in text.splitlines() if line.startswith(series + "{")]
    return {line.split(f'{label}="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def text_of(stream: Stream) -> str:
    events = [json.loads(e.removeprefix("data: ")) for e in stream.end() if e.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events)


def test_an_overloaded_server_refuses_by_deadline_and_a_more_important_request_is_served(busy: ServerProcess) -> None:
    first = Stream(busy, priority=1)
    wait_running(busy, 1)
    running = Stream(busy, priority=1)
    wait_running(busy, 1, 1)
    # Nothing has finished yet, so that the wait for a seat is not foreseen: it is refused when its time is over.
    late = Stream(busy, deadline="ttft:50", priority=1)
    late.end()
    error = json.loads(late.text)["error"]
    assert (late.status, error["code"], error["type"]) == (429, "deadline_missed", "rate_limit_error")
    undisturbed = text_of(first)
    assert first.status == 200

    wait_running(busy, 1)  # one has finished since there was work, and the next one has the seat
    request = urllib.request.Request(
        busy.url + "/v1/completions",
        json.dumps({**SHORT, "deadline": "ttft:20", "priority": 1}).encode(),
        {"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    error = json.loads(refused.value.read())["error"]
    assert (refused.value.code, error["code"], error["param"]) == (429, "deadline_unreachable", "deadline")
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60

    status, body = busy.post("/v1/completions", {**SHORT, "priority": 0})
    assert (status, body["usage"]["completion_tokens"]) == (200, 4)
    assert running.thread.is_alive(), "it was to be passed"
    assert text_of(running) == undisturbed
    assert busy.metric("llmctl:num_preemptions_total") == 1
    assert counted(busy, "llmctl:request_deadlines_total", "outcome") == {
        "met": 3, "ttft_missed": 0, "itl_missed": 0, "shed": 2
    }  # fmt: skip
    reasons = counted(busy, "llmctl:admission_rejections_total", "reason")
    assert (reasons["deadline_missed"], reasons["deadline_unreachable"]) == (1, 1)


def measured(server: ServerProcess, deadline: str) -> RequestRecord:
    """A stream as its client sees it."""
    body = json.dumps({**SHORT, "max_tokens": 20, "stream": True, "deadline": deadline, "ignore_eos": True}).encode()
    request = urllib.request.Request(server.url + "/v1/completions", body, {"Content-Type": "application/json"})
    record = RequestRecord(0, 1, 20, start=time.perf_counter(), completion_tokens=20)
    with urllib.request.urlopen(request, timeout=30) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                record.chunk_times.append(time.perf_counter())
    return record


def test_goodput_is_what_a_client_measures(server: ServerProcess) -> None:
    """Each limit is one that nobody keeps or nobody misses, so that the way between the two does not matter."""
    series = "llmctl:request_deadlines_total"
    before = counted(server, series, "outcome")
    expected = dict.fromkeys(OUTCOMES, 0)
    loose, tight = 1e6, 1e-3
    for ttft, itl in ((loose, loose), (loose, tight), (tight, loose), (tight, tight), (loose, loose)):
        limits = {"ttft": ttft, "tpot": itl}
        record = measured(server, f"ttft:{ttft},itl:{itl}")
        in_time = meets_goodput(record, {"ttft": limits["ttft"]})
        good = meets_goodput(record, limits)
        expected["met" if good else "itl_missed" if in_time else "ttft_missed"] += 1
    after = counted(server, series, "outcome")
    assert {name: after[name] - before[name] for name in OUTCOMES} == expected
    assert expected == {"met": 2, "itl_missed": 1, "ttft_missed": 2, "shed": 0}


@pytest.mark.parametrize(
    ("path", "prompt"),
    [("completions", {"prompt": "a"}), ("chat/completions", {"messages": [{"role": "user", "content": "a"}]})],
)
@pytest.mark.parametrize("deadline", ["soon", "ttft:0", "ttft:300,tpot:5", "", 300])
def test_a_malformed_deadline_is_400(
    server: ServerProcess, path: str, prompt: dict[str, Any], deadline: object
) -> None:
    status, body = server.post(f"/v1/{path}", {**prompt, "deadline": deadline, "max_tokens": 1})
    assert (status, body["error"]["param"], body["error"]["type"]) == (400, "deadline", "invalid_request_error")
    assert body["error"]["message"].startswith("deadline: ")
