"""What real clients send, as ``scripts/try_clients.py --record`` wrote it down, against the app: statuses are what they
were, and answers are what the API's description says. The worker is played by the test."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import structs
from serving.scripted_worker import INFO, admitting_client

from llmctl.config import ServeConfig
from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.request import FinishReason
from llmctl.engine.step import TokenLogprobs, TokenScores
from llmctl.serving.addresses import ALIASES
from llmctl.serving.app import create_app
from llmctl.serving.context import Model, ServerContext
from llmctl.serving.keys import ServerKeys
from llmctl.serving.metrics import NO_STATS, ServerMetrics
from llmctl.serving.operations import OPERATIONS
from llmctl.serving.redaction import Redactor
from llmctl.serving.response_schema import ErrorResponse
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
    """Three tokens at once, and all the log-probabilities that were asked for."""
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
        info = structs.replace(INFO, max_model_len=4096)
        context.loaded = Model.from_folder(NAME, folder, client.worker.tokenizer, info, config)
        yield create_app(context)


@pytest.mark.parametrize("note", NOTES)
def test_a_recorded_request_is_answered_as_described(app: Any, note: dict[str, Any]) -> None:
    async def sent() -> httpx.Response:
        headers = {**note["headers"], "Authorization": f"Bearer {'wrong' if note['status'] == 401 else KEY}"}
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = None if note["body"] is None else json.dumps(note["body"]).encode()
            return await client.request(note["method"], note["path"], headers=headers, content=body)

    answer = asyncio.run(asyncio.wait_for(sent(), 20))
    assert answer.status_code == note["status"], answer.text
    path = note["path"].partition("?")[0].rstrip("/")
    (operation,) = [o for o in OPERATIONS if (o.method.upper(), o.path) == (note["method"], ALIASES.get(path, path))]
    if answer.status_code >= 400:
        ErrorResponse.model_validate_json(answer.content)
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert operation.event is not None
        *events, done = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert (len(events) > 0, done) == (True, "[DONE]")
        for event in events:
            operation.event.model_validate_json(event)
    else:
        assert operation.answer is not None
        operation.answer.model_validate_json(answer.content)


def test_every_client_that_can_be_recorded_is() -> None:
    assert {path.stem for path in RECORDED.glob("*.json")} >= {"openai", "litellm", "llm"}
