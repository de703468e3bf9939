"""An OpenAI-compatible server of one thread a request that answers as it is told, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ScriptedServer:
    """``pieces``: the next answers' text; ``gap``: seconds between pieces. ``bodies``: what was asked, in order.

    ``refusal``: status and body instead of answers; ``untold``: instead of the list of models. ``cut``: streams end
    before their finish_reason. ``usage``: of the answers; None: the server does not count. ``broken``: set when a
    client has gone away in the middle.
    """

    pieces: list[str] = field(default_factory=lambda: ["Blue ", "light ", "scatters."])
    thoughts: list[str] = field(default_factory=list)
    gap: float = 0.01
    names: tuple[str, ...] = ("first", "second")
    refusal: tuple[int, str] | None = None
    untold: tuple[int, str] | None = None
    cut: bool = False
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 7, "completion_tokens": 3})
    finish: str = "stop"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    broken: threading.Event = field(default_factory=threading.Event)
    url: str = ""


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """A server for as long as it is needed."""
    script = ScriptedServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = json.dumps({"object": "list", "data": [{"id": name} for name in script.names]})
            self._document(*(script.untold or (200, listed)))

        def do_POST(self) -> None:
            script.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            script.keys.append(self.headers.get("Authorization"))
            script.paths.append(self.path)
            if script.refusal is not None:
                self._document(*script.refusal)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            chat = self.path.endswith("/chat/completions")
            try:
                for thought in script.thoughts:
                    self._event({"choices": [{"delta": {"reasoning_content": thought}}]})
                for piece in script.pieces:
                    self._event({"choices": [{"delta": {"content": piece}} if chat else {"text": piece}]})
                    time.sleep(script.gap)
                if script.cut:
                    return
                self._event({"choices": [{"delta": {}, "text": "", "finish_reason": script.finish}]})
                if script.usage is not None:
                    self._event({"choices": [], "usage": script.usage})
                self.wfile.write(b"data: [DONE]\n\n")
            except OSError:
                script.broken.set()

        def _event(self, document: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")
            self.wfile.flush()

        def _document(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        script.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield script
        server.shutdown()
