"""The page and what it asks for, from a real server: bytes as they come, the engine, requests while they run."""

from __future__ import annotations

from pathlib import Path

import requests
from fixtures import ServerProcess

from llmctl.artifact.loader import read_manifest
from llmctl.serving.live_schema import EngineDocument, RunningRequest, RunningRequests
from llmctl.serving.page import FOLDER, SHELL_PATHS


def test_the_page_as_it_comes(server: ServerProcess) -> None:
    for path in (*SHELL_PATHS, "/ui/app.js"):
        file = FOLDER / (path.rpartition("/")[2] if path.startswith("/ui") else "index.html")
        answer = requests.get(server.url + path, timeout=10)
        assert (answer.status_code, answer.content) == (200, file.read_bytes())
        head = requests.head(server.url + path, timeout=10)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(file.stat().st_size)
        again = requests.get(server.url + path, headers={"If-None-Match": answer.headers["ETag"]}, timeout=10)
        assert (again.status_code, again.content) == (304, b"")
    answer = requests.get(server.url + "/docs/", timeout=10)
    assert (answer.url, answer.status_code) == (server.url + "/docs", 200)


def test_the_engine_that_runs(server: ServerProcess, tiny_engine: Path) -> None:
    answer = requests.get(server.url + "/engine", timeout=10)
    engine = EngineDocument.model_validate_json(answer.content)
    manifest = read_manifest(tiny_engine)
    assert engine.checksum == manifest.checksum
    assert engine.models == ["tiny-llama"]
    assert engine.graph.num_layers == 2
    assert sum(engine.graph.ops.values()) == len(engine.ops) == len(manifest.graph.ops)
    assert engine.limits.max_num_seqs == 128
    assert (engine.memory[0][0], engine.memory_note.partition(":")[0]) == ("memory", "budget")
    assert any(row[0] == "total" for row in engine.memory)
    assert engine.chat


def test_a_request_while_it_runs(server: ServerProcess) -> None:
    body = {"prompt": "é", "max_tokens": 400, "temperature": 0, "stream": True, "ignore_eos": True}
    rows: list[RunningRequest] = []
    for _ in range(20):  # on a busy machine it may be over before the second connection asks
        with requests.post(
            server.url + "/v1/completions", json=body, headers={"X-Request-Id": "watched"}, stream=True, timeout=30
        ) as stream:
            pieces = stream.iter_content(1)  # the stream ends with it
            next(pieces)
            found = RunningRequests.model_validate_json(requests.get(server.url + "/requests", timeout=10).content)
        if rows := [row for row in found.requests if row.id == "watched"]:
            break
    (row,) = rows
    assert (row.state, row.max_tokens) == ("decoding", 400)
    assert 1 <= row.output_tokens < 400
    assert row.ttft_seconds is not None
