"""Whose a request is, and whether it may set a priority."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from llmctl.config import ServeConfig
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import PermissionDeniedError, RequestError
from llmctl.serving.engine_loop import _request
from llmctl.serving.keys import KEY_SCOPE, ApiKey, ServerKeys, key_digest
from llmctl.serving.middleware import ApiKeyGate
from llmctl.serving.protocol import CompletionRequest
from llmctl.serving.tenants import check_priority, tenant_of
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


def test_no_two_kinds_of_tenants_share_a_name() -> None:
    assert tenant_of(request(), body(user="10.0.0.7"), NONE) != tenant_of(request(), body(), NONE)


def test_with_one_key_or_none_everyone_may_set_a_priority() -> None:
    for keys in (NONE, ONE, ServerKeys(None, "m")):
        check_priority(request(**{KEY_SCOPE: key(0)}), body(priority=3), ServeConfig(), keys)


def test_with_several_keys_only_some_may() -> None:
    for number in (0, 2):
        check_priority(request(**{KEY_SCOPE: key(number)}), body(priority=-1), ServeConfig(), TWO)
    check_priority(request(**{KEY_SCOPE: key(1)}), body(priority=0), ServeConfig(), TWO)
    check_priority(request(**{KEY_SCOPE: key(1)}), body(priority=None), ServeConfig(), TWO)
    with pytest.raises(PermissionDeniedError, match="this API key may not set it") as caught:
        check_priority(request(**{KEY_SCOPE: key(1)}), body(priority=-1), ServeConfig(), TWO)
    assert (caught.value.http_status, caught.value.param) == (403, "priority")
    with pytest.raises(PermissionDeniedError):
        check_priority(request(**{KEY_SCOPE: ApiKey("0", b"")}), body(priority=-1), ServeConfig(), ServerKeys("k,l"))


def test_first_come_first_served_knows_no_priority() -> None:
    with pytest.raises(RequestError, match="--scheduling-policy fcfs"):
        check_priority(request(), body(priority=1), ServeConfig(scheduling_policy="fcfs"), NONE)


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


def test_the_tenant_reaches_the_engine() -> None:
    sent = AddRequests([WireRequest("r", [1], SamplingParams(), 0, None, 0.0, "user u")])
    command = decode_command(encode(sent))
    assert isinstance(command, AddRequests)
    assert _request(command.requests[0]).tenant == "user u"
