"""``/requests`` and ``/engine``: what is said of each unfinished request, and of the engine; no worker is started."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from serving.scripted_worker import Server
from serving.test_serving_http_metrics import ask

from llmctl.artifact.loader import read_manifest
from llmctl.engine.deadline import NO_DEADLINE
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import EngineLoadError
from llmctl.serving.app import create_app
from llmctl.serving.context import ServerContext
from llmctl.serving.engine_card import EngineCard
from llmctl.serving.generation import SequenceSpec
from llmctl.serving.keys import ServerKeys
from llmctl.serving.live import MOST_SHOWN
from llmctl.serving.live_schema import RunningRequests
from llmctl.serving.redaction import Redactor


class Watched(Server):
    """A server of two seats and its app. ``asked``: what ``/requests`` says."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, keys: str = "the-secret-key", **config: Any
    ) -> None:
        super().__init__(folder, monkeypatch, **config)
        accepted = ServerKeys(keys)
        context = ServerContext(self.client._config, ("m",), self.client, self.metrics, accepted, Redactor(accepted))  # type: ignore[arg-type]
        self.app = create_app(context)

    def asked(self, key: str = "the-secret-key") -> RunningRequests:
        start, body = ask(self.app, "GET", "/requests", headers=(("authorization", f"Bearer {key}"),))
        assert start["status"] == 200
        return RunningRequests.model_validate(json.loads(body["body"]))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_a_request_from_its_arrival_to_its_end(server: Watched) -> None:
    assert server.asked() == RunningRequests(running=0, queued=0, requests=[])
    generation = server.client.generate([SequenceSpec([5, 6, 7], SamplingParams(max_tokens=9))] * 2)
    generation.request_id = "mine"
    server.now += 2
    found = server.asked()
    assert (found.running, found.queued) == (0, 2)
    first, second = found.requests
    assert first.model_dump() == {
        **{"id": "mine", "index": 0, "state": "queued", "prompt_tokens": 3, "output_tokens": 0, "max_tokens": 9},
        **{"seconds": 2.0, "ttft_seconds": None, "adapter": None},
    }
    assert (second.id, second.index) == ("mine", 1)
    server.client.on_scheduled([generation.sequences[1].request_id])
    found = server.asked()
    assert (found.running, found.queued) == (1, 1)
    assert [(row.index, row.state) for row in found.requests] == [(1, "prefilling"), (0, "queued")]
    server.step(generation, 0.5)
    server.step(generation, 0.5)
    found = server.asked()
    assert [(row.state, row.output_tokens, row.ttft_seconds) for row in found.requests] == [("decoding", 2, 2.5)] * 2
    server.step(generation, 0.5, last=True)
    assert server.asked().requests == []


def test_a_key_that_a_client_takes_for_an_id_is_not_shown(server: Watched) -> None:
    generation = server.generate(NO_DEADLINE)
    generation.request_id = "call-the-secret-key-1"
    (row,) = server.asked().requests
    assert "the-secret-key" not in row.id
    assert row.id


def test_each_key_sees_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Watched(tmp_path, monkeypatch, keys="first-key,other-key,idle-key")
    for number, count in ((0, 1), (1, 2)):
        generation = server.client.generate([SequenceSpec([5], SamplingParams())] * count, f"key {number}")
        generation.request_id = f"of-{number}"
    first, other, idle = (server.asked(key) for key in ("first-key", "other-key", "idle-key"))
    assert [row.id for row in first.requests] == ["of-0"]
    assert [row.id for row in other.requests] == ["of-1", "of-1"]
    assert idle.requests == []
    assert {(found.running, found.queued) for found in (first, other, idle)} == {(0, 3)}


def test_of_a_long_queue_a_part_is_shown_and_all_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Watched(tmp_path, monkeypatch, max_num_queued_reqs=1000)
    server.generate(NO_DEADLINE, samples=MOST_SHOWN + 5)
    late = server.generate(NO_DEADLINE)
    server.step(late, 0.1)
    found = server.asked()
    assert (found.running, found.queued, len(found.requests)) == (1, MOST_SHOWN + 5, MOST_SHOWN)
    assert found.requests[0].state == "decoding"


def test_the_engine_is_unknown_until_it_is_there(server: Watched) -> None:
    server.client.worker.drain()
    start, body = ask(server.app, "GET", "/engine", headers=(("authorization", "Bearer the-secret-key"),))
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (503, "not_ready")


def test_the_manifest_is_read_once(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []

    def read(path: Path) -> Any:
        reads.append(path)
        return read_manifest(path)

    monkeypatch.setattr("llmctl.artifact.loader.read_manifest", read)

    async def several(card: EngineCard) -> list[dict[str, Any]]:
        return [*await asyncio.gather(*(card.read(tiny_engine) for _ in range(3))), await card.read(tiny_engine)]

    first, *others = asyncio.run(several(EngineCard()))
    assert reads == [tiny_engine]
    assert all(other is first for other in others)
    manifest = read_manifest(tiny_engine)
    assert (first["checksum"], first["graph"]["family"]) == (manifest.checksum, "llama")
    assert [(op["name"], op["kind"]) for op in first["ops"]] == [(op.name, op.kind) for op in manifest.graph.ops]
    assert sum(row["count"] for row in first["kernels"]) == len(manifest.kernels)


def test_an_engine_that_cannot_be_read_is_tried_again(tmp_path: Path, tiny_engine: Path) -> None:
    async def twice() -> str:
        card = EngineCard()
        with pytest.raises(EngineLoadError):
            await card.read(tmp_path / "gone")
        return str((await card.read(tiny_engine))["source"])

    assert asyncio.run(twice()) == read_manifest(tiny_engine).source.name
