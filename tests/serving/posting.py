"""An app in this process, without its worker, and what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from serving.scripted_worker import INFO, admitting_client
from starlette.applications import Starlette

from llmctl.config import ServeConfig
from llmctl.serving.app import create_app
from llmctl.serving.context import Model, ServerContext
from llmctl.serving.keys import ServerKeys
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.redaction import Redactor


@contextmanager
def app_without_worker(folder: Path, max_model_len: int, vocab_size: int = INFO.vocab_size) -> Iterator[Starlette]:
    """A server with so long a context, whose worker takes what it is sent, and never answers."""
    config, keys, metrics = ServeConfig(), ServerKeys(None), ServerMetrics("m")
    info = structs.replace(INFO, max_model_len=max_model_len, num_blocks=9000, vocab_size=vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        client = admitting_client(folder, metrics, config, patch)
        patch.setattr(client.worker, "info", info)
        context = ServerContext(config, ("m",), client, metrics, keys, Redactor(keys))
        context.loaded = Model.from_folder("m", folder, client.worker.tokenizer, info, config)
        yield create_app(context)


async def answer_of(app: Starlette, where: str, data: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to a body that is posted.

    Raises:
        TimeoutError: there is none within 20 seconds.
    """
    scope: dict[str, Any] = {
        **{"type": "http", "method": "POST", "path": where, "raw_path": where.encode(), "query_string": b""},
        **{"root_path": "", "scheme": "http", "http_version": "1.1", "state": {}},
        **{"client": ("10.0.0.1", 1), "server": ("10.0.0.2", 1)},
        "headers": [(b"content-type", b"application/json")],
    }
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": data, "more_body": False})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with asyncio.timeout(20):
        await app(scope, incoming.get, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
