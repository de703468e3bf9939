"""Whose a request is, and whether it may set a priority or a deadline."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from llmctl.config import ServeConfig
from llmctl.engine.deadline import Deadline
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import PermissionDeniedError, RequestError
from llmctl.serving.engine_loop import _request
from llmctl.serving.keys import KEY_SCOPE, ApiKey, ServerKeys, key_digest
from llmctl.serving.middleware import ApiKeyGate
from llmctl.serving.protocol import CompletionRequest
from llmctl.serving.tenants import MOST_USER_CHARS, check_precedence, deadline_of, tenant_of
from llmctl.serving.wire import AddRequests, WireRequest, decode_command, encode

NONE, ONE, TWO = ServerKeys(None, None), ServerKeys("k", None), ServerKeys("k, l", "m,k")


def key(number: int) -> ApiKey | None:
    return TWO.find(b"klm"[number : number + 1])


def request(**scope: Any) -> Request:
    return Request({"type": "http", "client": ("10.0.0.7", 4242), **scope})


def body(**fields: Any) -> CompletionRequest:
    return CompletionRequest(prompt="x", **fields)


def test_a_tenant_is_a_key_else_a_user_else_an_address() -> None:
    assert tenant_of(request(**{KEY_SCOPE: key(1)}), body(user="u"), TWO) == "key 1"
    assert tenant_of(request(**{KEY_SCOPE: key(0)}), body(user="u"), ONE) == "user u"
    assert tenant_of(request(), body(user="u"), NONE) == "user u"
    assert tenant_of(request(), body(), NONE) == "address 10.0.0.7"
    assert tenant_of(request(client=None), body(user=""), NONE) == ""


def test_the_name_of_a_tenant_is_bounded() -> None:
    """The engine keeps the names of thousands."""
    names = {tenant_of(request(), body(user=user), NONE) for user in ("u" * 10**6, "u" * 10**6 + "v", "é" * 129)}
    assert len(names) == 3
    assert max(map(len, names)) <= len("user ") + MOST_USER_CHARS
    assert tenant_of(request(), body(user="u" * MOST_USER_CHARS), NONE) == "user " + "u" * MOST_USER_CHARS


def test_no_two_kinds_of_tenants_share_a_name() -> None:
    assert tenant_of(request(), body(user="10.0.0.7"), NONE) != tenant_of(request(), body(), NONE)


PRECEDENCE = pytest.mark.parametrize(("name", "value"), [("priority", -1), ("deadline", "ttft:300")])


@PRECEDENCE
def test_with_one_key_or_none_everyone_may_set_it(name: str, value: object) -> None:
    for keys in (NONE, ONE, ServerKeys(None, "m")):
        check_precedence(request(**{KEY_SCOPE: key(0)}), body(**{name: value}), ServeConfig(), keys)


@PRECEDENCE
def test_with_several_keys_only_some_may(name: str, value: object) -> None:
    for number in (0, 2):
        check_precedence(request(**{KEY_SCOPE: key(number)}), body(**{name: value}), ServeConfig(), TWO)
    check_precedence(request(**{KEY_SCOPE: key(1)}), body(priority=0), ServeConfig(deadline="ttft:300"), TWO)
    check_precedence(request(**{KEY_SCOPE: key(1)}), body(**{name: None}), ServeConfig(), TWO)
    with pytest.raises(PermissionDeniedError, match=f"{name}: this API key may not set it") as caught:
        check_precedence(request(**{KEY_SCOPE: key(1)}), body(**{name: value}), ServeConfig(), TWO)
    assert (caught.value.http_status, caught.value.param) == (403, name)
    with pytest.raises(PermissionDeniedError):
        check_precedence(
            request(**{KEY_SCOPE: ApiKey("0", b"")}), body(**{name: value}), ServeConfig(), ServerKeys("k,l")
        )


@PRECEDENCE
def test_first_come_first_served_knows_none(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name}: the server runs with --scheduling-policy fcfs"):
        check_precedence(request(), body(**{name: value}), ServeConfig(scheduling_policy="fcfs"), NONE)


def test_a_request_takes_from_the_servers_deadline_what_it_leaves_out() -> None:
    default = Deadline(0.3, 0.05)
    assert deadline_of(body(), default) == default
    assert deadline_of(body(deadline="itl:100"), default) == Deadline(0.3, 0.1)
    with pytest.raises(RequestError, match="deadline: expected ttft:MS") as caught:
        deadline_of(body(deadline=""), default)
    assert (caught.value.http_status, caught.value.param) == (400, "deadline")


def test_keys_are_counted_once() -> None:
    assert [len(keys) for keys in (NONE, ONE, TWO)] == [0, 1, 3]
    found = [TWO.find(token) for token in (b"k", b"l", b"m", b"", b"kk")]
    assert found == [
        ApiKey("0", key_digest(b"k"), may_set_priority=True),
        ApiKey("1", key_digest(b"l")),
        ApiKey("2", key_digest(b"m"), may_set_priority=True),
        None,
        None,
    ]
    assert NONE.find(b"") is None


@pytest.mark.parametrize(
    ("header", "seen"),
    [(b"Bearer l", "1"), (b"bearer  m ", "2"), (b"Bearer wrong", None), (b"Basic k", None), (b"", None)],
)
def test_the_gate_says_which_key_came(header: bytes, seen: str | None) -> None:
    reached: list[str] = []
    status: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        reached.append(scope[KEY_SCOPE].name)

    async def send(message: Message) -> None:
        status.append(message.get("status", 0))

    async def receive() -> Message:
        raise AssertionError

    scope = {"type": "http", "path": "/v1/completions", "headers": [(b"authorization", header)]}
    asyncio.run(ApiKeyGate(app, TWO)(scope, receive, send))
    assert reached == ([] if seen is None else [seen])
    assert (status[:1] == [401]) is (seen is None)


def test_a_key_with_white_space_is_none(tmp_path: Path) -> None:
    """No log would be cleared of it: what is searched for a key is words."""
    file = tmp_path / "keys"
    file.write_text(f"spaced sha256:{key_digest(b'two words').hex()}\n")
    status: list[int] = []

    async def send(message: Message) -> None:
        status.append(message.get("status", 0))

    scope = {"type": "http", "path": "/v1/models", "headers": [(b"authorization", b"Bearer two words")]}
    asyncio.run(ApiKeyGate(None, ServerKeys(file=file))(scope, None, send))  # type: ignore[arg-type]
    assert status[0] == 401


def test_the_tenant_and_the_deadline_reach_the_engine() -> None:
    sent = AddRequests([WireRequest("r", [1], SamplingParams(), 0, None, 0.0, "user u", Deadline(0.3))])
    command = decode_command(encode(sent))
    assert isinstance(command, AddRequests)
    made = _request(command.requests[0])
    assert (made.tenant, made.deadline) == ("user u", Deadline(0.3))
