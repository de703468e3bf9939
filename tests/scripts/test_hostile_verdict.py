"""The hostile soak's judgement, on answers and records given by hand: each rule passes what is right, and can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hostile.attacks import ATTACKS
from hostile.honest import CASES, Honest, Told
from hostile.judgement import Spans, Tally, fault_of
from hostile.levels import Levels
from hostile.prober import Probe
from hostile.verdict import LOG_BYTES, Bounds, Found, health, reasons, report, show, slow_health
from hostile.wire import CLOSED, SILENT, Answer
from served import Server

from llmctl.bench.metrics import RequestRecord

BOUNDS = Bounds(growth_mib=16, health_ms=50)


def error(code: str | None = None, **changed: Any) -> bytes:
    """A body in OpenAI's shape."""
    fields = {"message": "no", "type": "invalid_request_error", "param": None, "code": code, **changed}
    return json.dumps({"error": {name: value for name, value in fields.items() if value != "left out"}}).encode()


def answer(status: int, body: bytes = b"", kind: str = "application/json", **fields: Any) -> Answer:
    """Asked for at 100, answered from 101 to 102."""
    return Answer(status, 100.0, 1.0, 2.0, body, body[-1024:], kind, **{"request_id": "r", "whole": True, **fields})


def stream(*events: bytes) -> Answer:
    """Server-sent events."""
    return answer(200, b"".join(b"data: " + event + b"\n\n" for event in events), "text/event-stream; charset=utf-8")


def spans(*times: float) -> Spans:
    """One span."""
    made = Spans()
    if times:
        made.begin(times[0])
        made.end(times[1])
    return made


KILLED = spans(90, 100.5)


@pytest.mark.parametrize(
    ("found", "kills"),
    [
        (answer(400, error()), spans()),
        (answer(200, b'{"choices": []}'), spans()),
        (answer(200, b"# HELP", "text/plain"), spans()),
        (answer(CLOSED, request_id=""), spans()),
        (stream(b'{"choices": []}', b"[DONE]"), spans()),
        (answer(503, error("not_ready")), KILLED),
        (answer(500, error("request_quarantined")), KILLED),
        (stream(b'{"choices": []}', b'{"error":{"code":"engine_dead"}}', b"[DONE]"), KILLED),
        (stream(b'{"choices": []}', b'{"error":{"code":"engine_dead"}}', b"[DONE]"), spans(101.5, 110)),
    ],
)
def test_answers_that_are_allowed(found: Answer, kills: Spans) -> None:
    assert fault_of(found, {200, 400, CLOSED}, kills) is None


@pytest.mark.parametrize(
    ("found", "kills", "said"),
    [
        (answer(413, error()), spans(), "expected closed, 200, 400, found 413"),
        (answer(SILENT), spans(), "found silent"),
        (answer(500, error("internal_error")), spans(), "found 500"),
        (answer(500, error("internal_error")), KILLED, "500 while no worker died"),
        (answer(503, error("not_ready")), spans(102.5, 110), "found 503"),
        (answer(400, error(), request_id=""), spans(), "400 without X-Request-Id"),
        (answer(400, b"no"), spans(), "not in OpenAI's shape"),
        (answer(400, error(param="left out")), spans(), "not in OpenAI's shape"),
        (answer(400, error(), "text/html"), spans(), "not in OpenAI's shape"),
        (answer(400, error(message="a\nb")), spans(), "a message of one line"),
        (answer(400, error(message="")), spans(), "a message of one line"),
        (answer(200, b'{"choices": ['), spans(), "200: not JSON"),
        (answer(200, b"{}", whole=False), spans(), "200: the answer has no end"),
        (stream(b'{"choices": []}'), spans(), "a stream without [DONE]"),
        (stream(b'{"error":{"code":"engine_dead"}}', b"[DONE]"), spans(), "a stream that ended in an error"),
        (stream(b'{"error":{"code":null}}', b"[DONE]"), KILLED, "a stream that ended in an error"),
    ],
)
def test_answers_that_are_not(found: Answer, kills: Spans, said: str) -> None:
    fault = fault_of(found, {200, 400, CLOSED}, kills)
    assert fault is not None
    assert said in fault


def test_spans_meet_what_overlaps_them() -> None:
    made = spans(10, 20)
    assert [made.meet(*times) for times in ((5, 9), (5, 10), (12, 13), (20, 30), (21, 30))] == [
        False,
        *[True] * 3,
        False,
    ]
    made.begin(40)
    assert [made.meet(*times) for times in ((30, 39), (30, 41), (50, 60))] == [False, True, True]


QUIET = Levels(100, 200, 20, 10, 4, 6, running=0, waiting=0, kv_share=0.0)


def found(**changed: Any) -> Found:
    """What a run that passes leaves."""
    played, honest = Tally(spans=[(10.0, 20.0)]), Tally()
    played.count("400", 0.5)
    honest.count("200", 0.1)
    probes = [Probe(at, 0.004 if at < 10 else 0.02, 200, 0.001) for at in range(20)]
    made = Found({"NaN": played}, honest, probes, (0.0, 9.5), QUIET, QUIET, 120.0, [1], [1], [], "INFO fine\n")
    return replace(made, **changed)


def fault(name: str) -> Callable[[Found], None]:
    """Notes one for an attack, or for the honest clients."""
    return lambda made: (made.attacks[name] if name else made.honest).fault("it is so")


