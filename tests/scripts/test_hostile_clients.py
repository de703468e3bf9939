"""The hostile soak's clients, on servers that answer, do not, or answer what they should not; one real short soak."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import hostile
import pytest
import soak
from hostile import bodies, malformed
from hostile.arena import Arena
from hostile.bodies import completion, posted
from hostile.connections import drops, pipelined
from hostile.judgement import Spans, Tally
from hostile.malformed import sent
from hostile.prober import Prober, probe
from hostile.wire import CLOSED, SILENT, Address, Answer
from served import Server

SCRIPTS = Path(hostile.__file__).parents[1]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answered(body: bytes, status: int = 200, name: str = "r") -> bytes:
    """An answer of the kind that llmctl gives."""
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nx-request-id: {name}\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def says(*pieces: bytes, closes: bool = True) -> Handler:
    """Waits for the end of some headers, and sends these."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        if not closes:
            await reader.read()
        writer.close()

    return handle


def against(
    handler: Handler, play: Callable[[Arena], Awaitable[None]], allowed: set[int], patience: float = 5
) -> Tally:
    """What a play on a server counts."""

    async def run() -> Tally:
        listening = await asyncio.start_server(handler, "127.0.0.1", 0)
        server = Server.__new__(Server)
        server.model, server.max_model_len, server.headers = "m", 64, {}
        address, tally = Address("127.0.0.1", listening.sockets[0].getsockname()[1], patience), Tally()
        await play(Arena(server, address, "key", "honest", random.Random(0), tally, allowed, Spans()))
        listening.close()
        return tally

    return asyncio.run(run())


def exchanged(handler: Handler, expect: int = 1, patience: float = 5) -> list[Answer]:
    """Answers to one request."""
    found: list[Answer] = []

    async def play(arena: Arena) -> None:
        found.extend(await arena.address.exchange([b"GET / HTTP/1.1\r\n", 0.01, b"\r\n"], expect))

    against(handler, play, set(), patience)
    return found


def test_answers_are_read_whatever_the_pieces() -> None:
    chunked = b"HTTP/1.1 400 X\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + answered(b"{}") + chunked
    for pieces in ([data], [data[i : i + 7] for i in range(0, len(data), 7)]):
        first, second = exchanged(says(*pieces, closes=False), 2)
        assert (first.status, first.body, first.request_id, first.whole) == (200, b"{}", "r", True)
        assert (second.status, second.body, second.tail) == (400, b"abcde", b"abcde")


def test_what_does_not_come_has_a_name() -> None:
    assert [a.status for a in exchanged(says())] == [CLOSED]
    assert [a.status for a in exchanged(says(b"no HTTP\r\n\r\n"))] == [CLOSED]
    assert [a.status for a in exchanged(says(closes=False), patience=0.2)] == [SILENT]
    assert [a.status for a in exchanged(says(answered(b"{}")), 2)] == [200, CLOSED]
    (cut,) = exchanged(says(answered(b"{}")[:-1]))
    assert (cut.status, cut.whole) == (200, False)


def test_a_play_judges_and_counts() -> None:
    def play(_: Arena) -> object:
        yield completion(n=0)

    refusal = json.dumps({"error": {"message": "no", "type": "t", "param": "n", "code": None}}).encode()
    good = against(says(answered(refusal, 400)), posted(play, 3), {400})
    assert (good.answers, good.faults) == ({"400": 3}, 0)
    bad = against(says(answered(b'{"detail": "no"}', 422)), posted(play, 3), {400})
    assert (bad.answers, bad.faults) == ({"422": 3}, 3)
    assert "expected 400, found 422" in bad.examples[0]


def test_drops_end_with_the_answer() -> None:
    refusal = json.dumps({"error": {"message": "slow", "type": "t", "param": None, "code": None}}).encode()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(5)
        writer.write(answered(refusal, 408))
        await writer.drain()
        writer.close()

    tally = against(handle, drops(b"GET", 10, gap=0.01), {408})
    assert (tally.answers, tally.faults) == ({"408": 10}, 0)


def test_a_smuggled_request_that_is_answered_is_a_fault() -> None:
    told = json.dumps({"error": {"message": "no GET /smuggled", "type": "t", "param": None, "code": None}}).encode()
    assert against(says(answered(told, 404)), sent(malformed.smuggling, 1), {404}).faults == 12
    assert (
        against(says(answered(told.replace(b"/smuggled", b"/"), 404)), sent(malformed.smuggling, 1), {404}).faults == 0
    )


@pytest.mark.parametrize(("swapped", "faults"), [(False, 0), (True, 1)])
def test_pipelined_answers_come_in_order(swapped: bool, faults: int) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = 0
        while not reader.at_eof():
            line = await reader.readline()
            if line.startswith(b"X-Request-Id: "):
                name = "p-0" if swapped and number == 7 else line.split()[1].decode()
                writer.write(answered(b"{}", name=name))
                number += 1

    assert against(handle, pipelined, {200}).faults == faults


def test_the_prober_notes_what_it_sees(tmp_path: Path) -> None:
    async def run() -> tuple[int, int]:
        server = await asyncio.start_server(says(answered(b"{}", 503)), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        found = await asyncio.to_thread(probe, "127.0.0.1", port)
        server.close()
        return found, await asyncio.to_thread(probe, "127.0.0.1", port)

    assert asyncio.run(run()) == (503, 0)
    lines = tmp_path / "lines"
    lines.write_text("12.5000 0.00400 200 0.00010\n13.0000 0.1")
    with lines.open() as file:
        (seen,) = Prober(file).probes()
    assert (seen.at, seen.seconds, seen.status, seen.late) == (12.5, 0.004, 200, 0.0001)


@pytest.mark.parametrize(
    "name", ["many_prompts", "duplicate_keys", "not_numbers", "out_of_range", "edges", "templates"]
)
def test_bodies_are_requests_of_known_endpoints(name: str) -> None:
    seen: list[str] = []

    async def play(arena: Arena) -> None:
        seen.extend(path for path, body in getattr(bodies, name)(arena) if body.startswith(b"{"))

    against(says(), play, set())
    assert seen
    assert set(seen) <= {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--hostile --base-url http://localhost:1", "--hostile: needs --model"),
        ("--model m --attack NaN", "--attack: only with --hostile"),
        ("--model m --health-ms 5", "--health-ms: only with --hostile"),
        ("--model m --log f", "--log: only with --hostile"),
        ("--hostile --model m --stall-seconds 3", "--stall-seconds: not with --hostile"),
        ("--hostile --model m --attack nothing", "--attack nothing: expected one of many prompts, "),
    ],
)
def test_bad_usage_starts_no_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["soak.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        sys.exit(soak.main())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_soak_of_a_real_server(tiny_engine: Path) -> None:
    """Times are not judged here; what is refused, answered and left is."""
    command = [sys.executable, str(SCRIPTS / "soak.py"), "--hostile", "--model", str(tiny_engine), "--minutes", "0.2"]
    command += ["--health-ms", "5000", "--growth-mib", "200", "--max-model-len", "512", "--json"]
    for name in ("NaN", "smuggling", "methods", "resets", "worker killed", "keys", "out of range"):
        command += ["--attack", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    result = json.loads(done.stdout)
    assert (done.returncode, result["verdict"], result["reasons"]) == (0, "PASS", [])
    assert result["honest"]["answers"]["200"] > 3
    assert len(result["attacks"]) >= 2
    assert result["health"]["probes"] > 10
