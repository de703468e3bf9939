"""A request that the queue has no room for is refused before anything is made of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fixtures import make_tokenizer
from serving.scripted_worker import INFO
from starlette.types import Message

from llmctl.config import ServeConfig
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import QueueFullError, RequestError
from llmctl.serving.app import create_app
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.context import Model, ServerContext
from llmctl.serving.error_shapes import shape_of
from llmctl.serving.exchange import check_outline, check_single
from llmctl.serving.generation import SequenceSpec
from llmctl.serving.keys import ServerKeys
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.openai_errors import error_response
from llmctl.serving.operations import ERROR_MODELS
from llmctl.serving.outline import Outline
from llmctl.serving.redaction import Redactor
from llmctl.serving.wire import EngineInfo
from llmctl.text.tokenizer import Tokenizer


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncEngineClient:
    """Two seats, a queue of three."""
    make_tokenizer(tmp_path)
    config = ServeConfig(max_num_queued_reqs=3)
    client = AsyncEngineClient(config, ServerMetrics("mine"), stall_timeout=60.0)
    monkeypatch.setattr(client.worker, "tokenizer", Tokenizer.from_folder(tmp_path))
    info = EngineInfo("m", "llama", "reference", "none", "float32", 64, 16, 8, 300, 32, 0, 0, "float32", 2, 64)
    monkeypatch.setattr(client.worker, "info", info)
    monkeypatch.setattr(client.worker, "send", lambda _: None)
    client.admit()
    return client


def test_what_never_fits_is_the_requests_fault(client: AsyncEngineClient) -> None:
    client.check_room(3)
    with pytest.raises(
        RequestError, match=r"n: expected at most 3 sequences in a request \(prompts times n\), found 4"
    ) as caught:
        client.check_room(4)
    assert (caught.value.http_status, caught.value.param) == (400, "n")
    with pytest.raises(RequestError, match="input: expected at most 3 sequences in a request, found 4"):
        client.check_room(4, "input")


def test_what_does_not_fit_now_may_come_again(client: AsyncEngineClient) -> None:
    for _ in range(4):
        client.generate([SequenceSpec([5], SamplingParams())])
    client.check_room(1)
    with pytest.raises(QueueFullError, match="2 requests are waiting and at most 3 may"):
        client.check_room(2)
    client.generate([SequenceSpec([5], SamplingParams())])
    with pytest.raises(QueueFullError):
        client.check_room(1)


def test_it_says_when_by_how_fast_requests_finish(client: AsyncEngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def retry_after(sequences: int) -> str:
        with pytest.raises(QueueFullError) as caught:
            client.check_room(sequences)
        return error_response(caught.value, {"path": "/v1/completions"}).headers["Retry-After"]

    running = [client.generate([SequenceSpec([5], SamplingParams())]) for _ in range(5)]
    now += 5
    assert retry_after(2) == "10"  # two places at less than one in 5 s
    for generation in running[:2]:
        generation.abort()
        now += 1
    for _ in range(2):
        client.generate([SequenceSpec([5], SamplingParams())])
    now += 1
    assert [retry_after(1), retry_after(3)] == ["4", "12"]  # two in 8 s
    now += 20
    assert retry_after(3) == "30"


def test_a_refusal_by_the_engine_says_when_too(client: AsyncEngineClient) -> None:
    generation = client.generate([SequenceSpec([5], SamplingParams())] * 3)
    error = QueueFullError("full")
    client._on_refused([s.request_id for s in generation.sequences], error)
    assert error.retry_after == 3


@pytest.fixture
def context(client: AsyncEngineClient, tmp_path: Path) -> ServerContext:
    """A server whose engine is that of ``client``."""
    keys, metrics = ServerKeys(None), ServerMetrics("m")
    context = ServerContext(ServeConfig(), ("m",), client, metrics, keys, Redactor(keys))
    assert client.worker.tokenizer is not None
    context.loaded = Model.from_folder("m", tmp_path, client.worker.tokenizer, INFO, context.config)
    return context


def test_what_an_api_does_not_know_is_not_counted(client: AsyncEngineClient, context: ServerContext) -> None:
    outline = Outline(b'{"n": 128, "prompt": ["a", "b"]}')
    check_single(context, outline)
    with pytest.raises(RequestError, match="found 256"):
        check_outline(context, outline)
    for _ in range(5):
        client.generate([SequenceSpec([5], SamplingParams())])
    with pytest.raises(QueueFullError):
        check_single(context, outline)


async def _never() -> Message:
    raise AssertionError("the body of a request that has no room was asked for")


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/generate", "/"]
)
def test_a_full_queue_refuses_before_a_body_is_read(
    client: AsyncEngineClient, context: ServerContext, path: str
) -> None:
    for _ in range(5):
        client.generate([SequenceSpec([5], SamplingParams())])
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "method": "POST", "path": path, "raw_path": path.encode()},
        **{"query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1", "state": {}},
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"1000")],
    }
    asyncio.run(create_app(context)(scope, _never, send))
    assert sent[0]["status"] == 429
    assert b"retry-after" in dict(sent[0]["headers"])
    ERROR_MODELS[shape_of(path)].model_validate_json(sent[1]["body"])
    assert "are waiting" in sent[1]["body"].decode()
    labels = {"model_name": "m", "reason": "max_num_queued_reqs"}
    assert context.metrics.registry.get_sample_value("llmctl:admission_rejections_total", labels) == 1
