"""A proxy that writes down what each client sends, by client and scenario.

The path that a client is given begins with both names: ``/client/scenario`` is taken off, and the rest is forwarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

MAX_BODY = 2**24
_OF_ONE_CONNECTION = {"host", "content-length", "connection", "transfer-encoding", "keep-alive", "accept-encoding"}
# Keys, and what differs from one request or machine to the next.
_LEFT_OUT = re.compile(r"authorization|(x-api-key|cookie|traceparent|x-request-id|idempotency-key)$|x-stainless-", re.I)


class Recorder:
    """What was sent: by client, without what differs from one request to the next and without keys."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._seen: dict[str, list[dict[str, Any]]] = {}
        self._session: aiohttp.ClientSession | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Forward a request, and its answer as it comes."""
        assert self._session is not None
        client, scenario, rest = (request.path_qs.removeprefix("/") + "/").split("/", 2)
        rest = rest.removesuffix("/")  # added for the path of the root, which has no third part
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _OF_ONE_CONNECTION}
        address = URL(f"{self._target}/{rest}", encoded=True)
        async with self._session.request(request.method, address, headers=headers, data=body or None) as found:
            self._note(client, scenario, request.method, "/" + rest, headers, body, found.status)
            kept = {k: v for k, v in found.headers.items() if k.lower() not in _OF_ONE_CONNECTION}
            answer = web.StreamResponse(status=found.status, headers=kept)
            with contextlib.suppress(ConnectionError):  # the client has enough
                await answer.prepare(request)
                async for data in found.content.iter_any():
                    await answer.write(data)
                await answer.write_eof()
        return answer

    def _note(
        self, client: str, scenario: str, method: str, path: str, headers: dict[str, str], body: bytes, status: int
    ) -> None:
        shown = {name.lower(): value for name, value in headers.items() if not _LEFT_OUT.match(name)}
        note = {"scenario": scenario, "method": method, "path": path, "headers": shown, "status": status}
        note["body"] = json.loads(body) if body else None
        notes = self._seen.setdefault(client, [])
        if note not in notes:
            notes.append(note)

    def write(self, folder: Path) -> None:
        """A JSON file for each client."""
        folder.mkdir(parents=True, exist_ok=True)
        for client, notes in self._seen.items():
            (folder / f"{client}.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def listening(self) -> Iterator[str]:
        """The proxy's address, while it runs in a thread of its own."""
        ready: list[str] = []
        started, loop = threading.Event(), asyncio.new_event_loop()
        stop = asyncio.Event()

        async def run() -> None:
            # A connection for each request: one that is kept could be closed by the server as it is used again.
            connector, limit = aiohttp.TCPConnector(limit=0, force_close=True), aiohttp.ClientTimeout(total=None)
            async with aiohttp.ClientSession(connector=connector, timeout=limit) as self._session:
                app = web.Application(client_max_size=MAX_BODY)
                app.router.add_route("*", "/{rest:.*}", self.handle)
                runner = web.AppRunner(app)
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                ready.append("http://{}:{}".format(*runner.addresses[0]))
                started.set()
                await stop.wait()
                await runner.cleanup()

        def main() -> None:
            try:
                loop.run_until_complete(run())
            finally:
                started.set()

        thread = threading.Thread(target=main, daemon=True)
        thread.start()
        started.wait()
        if not ready:
            raise RuntimeError("the recording proxy did not start")
        try:
            yield ready[0]
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()