CHANGES: list[tuple[dict[str, Any] | Callable[[Found], None], str]] = [
    (fault("NaN"), "NaN: 1 faults, first: it is so"),
    (fault(""), "honest chats: 1 faults, first: it is so"),
    ({"honest": Tally()}, "no honest chat was answered"),
    ({"attacks": {}}, "no attack was played"),
    ({"probes": []}, "/health was not probed"),
    ({"probes": [*found().probes, *[Probe(30, 0.2, 200, 0)] * 5]}, "/health: p99 200.0 ms, allowed 50 (50.0 times"),
    ({"probes": [*found().probes, Probe(30, 0.001, 0, 0)]}, "/health: 1 probes without 200, first: no answer"),
    ({"warm": None}, "were not measured"),
    ({"last": replace(QUIET, api_mib=117)}, "api_mib: 117 at the end, 100 after warm-up, allowed 16 more"),
    ({"last": replace(QUIET, worker_mib=217)}, "worker_mib: 217 at the end"),
    ({"last": replace(QUIET, api_fds=25)}, "api_fds: 25 at the end, 20 after warm-up, allowed 4 more"),
    ({"last": replace(QUIET, worker_fds=15)}, "worker_fds: 15"),
    ({"last": replace(QUIET, api_threads=13)}, "api_threads: 13"),
    ({"last": replace(QUIET, worker_threads=15)}, "worker_threads: 15"),
    ({"last": replace(QUIET, kv_share=0.01)}, "1.00% of the KV pool is held"),
    ({"last": replace(QUIET, waiting=3)}, "0 requests run, 3 wait"),
    ({"after": [2]}, "not those of before, bit for bit"),
    ({"before": None, "after": None}, "not those of before, bit for bit"),
    ({"drain": ["process 7 is left"]}, "the end: process 7 is left"),
    (
        {"log": "x\nTraceback (most recent call last):\n  File\nKeyError: 5\n"},
        "'Traceback (most recent call last):', KeyError: 5",
    ),
    ({"log": "x" * (LOG_BYTES + 1)}, "log has 4194305 bytes"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_each_invariant_can_fail(change: dict[str, Any] | Callable[[Found], None], said: str) -> None:
    made = found(**change) if isinstance(change, dict) else found()
    if callable(change):
        change(made)
    (line,) = reasons(made, BOUNDS)
    assert said in line


def test_a_run_that_passes_is_shown_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    made = found()
    assert reasons(made, BOUNDS) == []
    result = report(made, BOUNDS, [])
    json.dumps(result, allow_nan=False)
    show(result, {"NaN": "infinities"})
    shown = capsys.readouterr().out
    assert "| NaN | infinities | 1 | 1 | 400: 1 | 0.50 | 20 | 0 |" in shown
    assert shown.endswith("\nPASS\n")
    show(report(made, BOUNDS, ["because", "and so"]), {})
    assert capsys.readouterr().out.endswith("\nFAIL; because; and so\n")


def test_health_is_held_against_the_quiet_servers() -> None:
    seen = health(found())
    assert (seen["quiet_p99_ms"], seen["p99_ms"], seen["p99_to_quiet"]) == pytest.approx((4, 20, 5))
    made = found(probes=[Probe(9.0, 1.5, 200, 0), Probe(12.0, 0.3, 200, 0), Probe(21.0, 9.0, 200, 0)])
    seen = slow_health(made, made.attacks["NaN"], 50)
    assert (seen["health_worst_ms"], seen["health_slow"]) == (
        pytest.approx(1500),
        2,
    )  # under way as it began, or amid it
    assert slow_health(made, Tally(), 50) == {"health_worst_ms": None, "health_slow": 0}


RIGHT = Told("yes", "stop", 3)


@pytest.mark.parametrize(
    ("changed", "kills", "floods", "said"),
    [
        ({}, spans(), spans(), None),
        ({"text": "no"}, spans(), spans(), "expected Told(text='yes'"),
        ({"completion_tokens": 2}, spans(), spans(), "found Told"),
        ({"finish_reason": "length"}, spans(), spans(), "found Told"),
        ({"text": "no"}, KILLED, KILLED, "expected Told"),
        ({"error_kind": "http_429", "error": "HTTP 429: full"}, spans(), spans(90, 100), None),
        ({"error_kind": "http_429", "error": "HTTP 429: full"}, KILLED, spans(), "http_429: HTTP 429: full"),
        ({"error_kind": "http_503", "error": 'HTTP 503: {"code":"not_ready"}'}, KILLED, spans(), None),
        ({"error_kind": "server_error", "error": '{"code":"engine_dead"}'}, KILLED, spans(), None),
        ({"error_kind": "http_503", "error": 'HTTP 503: {"code":"not_ready"}'}, spans(), KILLED, "http_503"),
        ({"error_kind": "cut", "error": "stream ended"}, KILLED, KILLED, "cut: stream ended"),
        ({"error_kind": "http_500", "error": 'HTTP 500: {"code":"internal_error"}'}, KILLED, spans(), "http_500"),
    ],
)
def test_honest_clients_are_answered_right(
    changed: dict[str, Any], kills: Spans, floods: Spans, said: str | None
) -> None:
    server = Server.__new__(Server)
    server.url, server.model = "http://x", "m"
    honest = Honest(server, "k", Tally(), kills, floods)
    honest._right[CASES[0]] = RIGHT
    record = RequestRecord(0, 0, 3, completion_tokens=3, finish_reason="stop", text="yes")
    for name, value in changed.items():
        setattr(record, name, value)
    fault = honest.fault_of(CASES[0], record, 100.0, 101.0)
    assert (fault is None) == (said is None)
    assert said is None or said in str(fault)


def test_the_table_names_each_attack_once() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
    assert not any(status >= 500 and status != 505 for attack in ATTACKS for status in attack.allowed)
