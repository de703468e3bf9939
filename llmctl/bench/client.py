"""The load generator: sends a workload to an OpenAI-compatible streaming endpoint and timestamps what comes back.

It shares the machine with the server under test more often than not, so it does little a chunk: bodies are encoded
before the run, chunks are timestamped as they are read from the socket and decoded into three fields.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from llmctl.bench.metrics import RequestRecord
from llmctl.bench.sse import DONE, SseLines, decode_event, given, token_text
from llmctl.bench.workloads import WorkItem

if TYPE_CHECKING:
    import aiohttp

_ABORTED = frozenset({"abort", "error", "cancelled"})
_ERROR_CHARS = 300


@dataclass(frozen=True)
class Target:
    """Where and how to send.

    Attributes:
        url: the endpoint's full address. chat: whether it takes messages.
        body: fields of every request beside the prompt and max_tokens.
        keep_alive: reuse connections; otherwise each request opens its own.
        timeout: seconds for a whole request.
        keep_text: keep what was answered. keep_chunks: and the text of every chunk, for its tokens to be counted.
        count_chunks: ask for the number of tokens so far with every chunk.
    """

    url: str
    model: str
    chat: bool
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    keep_alive: bool = False
    timeout: float = 600.0
    verify_tls: bool = True
    keep_text: bool = False
    keep_chunks: bool = False
    count_chunks: bool = False

    def encode(self, item: WorkItem) -> bytes:
        """The request's JSON body."""
        body: dict[str, Any] = {"model": self.model}
        if self.chat:
            body["messages"] = list(item.messages or ({"role": "user", "content": item.prompt},))
        else:
            body["prompt"] = item.prompt
        options = {"include_usage": True} | ({"continuous_usage_stats": True} if self.count_chunks else {})
        body |= {"max_tokens": item.output_tokens, "stream": True, "stream_options": options}
        return msgspec.json.encode({**body, **self.body})


@dataclass(frozen=True)
class LoadRun:
    """What one run of a workload gave.

    Attributes:
        records: one a request, in workload order; of an interrupted run, those that had ended.
        duration: seconds from the start of the load to the end of its last request.
        cpu_seconds: processor time of this process meanwhile.
        max_send_lag: the longest delay, in seconds, of this client behind the arrival process; not counting waits
            for --max-concurrency.
        not_sent: requests that have no record: their turn had not come when the time was up; of an interrupted run,
            those under way too.
    """

    records: list[RequestRecord]
    duration: float
    cpu_seconds: float
    max_send_lag: float
    not_sent: int = 0
    interrupted: bool = False


async def run_load(
    target: Target,
    items: Sequence[WorkItem],
    arrivals: Sequence[float],
    max_concurrency: int | None,
    on_done: Callable[[RequestRecord], None] | None = None,
    *,
    on_sent: Callable[[], None] | None = None,
    max_seconds: float | None = None,
) -> LoadRun:
    """Send every item at its arrival time (seconds from now), at most ``max_concurrency`` under way at once.

    A Ctrl-C (of ``asyncio.run``: a cancelled task) ends it early and is not raised: what has ended is returned.

    Args:
        max_seconds: after so many no more requests are sent; those under way are seen to their end.
    """
    import aiohttp

    records = [RequestRecord(i, item.input_tokens, item.output_tokens) for i, item in enumerate(items)]
    bodies = [target.encode(item) for item in items]
    slots: contextlib.AbstractAsyncContextManager[Any]
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    lags = [0.0]

    async def one(record: RequestRecord) -> None:
        lags.append(time.perf_counter() - record.scheduled)
        async with slots:
            if time.perf_counter() >= stop:
                return
            if on_sent is not None:
                on_sent()
            await send(session, target, bodies[record.index], record)
        if on_done is not None:
            on_done(record)

    interrupted = False
    connector = aiohttp.TCPConnector(limit=0, force_close=not target.keep_alive, ssl=target.verify_tls)
    timeout = aiohttp.ClientTimeout(total=target.timeout)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers={"Content-Type": "application/json", **target.headers}
    ) as session:
        with quiet_collector():
            cpu, start = time.process_time(), time.perf_counter()
            stop = math.inf if max_seconds is None else start + max_seconds
            try:
                async with asyncio.TaskGroup() as tasks:
                    for record, arrival in zip(records, arrivals, strict=True):
                        record.scheduled = start + arrival
                        if record.scheduled >= stop:
                            break
                        delay = record.scheduled - time.perf_counter()
                        if delay > 0:
                            await asyncio.sleep(delay)
                        tasks.create_task(one(record))
            except asyncio.CancelledError:
                interrupted = True
            cpu_seconds = time.process_time() - cpu
    kept = [r for r in records if (r.end if interrupted else r.start)]
    duration = max((r.end for r in kept), default=start) - start
    return LoadRun(kept, duration, cpu_seconds, max(lags), len(records) - len(kept), interrupted)


