"""Requests that wait in the worker, outside the scheduler, until their grammars are compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from llmctl.errors import LlmctlError, QueueFullError, RequestError
from llmctl.serving.wire import WireRequest
from llmctl.structured.compiler import CompiledGrammar, GrammarCompiler
from llmctl.structured.spec import GrammarSpec

COMPILE_SECONDS = 10.0
"""A request whose grammar takes longer is refused: as the client's fault if it had a processor half of that time."""
_CHECK_MS = 200


@dataclass(frozen=True, slots=True)
class _Waiting:
    """The sequences of one HTTP request; ``deadline`` on ``time.monotonic``. ``forcing``: see ``GrammarCompiler``."""

    spec: GrammarSpec
    forcing: bool
    requests: list[WireRequest]
    future: Future[CompiledGrammar]
    deadline: float


class GrammarQueue:
    """Requests in the order in which they came. True while any waits.

    Args:
        wake: called from another thread when a grammar is done.
    """

    def __init__(self, compiler: GrammarCompiler, wake: Callable[[], None]) -> None:
        self._compiler = compiler
        self._wake = wake
        self._waiting: list[_Waiting] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, spec: GrammarSpec, requests: list[WireRequest]) -> None:
        """Have a grammar compiled for the sequences of one HTTP request."""
        forcing = not requests[0].params.singles_out_tokens
        future = self._compiler.submit(spec, forcing=forcing)
        self._waiting.append(_Waiting(spec, forcing, requests, future, time.monotonic() + COMPILE_SECONDS))
        future.add_done_callback(lambda _: self._wake())

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget sequences that were aborted."""
        if self._waiting:
            gone = set(request_ids)
            for entry in self._waiting:
                entry.requests[:] = [wire for wire in entry.requests if wire.request_id not in gone]

    def take(self) -> Iterator[tuple[list[WireRequest], CompiledGrammar | LlmctlError]]:
        """What waits no longer, with its grammar or the reason why it has none."""
        now = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            if entry.future.done() or now >= entry.deadline:
                if entry.requests:
                    yield entry.requests, self._outcome(entry)
            else:
                self._waiting.append(entry)

    def _outcome(self, entry: _Waiting) -> CompiledGrammar | LlmctlError:
        param, future = entry.spec.param, entry.future
        if not future.done():
            if not future.running():
                return QueueFullError("too many grammars are being compiled", fix="try again later")
            busy = self._compiler.processor_seconds(entry.spec, forcing=entry.forcing)
            if busy < COMPILE_SECONDS / 2:
                return QueueFullError(
                    f"the machine is busy: in {COMPILE_SECONDS:g} s the grammar had a processor for {busy:.1f} s",
                    fix="try again later",
                )
            return RequestError(f"{param}: took longer than {COMPILE_SECONDS:g} s to compile", param=param)
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, LlmctlError):
            return _named(error, param)
        return RequestError(f"{param}: could not be compiled: {' '.join(str(error).split())[:200]}", param=param)

    def wait_ms(self, most: int) -> int:
        """How long the worker may wait for commands: as long as it would, or until a deadline is to be looked at."""
        return min(most, _CHECK_MS) if self._waiting else most

    def close(self) -> None:
        """Compile nothing more."""
        self._compiler.close()


def _named(error: LlmctlError, param: str) -> LlmctlError:
    """A refusal under the name of this request's field: another's may have been the first to give the grammar."""
    if error.param is None or error.param == param:
        return error
    return RequestError(error.message.replace(f"{error.param}:", f"{param}:", 1), fix=error.fix, param=param)
