"""Whether a server is ready to be measured: it says so, and it has answered a request."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmctl.bench.client import Target, run_load
from llmctl.bench.endpoint import Endpoint, call, open_session
from llmctl.bench.metrics import RequestRecord
from llmctl.bench.workloads import WorkItem
from llmctl.errors import LlmctlError, UsageError

if TYPE_CHECKING:
    import aiohttp

FIRST_REQUEST = WorkItem("Hello", 1, 1)
_POLL_SECONDS = 0.2
_NEWS_EVERY_SECONDS = 10.0
_LEAST_PATIENCE = 10.0

# llmctl's and others' "a request would be computed now", then vLLM's and llama.cpp's, then what all have.
_PATHS = ("/ready", "/health", "/v1/models")
# Failures that pass when a server has loaded; any other is an answer, and the load's to report.
_NOT_YET = frozenset(("connect", "connection", "cut", "timeout", "http_429", "http_502", "http_503", "http_504"))

Tell = Callable[[str], None]


@dataclass(frozen=True)
class ServerFacts:
    """What the server says of itself.

    Attributes:
        ready_wait: seconds until it was ready. untold: why it did not say which models it has; None: it did.
    """

    models: tuple[str, ...]
    version: str | None
    ready_wait: float
    untold: str | None = None

    def lacks(self, model: str) -> bool:
        """Whether it names its models, and this is none of them."""
        return bool(self.models) and model not in self.models


def choose_model(named: str | None, server: ServerFacts, base_url: str, tell: Tell | None = None) -> str:
    """The model to ask for: the one that is named, else the server's first.

    Args:
        tell: is told of a named one that the server does not list: a gateway lists some of its names. None refuses it.

    Raises:
        UsageError: the server has no such model, or none is named and it names none.
    """
    if not server.models:  # one that does not tell may have any
        if named:
            return named
        raise UsageError(f"{base_url}/v1/models: names no model", fix="give --model NAME", param="model")
    if named and server.lacks(named):
        if tell is None:
            raise unknown_model(named, server, base_url)
        tell(
            f"warning: {base_url}/v1/models does not list '{named}': it has {_some(server.models)}; asked all the same"
        )
    return named or server.models[0]


def unknown_model(named: str, server: ServerFacts, base_url: str) -> UsageError:
    """The error to raise of a model that the server does not have."""
    return UsageError(
        f"{base_url}: no model '{named}': it has {_some(server.models)}",
        fix=f"--model {shlex.quote(server.models[0])}",
        param="model",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5])


class Patience:
    """A limit on waiting, shared by all that is waited for; says now and then what that is."""

    def __init__(self, what: str, seconds: float, tell: Tell) -> None:
        self._what, self.seconds, self._tell = what, seconds, tell
        self._start = time.monotonic()
        self._news = self._start

    @property
    def waited(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return max(0.0, self.seconds - self.waited)

    async def wait(self, reason: str) -> None:
        """A little, because of ``reason``.

        Raises:
            LlmctlError: the limit is reached.
        """
        if not self.left:
            after = f"not ready after {self.waited:.0f} s: " if self.seconds else ""
            raise LlmctlError(
                f"{self._what}: {after}{reason}",
                fix="start one with 'llmctl serve --model demo:smollm2-135m', or wait with --ready-timeout SECONDS",
            )
        if time.monotonic() >= self._news:
            self._news = time.monotonic() + _NEWS_EVERY_SECONDS
            self._tell(f"waiting for {self._what}, {self.left:.0f} s more (--ready-timeout): {reason}")
        await asyncio.sleep(min(_POLL_SECONDS, self.left))


def await_server(endpoint: Endpoint, patience: Patience) -> ServerFacts:
    """Wait until the server says that it is ready, and ask for its models and version.

    The first of ``/ready``, ``/health`` and ``/v1/models`` that the server has is what says so.

    Raises:
        LlmctlError: it does not within the patience (0 seconds: one try).
    """
    return asyncio.run(_await_server(endpoint, patience))


async def _await_server(endpoint: Endpoint, patience: Patience) -> ServerFacts:
    async with open_session(endpoint) as session:
        while (reason := await _why_not(session, endpoint.base_url)) is not None:
            await patience.wait(reason)
        waited = patience.waited
        status, models, _ = await call(session, "GET", endpoint.base_url + "/v1/models")
        _, version, _ = await call(session, "GET", endpoint.base_url + "/version")
    rows = models.get("data") if status == 200 and isinstance(models, dict) else None
    names = tuple(str(row["id"]) for row in rows or () if isinstance(row, dict) and "id" in row)
    said = version.get("version") if isinstance(version, dict) else None
    untold = None if status == 200 else f"{endpoint.base_url}/v1/models: HTTP {status}{_details(models)}"
    return ServerFacts(names, str(said) if said is not None else None, waited, untold)


async def _why_not(session: aiohttp.ClientSession, base_url: str) -> str | None:
    """Why the server is not ready; None: it is."""
    for path in _PATHS:
        status, answer, reason = await call(session, "GET", base_url + path)
        if status == 0:
            return f"no server answers: {reason}"
        if status == 200:
            return None
        if status >= 500:
            return f"{path} says HTTP {status}{_details(answer)}"
    return None  # it answers, and has none of these or wants a key that it is not given: the first request will tell


def _details(answer: Any) -> str:
    reason = answer.get("reason") or answer.get("error") if isinstance(answer, dict) else None
    if isinstance(reason, dict):  # OpenAI's
        reason = reason.get("message")
    return f": {' '.join(str(reason).split())[:200]}" if reason else ""


def await_answer(target: Target, patience: Patience, tell: Tell) -> RequestRecord:
    """Send one request, of one token, until the server answers it; a refusal that waiting cannot mend is told.

    Returns:
        The request that was answered, or refused so.

    Raises:
        LlmctlError: no answer within the patience (0 seconds: one try).
    """
    while True:
        asked = replace(target, timeout=min(target.timeout, max(_LEAST_PATIENCE, patience.left)))
        load = asyncio.run(run_load(asked, [FIRST_REQUEST], [0.0], None))
        if load.interrupted:
            raise KeyboardInterrupt
        (record,) = load.records
        if record.error_kind not in _NOT_YET:
            break
        asyncio.run(patience.wait(f"the first request: {record.error}"))
    if record.error is not None:
        tell(f"warning: the first request failed: {record.error}")
    return record