async def send(session: aiohttp.ClientSession, target: Target, body: bytes, record: RequestRecord) -> None:
    """Send one request and fill its record; whatever goes wrong becomes the record's error."""
    import aiohttp

    stream = _Stream(record, target)
    record.start = time.perf_counter()
    try:
        async with session.post(target.url, data=body) as response:
            if response.status != 200:
                text = (await response.text(errors="replace")).strip()
                stream.fail(f"http_{response.status}", f"HTTP {response.status}: {_shorten(text)}")
            else:
                await _read_stream(response, stream, drain=target.keep_alive)
    except TimeoutError:
        stream.fail("timeout", f"no end after {target.timeout:g} s")
    except aiohttp.ClientConnectorError as error:
        stream.fail("connect", f"cannot connect: {error}")
    except (aiohttp.ClientError, OSError) as error:
        stream.fail("cut" if record.chunk_times else "connection", f"{type(error).__name__}: {_shorten(str(error))}")
    record.end = record.end or time.perf_counter()


async def _read_stream(response: aiohttp.ClientResponse, stream: _Stream, drain: bool) -> None:
    lines = SseLines()
    async for data in response.content.iter_any():
        now = time.perf_counter()
        for payload in lines.feed(data):
            stream.on_event(payload, now)
        if stream.closed and not drain:
            break
    now = time.perf_counter()
    for payload in lines.flush():
        stream.on_event(payload, now)
    stream.on_end(now, response.headers.get("Content-Type", "none"))


class _Stream:
    """Turns the events of one response into its record."""

    def __init__(self, record: RequestRecord, target: Target) -> None:
        self.record = record
        self.closed = False
        self._keep_text, self._keep_chunks = target.keep_text, target.keep_chunks
        self._events = 0

    def fail(self, kind: str, message: str) -> None:
        if self.record.error is None:
            self.record.error_kind, self.record.error = kind, message
        self.closed = True

    def on_event(self, payload: bytes, now: float) -> None:
        if self.closed:
            return
        self._events += 1
        if payload == DONE:
            self.closed = True
            self.record.end = now
            return
        try:
            event = decode_event(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.fail("malformed", f"malformed chunk ({error}): {_shorten(payload.decode(errors='replace'))}")
            return
        if given(event.error):
            self.fail("server_error", f"error event: {_shorten(bytes(event.error).decode(errors='replace'))}")
            return
        record = self.record
        if event.usage is not None:
            record.prompt_tokens = event.usage.prompt_tokens
            record.completion_tokens = event.usage.completion_tokens
        for choice in event.choices or ():
            text = token_text(choice)
            if text is not None:
                record.chunk_times.append(now)
                if event.usage is not None and event.usage.completion_tokens is not None:
                    record.chunk_counts.append(event.usage.completion_tokens)
                if self._keep_text:
                    record.text += text
                if self._keep_chunks:
                    record.chunk_texts.append(text)
            if choice.finish_reason:
                record.finish_reason = choice.finish_reason

    def on_end(self, now: float, content_type: str) -> None:
        """The body ended without a transport error: decide whether the request completed."""
        record = self.record
        record.end = record.end or now
        if record.error is not None:
            return
        if not self._events:
            self.fail("malformed", f"no events in the answer: expected text/event-stream, found {content_type}")
        elif not self.closed and record.finish_reason is None:
            self.fail("cut", f"stream ended after {len(record.chunk_times)} chunks without finish_reason or [DONE]")
        elif record.finish_reason in _ABORTED:
            self.fail("aborted", f"finish_reason '{record.finish_reason}'")
        elif not record.chunk_times:
            self.fail("empty", f"no token came (finish_reason {record.finish_reason})")


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _ERROR_CHARS else flat[: _ERROR_CHARS - 1] + "…"


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep what exists already out of garbage collections while timestamps are taken."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
