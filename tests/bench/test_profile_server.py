"""The measuring of a full queue, on numbers given by hand and on servers without a model that do not hold it full."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import served
import server_queue
from server_queue import QueueRow, Requests, Round, Window


def metrics(running: int, waiting: int, steps: int, tokens: int, *, step_us: float = 5000.0) -> str:
    """/metrics after so many steps, of which a tenth was Python's; a stream's tokens came a tenth later than steps."""
    values = {
        "num_requests_running": running,
        "num_requests_waiting": waiting,
        server_queue.STEPS: steps,
        server_queue.BUSY: steps * step_us / 1e6,
        server_queue.COMPUTE: 0.9 * steps * step_us / 1e6,
        "generation_tokens_total": tokens,
        "inter_token_latency_seconds_sum": 1.1 * tokens * step_us / 1e6,
        "inter_token_latency_seconds_count": tokens,
    }
    return "".join(f'llmctl:{name}{{engine="0"}} {value}\n' for name, value in values.items())


def test_a_window_is_what_grew_between_two_looks() -> None:
    before, after = (served.parse_metrics(metrics(8, 0, steps, 8 * steps)) for steps in (100, 300))
    window = Window.between(before, after)
    assert (window.middle, window.steps) == (200, 200)
    assert (window.step_us, window.python_us, window.token_gap_us) == pytest.approx((5000, 500, 5500))


def test_steps_with_a_queue_are_held_against_the_same_steps_without() -> None:
    """Steps that grow by 1 us each: a window far from the middle of the other two is compared at its own place."""

    def window(middle: int, factor: float = 1.0) -> Window:
        return Window(middle, 10, factor * (5000 + middle), factor * 500, factor * 6000)

    played = [Round(window(100), window(300, 2.0), window(800, 1 + i / 100), window(1000)) for i in (1, 5, 2)]
    assert played[0].alone("step_us", played[0].queued) == pytest.approx(5800)
    row = QueueRow.of(8, 256, "step_us", played)
    assert (row.alone, row.queued) == pytest.approx((5800, 5800 * 1.02))
    assert (row.ratio, *row.ratio_range, row.submission_ratio) == pytest.approx((1.02, 1.01, 1.05, 2.0))


def looked_at(texts: Iterator[str], status: int = 0) -> Window:
    """A window for 2 running and 3 waiting, on a server that answers with ``texts``; it never ends a request, or
    refuses it with ``status``."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "m", "max_model_len": 64}]})
        if request.path == "/metrics":
            return web.Response(text=next(texts))
        if status:
            return web.Response(status=status, text="no room")
        await asyncio.sleep(3600)
        raise AssertionError

    async def run() -> Window:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        async with TestServer(app) as server, served.client_session() as session:
            subject = await asyncio.to_thread(served.Server, str(server.make_url("/")).rstrip("/"), 0)
            requests = Requests(session, subject)
            try:
                requests.send(5, 4, 4)
                return await requests.window(0.05, 2, 3)
            finally:
                await requests.drop()

    return asyncio.run(run())


GOOD_END = metrics(2, 3, 110, 220)


def test_a_window_begins_when_all_wait() -> None:
    window = looked_at(
        chain((metrics(2, n, 5 + n, 9) for n in range(3)), repeat(metrics(2, 3, 10, 20), 2), repeat(GOOD_END))
    )
    assert (window.middle, window.steps) == (60, 100)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (metrics(2, 2, 110, 220), r"expected \(2, 3\) for 0.05 s, found \(2, 2\)"),
        (metrics(1, 3, 110, 220), r"found \(1, 3\)"),
        (metrics(2, 3, 110, 219), "199 tokens in 100 steps"),
    ],
)
def test_a_queue_that_was_not_full_all_the_time_is_no_measurement(end: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        looked_at(chain(repeat(metrics(2, 3, 10, 20), 2), repeat(end)))


def test_a_queue_that_does_not_fill_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_queue, "REACH_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match=r"expected \(2, 3\) within 0.2 s, found \(2, 1\)"):
        looked_at(repeat(metrics(2, 1, 10, 20)))


def test_a_request_that_is_refused_ends_it_with_the_servers_words() -> None:
    with pytest.raises(RuntimeError, match=r"a request ended while it was measured: .* status 429: no room"):
        looked_at(repeat(metrics(2, 1, 10, 20)), status=429)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(served.ServerError, match=r"(?s)before it was ready\n.*nothing-here"),
        served.serving(str(tmp_path / "nothing-here")),
    ):
        pass
