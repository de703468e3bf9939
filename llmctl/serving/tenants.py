"""Whose a request is, for the fair queue; and who may ask to be served before others."""

from __future__ import annotations

import hashlib

from starlette.requests import Request

from llmctl.config import ServeConfig
from llmctl.engine.deadline import Deadline
from llmctl.errors import PermissionDeniedError, RequestError, UsageError
from llmctl.serving.keys import KEY_SCOPE, ServerKeys
from llmctl.serving.protocol import RequestFields

MOST_USER_CHARS = 128
"""Of a tenant's name: the engine keeps those of thousands. A longer ``user`` is known by its hash."""


def tenant_of(request: Request, body: RequestFields | None, keys: ServerKeys) -> str:
    """The API key (its name, never itself) where there are several; else the body's ``user``; else the client's
    address. ``body`` is None for a request whose body is not known.

    With one key or none ``user`` is the client's own word: it parts the users of one application, and is no defence
    against a client that makes up names.
    """
    if keys.several:
        return f"key {request.scope[KEY_SCOPE].name}"
    if body is not None and body.user:
        return f"user {body.user if len(body.user) <= MOST_USER_CHARS else _hashed(body.user)}"
    return f"address {request.client.host}" if request.client else ""


def _hashed(user: str) -> str:
    return f"blake2b:{hashlib.blake2b(user.encode(), digest_size=16).hexdigest()}"


def check_precedence(request: Request, body: RequestFields, config: ServeConfig, keys: ServerKeys) -> None:
    """Refuse a priority or a deadline that would not be honoured.

    Raises:
        RequestError: the policy knows none. PermissionDeniedError: there are several API keys, and this one may not.
    """
    for name in ("priority", "deadline"):
        if not getattr(body, name):
            continue
        if config.scheduling_policy == "fcfs":
            raise RequestError(f"{name}: the server runs with --scheduling-policy fcfs", param=name)
        if keys.several and not request.scope[KEY_SCOPE].may_set_priority:
            raise PermissionDeniedError(
                f"{name}: this API key may not set it",
                fix="use one of --priority-keys, or one with the word priority in --api-key-file",
                param=name,
            )


def deadline_of(body: RequestFields, default: Deadline) -> Deadline:
    """The request's deadline; the server's in what it leaves out.

    Raises:
        RequestError: not a deadline.
    """
    try:
        return Deadline.parse(body.deadline, "deadline").over(default)
    except UsageError as error:
        raise RequestError(error.message, param=error.param) from None
