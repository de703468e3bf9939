"""A server is measured once it says that it is ready and has answered a request; the wait is bounded, and told."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from fake_openai_server import FakeServer, Reply

from llmctl.bench import readiness
from llmctl.bench.client import Target
from llmctl.bench.endpoint import Endpoint, make_endpoint
from llmctl.bench.readiness import Patience, await_answer, await_server
from llmctl.errors import LlmctlError

Start = Callable[..., FakeServer]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_POLL_SECONDS", 0.005)


def endpoint(fake: FakeServer) -> Endpoint:
    return make_endpoint(fake.url, None, None, None, (), True)


def target(fake: FakeServer) -> Target:
    return Target(fake.url + "/v1/completions", "m", chat=False)


@pytest.mark.parametrize(
    "paths",
    [
        {"/ready": [503, 503, 200]},
        {"/health": [503, 503, 200]},
        {"/v1/models": [503, 503, 404]},
        {"/ready": [401], "/health": [500, 502, 200]},
    ],
)
def test_the_first_path_that_a_server_has_is_waited_for(start: Start, paths: dict[str, list[int]]) -> None:
    told: list[str] = []
    fake = start(readiness=paths)
    facts = await_server(endpoint(fake), Patience("it", 30, told.append))
    assert facts.ready_wait >= 2 * 0.005
    assert facts.version == "fake-1"
    assert re.match(r"waiting for it, \d+ s more \(--ready-timeout\): /", told[0])
    assert all(len(codes) == 1 for codes in paths.values()), "it went on before the last code"


def test_what_is_not_ready_in_time_is_an_error_with_the_servers_reason(start: Start) -> None:
    fake = start(readiness={"/ready": [503]})
    with pytest.raises(LlmctlError, match=r"it: not ready after \d s: /ready says HTTP 503: loading"):
        await_server(endpoint(fake), Patience("it", 0.02, lambda _: None))
    with pytest.raises(LlmctlError, match=r"^it: /ready says HTTP 503: loading"):
        await_server(endpoint(fake), Patience("it", 0, lambda _: None))


def test_a_request_is_sent_again_until_it_is_answered(start: Start) -> None:
    told: list[str] = []
    fake = start(first_script=[Reply("http_503"), Reply("http_503"), Reply(), Reply("http_500")])
    await_answer(target(fake), Patience("it", 30, told.append), told.append)
    assert [seen.body["max_tokens"] for seen in fake.first_seen] == [1, 1, 1]
    assert re.match(r"waiting for it, \d+ s more \(--ready-timeout\): the first request: HTTP 503: .*cheese", told[0])


def test_what_waiting_cannot_mend_is_told_and_left_to_the_load(start: Start) -> None:
    told: list[str] = []
    fake = start(first_script=[Reply("http_500")])
    await_answer(target(fake), Patience("it", 30, told.append), told.append)
    assert len(fake.first_seen) == 1
    assert told == ['warning: the first request failed: HTTP 500: {"error": {"message": "out of cheese"}}']


def test_no_answer_in_time_is_an_error(start: Start) -> None:
    fake = start(first_script=[Reply("http_503")])
    with pytest.raises(LlmctlError, match="the first request: HTTP 503"):
        await_answer(target(fake), Patience("it", 0.02, lambda _: None), lambda _: None)


def test_the_bench_waits_for_both_and_then_counts_by_the_servers_tokenizer(
    start: Start, bench_serve: Callable[..., tuple[int, dict[str, object], object]]
) -> None:
    fake = start(readiness={"/ready": [503, 503, 200]}, first_script=[Reply("http_503"), Reply()])
    code, doc, _ = bench_serve(fake)
    assert code == 0
    assert doc["workload"]["prompt_length_source"] == "server"  # type: ignore[index]
    assert len(fake.seen) == 6, "no request of the load was sent before"
