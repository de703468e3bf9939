"""The soak's judgement and its clients, without a model: numbers given by hand, and a server that misbehaves."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import served
import soak
import soak_clients

BOUNDS = soak.Bounds(growth_mib=16, stall_seconds=2, idle_seconds=10)
IDLE = soak.Sample(at=0, anonymous=1.0, resident=200.0, blocks=0, running=0, waiting=0, tokens=10, preemptions=0)


def record(*anonymous: float | None) -> soak.SoakRecord:
    """Idle moments a minute apart."""
    made = soak.SoakRecord(samples=[replace(IDLE, at=60.0 * i, anonymous=p) for i, p in enumerate(anonymous)])
    made.answers["completion"] = 1
    return made


def test_metrics_are_summed_over_labels() -> None:
    text = '# HELP x\nllmctl:steps_total{a="1 2"} 3.0\nllmctl:steps_total{a="b"} 4\nllmctl:plain 5.5\nprocess_x 7\n'
    assert served.parse_metrics(text) == {"steps_total": 7.0, "plain": 5.5}


def test_a_quiet_run_passes() -> None:
    assert soak.verdict(record(50, 100, 101, 100, 102, 101, 100), BOUNDS, 60, True) == []


def test_growth_counts_after_warm_up_only_and_one_spike_is_none() -> None:
    assert soak.growth(record(10, 50, 100, 100, 300, 101, 101, 102).samples, 120) == pytest.approx(1.5)
    assert soak.growth(record(10, 50, 100).samples, 120) is None
    assert soak.growth(record(None, None, None, None).samples, 0) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"samples": record(*range(100, 220, 20)).samples}, "memory grew by 80.0 MiB"),
        ({"samples": record(1, 2).samples}, "fewer than three idle moments"),
        (
            {"samples": [*record(1, 1, 1).samples, replace(IDLE, blocks=0.5)]},
            "50.00% of the KV blocks held",
        ),
        ({"samples": [*record(1, 1, 1).samples, replace(IDLE, running=2)]}, "2 running and 0 waiting"),
        ({"step_gap": 2.5}, "no step while requests ran for 2.50 s"),
        ({"chunk_gap": 3.0}, "between two chunks for 3.00 s, allowed 2"),
    ],
)
def test_each_bound_is_held(changed: dict[str, object], said: str) -> None:
    broken = replace(record(1, 1, 1), **changed)  # type: ignore[arg-type]
    (line,) = soak.verdict(broken, BOUNDS, 0, True)
    assert said in line


def test_failures_and_silence_are_violations() -> None:
    failed = record(1, 1, 1)
    failed.fail("completion: status 500")
    assert soak.verdict(failed, BOUNDS, 0, True) == ["1 failures, first: completion: status 500"]
    silent = replace(record(1, 1, 1), answers=soak_clients.Counter())
    assert soak.verdict(silent, BOUNDS, 0, True) == ["no request was answered"]


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _completion(text: str) -> web.Response:
    choice = {"text": text, "logprobs": {"token_logprobs": [-1.0]}}
    return web.json_response({"choices": [choice, choice], "usage": {"completion_tokens": 1}})


def act(kind: str, handler: Handler, times: int = 1) -> soak_clients.Record:
    """One kind of request against a handler of everything."""

    async def run() -> soak_clients.Record:
        app = web.Application()
        app.router.add_post("/{path:.*}", handler)
        seen = soak_clients.Record()
        beats = asyncio.create_task(seen.clock.listen())
        async with TestServer(app) as server, aiohttp.ClientSession() as session:
            endpoint = soak_clients.Endpoint(str(server.make_url("/")).rstrip("/"), "m", 64)
            client = soak_clients.Client(session, endpoint, seen, random.Random(0))
            client.rng.choices = lambda *_, **__: [kind] * 60  # type: ignore[method-assign, assignment]
            client.rng.randrange = lambda *_: 3  # type: ignore[method-assign, assignment]
            for _ in range(times):
                await client.act()
        beats.cancel()
        return seen

    return asyncio.run(run())


def test_good_answers_are_counted() -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return await _completion("a")

    for kind in ("completion", "logprobs", "stop", "probe"):
        assert act(kind, answer).answers == {kind: 1}


@pytest.mark.parametrize("kind", sorted(set(soak_clients.KINDS) - {"leave_prefill"}))
def test_a_server_error_is_a_failure(kind: str) -> None:
    async def broken(_: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    assert act(kind, broken).answers == {"failed": 1}


def test_a_seeded_request_that_changes_its_text_is_a_failure() -> None:
    texts = iter("aab")

    async def changing(_: web.Request) -> web.StreamResponse:
        return await _completion(next(texts))

    seen = act("probe", changing, 3)
    assert seen.answers == {"probe": 2, "failed": 1}
    assert "gave 'b' after 'a'" in seen.errors[0]


@pytest.mark.parametrize(("last", "failed"), [("data: [DONE]\n\n", 0), ("", 1), ('data: {"error": {}}\n\n', 1)])
def test_a_stream_must_end_as_streams_do(last: str, failed: int) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": []}\n\n')
        await asyncio.sleep(0.05)
        await response.write(b'data: {"choices": []}\n\n')
        await response.write(last.encode())
        return response

    seen = act("completion_stream", stream)
    assert seen.answers["failed"] == failed
    assert seen.chunk_gap >= 0.04


def test_being_held_up_is_no_stall() -> None:
    """Neither what is over nor what is just going on; and time goes on as ever otherwise."""

    async def run() -> None:
        clock = soak_clients.OwnClock()
        beats = asyncio.create_task(clock.listen())
        await asyncio.sleep(0.2)
        before, real = clock.now(), time.monotonic()
        time.sleep(1.0)
        assert clock.now() - before <= soak_clients.BEAT_SECONDS + 0.01
        while clock.now() - before < 0.3:
            await asyncio.sleep(0.01)
        assert time.monotonic() - real >= 0.3 + 1.0 - soak_clients.BEAT_SECONDS
        assert clock.longest >= 1.0 - soak_clients.BEAT_SECONDS
        beats.cancel()

    asyncio.run(run())


def test_a_server_that_pauses_stalls_and_clients_that_pause_do_not() -> None:
    def gap(server_pause: float, own_pause: float) -> float:
        async def stream(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b'data: {"choices": []}\n\n')
            await asyncio.sleep(0.1)
            time.sleep(own_pause)  # one process: the clients stand still, too
            await asyncio.sleep(server_pause)
            await response.write(b"data: [DONE]\n\n")
            return response

        return act("completion_stream", stream).chunk_gap

    assert gap(0.0, 1.0) < 0.6
    assert gap(1.0, 0.0) > 0.6


def test_a_prompt_that_is_too_long_must_be_refused() -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=400)

    async def accept(_: web.Request) -> web.StreamResponse:
        return await _completion("a")

    assert act("too_long", refuse).answers == {"too_long": 1}
    assert act("too_long", accept).answers == {"failed": 1}


@pytest.mark.parametrize("kind", ["completion", "logprobs", "probe", "stop"])
def test_requests_fit_the_context(kind: str) -> None:
    """Of 64 tokens: half for the prompt, a quarter for the answer, a quarter for the template."""
    asked: list[dict[str, object]] = []

    async def note(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        return await _completion("a")

    act(kind, note, 20)
    assert len(asked) == 20
    assert max(len(str(body["prompt"]).split()) for body in asked) <= 21
    assert max(int(str(body["max_tokens"])) for body in asked) <= 16


SERIES = "".join(f"llmctl:{name} 0\n" for name in soak.IDLE_SERIES)
MODELS = {"data": [{"id": "m", "max_model_len": 64}]}


def soaked(models: object, *metrics: str) -> soak.SoakRecord:
    """A short soak of a server with those answers; the last of ``metrics`` is repeated."""
    texts = list(metrics)

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response(models)
        if request.path == "/metrics":
            return web.Response(text=texts.pop(0) if len(texts) > 1 else texts[0])
        await asyncio.sleep(0.01)
        return await _completion("a")

    async def run() -> soak.SoakRecord:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", handler)
        options = argparse.Namespace(minutes=0.005, round_seconds=0.1, idle_seconds=0.1, seed=0)
        async with TestServer(app) as server:
            return await soak.soak(str(server.make_url("/")).rstrip("/"), None, options)

    return asyncio.run(run())


def test_a_watch_that_dies_is_a_failure() -> None:
    """The second answer, which is the watch's first, is no number."""
    seen = soaked(MODELS, SERIES, "llmctl:engine_steps_total x\n", SERIES)
    assert "the watch over the steps ended: ValueError: could not convert string to float: 'x'" in seen.errors
    assert any("failures" in line for line in soak.verdict(seen, BOUNDS, 0, False))
    assert not any("watch" in error for error in soaked(MODELS, SERIES).errors)


@pytest.mark.parametrize(
    ("models", "metrics", "said"),
    [
        (MODELS, "vllm:num_requests_running 0\n", "its /metrics has no llmctl:num_requests_running"),
        ({"data": [{"id": "m"}]}, SERIES, "/v1/models: KeyError: 'max_model_len'"),
        ([], SERIES, "not an llmctl server"),
    ],
)
def test_another_server_is_refused(models: object, metrics: str, said: str) -> None:
    with pytest.raises(RuntimeError, match="not an llmctl server") as raised:
        soaked(models, metrics)
    assert said in str(raised.value)
