"""The socket between the processes, and the messages that cross it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zmq

from llmctl.engine.llm_engine import EngineStats, TokenOutput
from llmctl.engine.request import FinishReason, RequestTimes
from llmctl.engine.sampling import SamplingParams
from llmctl.engine.step import TokenLogprobs
from llmctl.errors import CapacityError, ExitCode, ModelNotFoundError, QueueFullError
from llmctl.serving.transport import Address, connect, listen
from llmctl.serving.wire import (
    AddRequests,
    ErrorInfo,
    Refused,
    StepMessage,
    WireRequest,
    decode_command,
    decode_event,
    encode,
)

STATS = EngineStats(1, 2, 0.5, 3, 4, 5, 6, 7, 8, 9)


@pytest.fixture
def context() -> zmq.Context[zmq.Socket[bytes]]:
    return zmq.Context.instance()


@pytest.mark.parametrize("allow_ipc", [True, False])
def test_messages_go_both_ways(
    context: zmq.Context[zmq.Socket[bytes]], allow_ipc: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    listener = listen(context, allow_ipc=allow_ipc)
    assert listener.address.url.startswith("ipc://" if allow_ipc else "tcp://127.0.0.1:")
    peer = connect(context, listener.address)
    try:
        peer.send(b"up")
        assert listener.socket.poll(5000)
        assert listener.socket.recv() == b"up"
        listener.forget_folder()
        assert list(tmp_path.iterdir()) == []
        listener.socket.send(b"down")  # the connection outlives its file
        assert peer.poll(5000)
        assert peer.recv() == b"down"
    finally:
        peer.close(linger=0)
        listener.close()


def test_the_ipc_folder_is_private(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    listener = listen(context)
    try:
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
    finally:
        listener.close()
    assert list(tmp_path.iterdir()) == []


def test_a_long_temporary_path_falls_back_to_tcp(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    listener = listen(context)
    try:
        assert listener.address.url.startswith("tcp://127.0.0.1:")
        assert list(deep.iterdir()) == []
    finally:
        listener.close()


@pytest.mark.skipif(not zmq.has("curve"), reason="libzmq without CURVE")
def test_tcp_needs_the_servers_key(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    listener = listen(context, allow_ipc=False)
    stranger_key = zmq.curve_keypair()[0].decode()
    peers = [connect(context, Address(listener.address.url, key)) for key in (None, stranger_key)]
    try:
        for peer in peers:
            peer.send(b"let me in", zmq.NOBLOCK)
        assert not listener.socket.poll(300)
        peers.append(connect(context, listener.address))  # and the one with the key still gets in
        peers[-1].send(b"it is me")
        assert listener.socket.poll(5000)
        assert listener.socket.recv() == b"it is me"
    finally:
        for peer in peers:
            peer.close(linger=0)
        listener.close()


def test_a_request_survives_the_wire() -> None:
    params = SamplingParams(
        temperature=0.5,
        logit_bias={3: -1.5},
        seed=2**64 - 1,
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        bad_words=((1,), (2, 3)),
        allowed_token_ids=(4,),
        max_tokens=9,
        logprobs=2,
    )
    command = AddRequests([WireRequest("id", [1, 2, 3], params, -4, "salt", 12.5)])
    assert decode_command(encode(command)) == command


def test_a_step_survives_the_wire() -> None:
    scores = np.array([-1.5, -0.25], np.float32)
    output = TokenOutput(
        "id",
        (5, 6),
        (TokenLogprobs(-0.5, 1, (5, 7), (-0.5, -2.0)), TokenLogprobs(-9.0, 3)),
        FinishReason.STOP,
        6,
        4,
        scores,
        RequestTimes(1.0, 2.0, 3.0, 4.0),
    )
    refused = [Refused(["x"], ErrorInfo.of(QueueFullError("full")))]
    event = decode_event(encode(StepMessage([output, TokenOutput("other")], STATS, refused)))
    assert isinstance(event, StepMessage)
    got = event.outputs[0]
    assert got.prompt_scores is not None
    assert got.prompt_scores.tolist() == scores.tolist()
    for name in (
        "request_id",
        "new_token_ids",
        "logprobs",
        "finish_reason",
        "stop_reason",
        "num_cached_tokens",
        "times",
    ):
        assert getattr(got, name) == getattr(output, name), name
    assert (event.outputs[1], event.stats, event.refused) == (TokenOutput("other"), STATS, refused)


@pytest.mark.parametrize(
    "error",
    [CapacityError("too long", fix="shorten", param="prompt"), QueueFullError("full"), ModelNotFoundError("no such")],
)
def test_an_error_keeps_its_face(error: CapacityError | QueueFullError | ModelNotFoundError) -> None:
    again = ErrorInfo.of(error).error()
    for name in ("message", "fix", "param", "http_status", "type", "code", "exit_code"):
        assert getattr(again, name) == getattr(error, name), name
    assert isinstance(again.exit_code, ExitCode)
