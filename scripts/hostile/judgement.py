"""Whether an answer is one that is allowed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from hostile.wire import CLOSED, KEPT_BYTES, SILENT, Answer

ERROR_FIELDS = {"message", "type", "param", "code"}
KILL_CODES = frozenset({"not_ready", "engine_dead", "request_quarantined"})
"""Errors that a request may meet whose worker dies (docs/serving.md)."""
_FAULTS_KEPT = 20
_NAMES = {CLOSED: "closed", SILENT: "silent"}


class Spans:
    """Times between which something held, on ``time.monotonic``."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self._since: float | None = None

    def begin(self, now: float) -> None:
        """It holds from now on."""
        self._since = now

    def end(self, now: float) -> None:
        """It held until now."""
        if self._since is not None:
            self._spans.append((self._since, now))
            self._since = None

    def meet(self, begin: float, end: float) -> bool:
        """Whether it held at any time between."""
        return (self._since is not None and end >= self._since) or any(a <= end and begin <= b for a, b in self._spans)


@dataclass
class Tally:
    """What became of one kind of requests. answers: by status; worst: seconds until the slowest answer began; spans:
    (begin, end) of every play."""

    answers: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    faults: int = 0
    examples: list[str] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        self.count(_NAMES.get(answer.status, str(answer.status)), answer.seconds)

    def count(self, name: str, seconds: float) -> None:
        """Count an answer by its name."""
        self.answers[name] += 1
        self.worst = max(self.worst, seconds)

    def fault(self, what: str) -> None:
        """Note what must not be; the first few are kept."""
        self.faults += 1
        if len(self.examples) < _FAULTS_KEPT:
            self.examples.append(what)


def fault_of(answer: Answer, allowed: Collection[int], kills: Spans) -> str | None:
    """What is wrong with an answer to an attack; None if nothing is."""
    killed = kills.meet(answer.sent, answer.end)
    status = _NAMES.get(answer.status, str(answer.status))
    if answer.status not in allowed and not (killed and answer.status in (500, 503)):
        return f"expected {_listed(allowed)}, found {status}: {answer.body[:200]!r}"
    if answer.status <= 0:
        return None
    if not answer.request_id:
        return f"{status} without X-Request-Id"
    if answer.status >= 400:
        return _refusal_fault(answer, killed)
    return _success_fault(answer, killed)


def _listed(allowed: Collection[int]) -> str:
    return ", ".join(_NAMES.get(status, str(status)) for status in sorted(allowed))


def _refusal_fault(answer: Answer, killed: bool) -> str | None:
    document = answer.document()
    error = document.get("error") if isinstance(document, dict) else None
    if (
        not isinstance(error, dict)
        or set(error) != ERROR_FIELDS
        or not answer.content_type.startswith("application/json")
    ):
        return f"{answer.status} not in OpenAI's shape: {answer.body[:200]!r}"
    if not (isinstance(error["message"], str) and error["message"] and "\n" not in error["message"]):
        return f"{answer.status}: expected a message of one line, found {str(error['message'])[:200]!r}"
    if answer.status in (500, 503) and not (killed and error["code"] in KILL_CODES):
        return f"{answer.status} while no worker died: {answer.body[:200]!r}"
    return None


def _success_fault(answer: Answer, killed: bool) -> str | None:
    if not answer.whole:
        return f"{answer.status}: the answer has no end: {answer.tail[-200:]!r}"
    if not answer.content_type.startswith("text/event-stream"):
        is_json = answer.content_type.startswith("application/json") and 0 < len(answer.body) < KEPT_BYTES
        return f"{answer.status}: not JSON: {answer.body[:200]!r}" if is_json and answer.document() is None else None
    if not answer.tail.endswith(b"data: [DONE]\n\n"):
        return f"a stream without [DONE]: {answer.tail[-200:]!r}"
    last = answer.tail.split(b"\n\n")[-3].removeprefix(b"data: ")
    if last.startswith(b'{"error"') and not (killed and json.loads(last)["error"].get("code") in KILL_CODES):
        return f"a stream that ended in an error: {last[:200]!r}"
    return None
