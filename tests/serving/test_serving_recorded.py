"""What real clients send, as ``scripts/try_clients.py --record`` wrote it down, against the app: statuses are what they
were, and answers are what the API's description says. The worker is played by the test."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from pydantic import TypeAdapter
from serving.scripted_worker import INFO, admitting_client

from llmctl.config import ServeConfig
from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.request import FinishReason
from llmctl.engine.step import TokenLogprobs, TokenScores
from llmctl.serving.addresses import ALIASES
from llmctl.serving.app import create_app
from llmctl.serving.context import Model, ServerContext
from llmctl.serving.error_shapes import shape_of
from llmctl.serving.keys import ServerKeys
from llmctl.serving.metrics import NO_STATS, ServerMetrics
from llmctl.serving.operations import ERROR_MODELS, OPERATIONS
from llmctl.serving.redaction import Redactor
from llmctl.serving.wire import AddRequests, Command, StepMessage, WireRequest

RECORDED = Path(__file__).parent / "recorded"
NAME, KEY = "smollm2-135m", "a-key"
NOTES = [
    pytest.param(note, id=f"{path.stem}-{note['scenario']}-{index}")
    for path in sorted(RECORDED.glob("*.json"))
    for index, note in enumerate(json.loads(path.read_text(encoding="utf-8")))
]
TEXT_TOKENS = (70, 71, 72)


def output_of(request: WireRequest) -> TokenOutput:
    """Three tokens at once, with the log-probabilities that were asked for; or an embedding."""
    if request.pooling is not None:
        embedding = np.linspace(1, 2, 64, dtype=np.float32)
        return TokenOutput(request.request_id, finish_reason=FinishReason.STOP, embedding=embedding)
    params, count = request.params, len(request.prompt_token_ids)
    logprobs = scores = None
    if params.logprobs is not None:
        top = tuple(range(params.logprobs))
        logprobs = tuple(TokenLogprobs(-1.0, 1, top, (-1.0,) * len(top)) for _ in TEXT_TOKENS)
    if params.prompt_logprobs is not None:
        scores = TokenScores.zeros(count - 1, params.prompt_logprobs)
        scores.ranks[:] = 1
    return TokenOutput(request.request_id, TEXT_TOKENS, logprobs, FinishReason.STOP, prompt_scores=scores)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An app with a key, whose worker answers every sequence at once."""
    folder = tmp_path_factory.mktemp("model")
    config = ServeConfig(api_key=KEY, tool_template="generic", reasoning_parser="qwen3", max_num_seqs=64)
    metrics, keys = ServerMetrics(NAME), ServerKeys(KEY, None)
    with pytest.MonkeyPatch.context() as patch:
        client = admitting_client(folder, metrics, config, patch)

        def answer(command: Command) -> None:
            if isinstance(command, AddRequests):
                step = StepMessage([output_of(request) for request in command.requests], NO_STATS, 0.0)
                asyncio.get_running_loop().call_soon(client.on_step, step)

        patch.setattr(client.worker, "send", answer)
        context = ServerContext(config, (NAME,), client, metrics, keys, Redactor(keys))
        assert client.worker.tokenizer is not None
        info = structs.replace(INFO, max_model_len=4096, vocab_size=49152)
        context.loaded = Model.from_folder(NAME, folder, client.worker.tokenizer, info, config)
        yield create_app(context)


@dataclass
class Answered:
    """What the app answered."""

    status: int = 0
    content_type: str = ""
    body: bytes = b""

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.content_type = dict(message["headers"])[b"content-type"].decode()
        else:
            self.body += message.get("body", b"")


async def answered(app: Any, note: dict[str, Any]) -> Answered:
    """What the app answers a recorded request, as ASGI has both."""
    headers = {**note["headers"], "authorization": f"Bearer {'wrong' if note['status'] == 401 else KEY}"}
    path, _, query = note["path"].partition("?")
    scope = {
        **{"type": "http", "method": note["method"], "path": path, "raw_path": path.encode()},
        **{"query_string": query.encode(), "root_path": "", "scheme": "http", "http_version": "1.1", "state": {}},
        **{"client": ("10.0.0.1", 1), "server": ("10.0.0.2", 1)},
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    body = b"" if note["body"] is None else json.dumps(note["body"]).encode()
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
    found = Answered()
    await asyncio.wait_for(app(scope, incoming.get, found.send), 20)
    return found


@pytest.mark.parametrize("note", NOTES)
def test_a_recorded_request_is_answered_as_described(app: Any, note: dict[str, Any]) -> None:
    answer = asyncio.run(answered(app, note))
    assert answer.status == note["status"], answer.body
    path = note["path"].partition("?")[0].rstrip("/") or "/"
    (operation,) = [o for o in OPERATIONS if (o.method.upper(), o.path) == (note["method"], ALIASES.get(path, path))]
    if answer.status >= 400:
        ERROR_MODELS[shape_of(path)].model_validate_json(answer.body)
    elif answer.content_type.startswith("text/event-stream"):
        assert operation.event is not None
        events = [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: ")]
        if operation.done:
            assert events.pop() == "[DONE]"
        assert events
        described = TypeAdapter(operation.event)
        for event in events:
            described.validate_json(event)
    else:
        assert operation.answer is not None
        operation.answer.model_validate_json(answer.body)


def test_requests_of_most_clients_are_there() -> None:
    assert len(list(RECORDED.glob("*.json"))) > 8
