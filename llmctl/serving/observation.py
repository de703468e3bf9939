"""One request to a generating endpoint while it lasts, and its record when it is over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request

from llmctl.engine.sampling_params import RANGES, SamplingParams
from llmctl.errors import LlmctlError
from llmctl.serving.context import ServerContext
from llmctl.serving.generation import Generation, RunningSequence
from llmctl.serving.intake import Prompt
from llmctl.serving.openai_errors import request_id_of, status_of
from llmctl.serving.protocol import RequestFields, SamplingFields
from llmctl.serving.request_record import Moments, RequestRecord
from llmctl.serving.responses import TextCount, UsageCount
from llmctl.serving.tenants import tenant_of

log = logging.getLogger("llmctl.serving")

_TRACE_HEADERS = ("traceparent", "tracestate")
_MOST_TRACE_CHARS = 512
"""A longer header is dropped: what W3C's Trace Context asks to be passed on at least."""


class Observation:
    """What is known of one request. ``end`` makes its record, once, and gives it to the server's observers.

    Attributes:
        body, prompts, usage, params, generation: filled in by the endpoint as they come to be.
        model: what answers; the endpoint's, too, where that is an adapter.
    """

    def __init__(self, request: Request, context: ServerContext) -> None:
        self.request = request
        self.context = context
        self.model = context.names[0]
        self.body: RequestFields | None = None
        self.prompts: Sequence[Prompt] = ()
        self.usage: UsageCount | None = None
        self.params: SamplingParams | None = None
        self.generation: Generation | None = None
        self._received = time.monotonic()
        self._ended = False

    def end(self, error: BaseException | None = None) -> None:
        """The request is over, because of ``error`` if there is one."""
        observers = self.context.observers
        if self._ended or not observers:
            return
        self._ended = True
        try:
            observers.tell(self._record(error))
        except Exception:  # who is answered is not to suffer from who watches
            log.exception("the record of a request is lost")

    def _record(self, error: BaseException | None) -> RequestRecord:
        shown = self.context.redactor.line
        status, said = self._outcome(error)
        return RequestRecord(
            request_id=shown(request_id_of(self.request.scope)),
            endpoint=self.request.scope["path"],  # a route that matched, and no part of it is a parameter
            model=self.model,
            tenant=shown(tenant_of(self.request, self.body, self.context.keys)),
            moments=self._moments(),
            status=status,
            error=said,
            trace_context=self._trace_context(),
            **self._asked(),
            **self._answered(),
        )

    def _asked(self) -> dict[str, Any]:
        body = self.body
        if body is None:
            return {}
        asked: dict[str, Any] = {"priority": body.priority or 0}
        if isinstance(body, SamplingFields):
            asked["stream"] = bool(body.stream)
            n = 1 if body.n is None else body.n
            asked["n"] = n if n in RANGES["n"] else None  # it may have thousands of digits
        if (params := self.params) is not None:
            asked |= {"max_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p}
        if self.context.observers.want_texts and self.prompts:
            asked["prompts"] = tuple(p.token_ids if p.text is None else p.text for p in self.prompts)
        return asked

    def _answered(self) -> dict[str, Any]:
        if self.usage is None or self.generation is None:
            return {}
        generation, usage = self.generation, self.usage
        unfinished = "abort" if generation.error is None else "error"
        return {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens(len(generation.sequences) // max(1, len(self.prompts))),
            "output_tokens": usage.completion_tokens,
            "finish_reasons": tuple(str(s.finish_reason or unfinished) for s in generation.sequences),
            "itl_seconds": _mean_itl(generation.sequences),
            "outputs": usage.texts() if isinstance(usage, TextCount) else None,
        }

    def _outcome(self, error: BaseException | None) -> tuple[int | None, str | None]:
        """HTTP status and error."""
        if isinstance(error, ClientDisconnect):
            return None, "client_disconnected"
        if isinstance(error, asyncio.CancelledError):
            return None, "cancelled"
        if error is not None:
            return status_of(error), _name(error)
        if self.generation is None:
            return 200, None
        streams = isinstance(self.body, SamplingFields) and self.body.stream
        if self.generation.aborted:
            return 200 if streams else None, "client_disconnected"
        return 200, None if self.generation.error is None else _name(self.generation.error)

    def _moments(self) -> Moments:
        now = time.monotonic()
        offset = time.time() - now
        if self.generation is None:
            return Moments(self._received, now, offset)
        sequences = self.generation.sequences
        finished = all(s.finish_reason is not None for s in sequences)
        return Moments(
            self._received,
            now,
            offset,
            arrival=self.generation.arrival,
            scheduled=min((s.scheduled_at for s in sequences if s.scheduled_at is not None), default=None),
            first_token=min((s.first_token for s in sequences if s.first_token is not None), default=None),
            last_token=max(s.last_token or now for s in sequences) if finished else None,
        )

    def _trace_context(self) -> dict[str, str]:
        shown, headers = self.context.redactor.line, self.request.headers
        return {
            name: ",".join(map(shown, headers[name].split(",")))
            for name in _TRACE_HEADERS
            if len(headers.get(name, "")) in range(1, _MOST_TRACE_CHARS + 1)
        }


def _name(error: BaseException) -> str:
    return (error.code or error.type) if isinstance(error, LlmctlError) else "internal_error"


def _mean_itl(sequences: Sequence[RunningSequence]) -> float | None:
    """Mean seconds between tokens of the finished sequences; None without two tokens of any."""
    pairs = [
        (s.last_token - s.first_token, s.output_tokens - 1)
        for s in sequences
        if s.output_tokens > 1 and s.first_token is not None and s.last_token is not None
    ]
    return sum(seconds for seconds, _ in pairs) / sum(gaps for _, gaps in pairs) if pairs else None
