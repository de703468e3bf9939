"""What is said of a request to a generating endpoint when it is over: one record, for whoever observes requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moments:
    """When things happened, seconds on ``time.monotonic``, as the API process saw them; None: they did not.

    That is a message later than the engine's own times, which a request that is ended from here never gets.

    Attributes:
        received: its headers were there. arrival: it was translated and went to the engine.
        scheduled: its first sequence was in a step. first_token: the first of any sequence.
        last_token: the last of all sequences, once all are finished. ended: the answer was complete, or given up.
        unix_offset: what makes seconds since 1970 of them.
    """

    received: float
    ended: float
    unix_offset: float
    arrival: float | None = None
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def queue_seconds(self) -> float | None:
        """Arrival to scheduled."""
        return _between(self.arrival, self.scheduled)

    @property
    def ttft_seconds(self) -> float | None:
        """Arrival to first token."""
        return _between(self.arrival, self.first_token)

    @property
    def e2e_seconds(self) -> float | None:
        """Arrival to last token; to its end, where some sequence never had one."""
        return _between(self.arrival, self.ended if self.last_token is None else self.last_token)

    def phases(self) -> Iterator[tuple[str, float, float]]:
        """Name, begin and end of what it went through: ``queue``, ``prefill``, ``decode``, as far as it came."""
        last = self.ended if self.last_token is None else self.last_token
        borders = (self.arrival, self.scheduled, self.first_token, last)
        for name, begin, end in zip(("queue", "prefill", "decode"), borders, borders[1:], strict=False):
            if begin is not None:
                yield name, begin, last if end is None else end


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(0.0, end - begin)


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished, failed or refused request. Text of the client's that is in it is redacted, ``prompts`` and
    ``outputs`` apart. What a refused request did not come to say is None.

    Attributes:
        tenant: whose it is, see ``tenants``. n: samples of each prompt. max_tokens: of each sample, as settled.
        prompt_tokens, cached_tokens, output_tokens: as in the answer's ``usage``.
        finish_reasons: of each sequence: ``stop``, ``length``, ``abort`` or ``error``.
        status: of the HTTP answer; None: nobody was there for one. error: the code, or else the type, of what ended it.
        itl_seconds: mean time between tokens of its finished sequences.
        trace_context: the headers ``traceparent`` and ``tracestate``, as far as it brought them.
        prompts, outputs: texts, or ids of a prompt that came as ids; None unless texts are wanted.
    """

    request_id: str
    endpoint: str
    model: str
    tenant: str
    moments: Moments
    status: int | None
    error: str | None
    trace_context: Mapping[str, str]
    stream: bool | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    priority: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reasons: tuple[str, ...] = ()
    itl_seconds: float | None = None
    prompts: tuple[str | list[int], ...] | None = None
    outputs: tuple[str, ...] | None = None
