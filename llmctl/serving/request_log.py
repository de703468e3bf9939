"""The request log: one JSON object a line for each finished request, written by a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from llmctl.errors import UsageError
from llmctl.serving.redaction import Redactor
from llmctl.serving.request_record import RequestRecord

log = logging.getLogger("llmctl.serving")

FLUSH_SECONDS = 0.25
MOST_RECORDS = 8192
"""Records that wait to be written, beyond which new ones are lost."""
MOST_TEXT = 2**16
"""Characters of one prompt or output that are logged."""
_MOST_UNWRITTEN_BYTES = 2**24
_CLOSE_SECONDS = 5.0
_STDOUT = 1


class LogLine(msgspec.Struct, frozen=True):
    """One line; times of day in UTC, durations in seconds. The fields are described in ``docs/serving.md``."""

    time: datetime
    request_id: str
    tenant: str
    endpoint: str
    model: str
    status: int | None
    error: str | None
    stream: bool | None
    n: int | None
    max_tokens: int | None
    priority: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    finish_reasons: tuple[str, ...]
    queue_s: float | None
    ttft_s: float | None
    e2e_s: float | None
    itl_s: float | None
    prompts: list[str | list[int]] | msgspec.UnsetType = msgspec.UNSET
    outputs: list[str | list[int]] | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, record: RequestRecord, redactor: Redactor) -> LogLine:
        """The line of a record."""
        moments = record.moments
        return cls(
            time=datetime.fromtimestamp(moments.ended + moments.unix_offset, UTC),
            request_id=record.request_id,
            tenant=record.tenant,
            endpoint=record.endpoint,
            model=record.model,
            status=record.status,
            error=record.error,
            stream=record.stream,
            n=record.n,
            max_tokens=record.max_tokens,
            priority=record.priority,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            output_tokens=record.output_tokens,
            finish_reasons=record.finish_reasons,
            queue_s=_rounded(moments.queue_seconds),
            ttft_s=_rounded(moments.ttft_seconds),
            e2e_s=_rounded(moments.e2e_seconds),
            itl_s=_rounded(record.itl_seconds),
            prompts=_shown(record.prompts, redactor),
            outputs=_shown(record.outputs, redactor),
        )


def _shown(texts: Sequence[str | list[int]] | None, redactor: Redactor) -> list[str | list[int]] | msgspec.UnsetType:
    if texts is None:
        return msgspec.UNSET
    return [redactor.prose(t[:MOST_TEXT]) if isinstance(t, str) else t[:MOST_TEXT] for t in texts]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


class RequestLog:
    """Writes records to a file, or to stdout for ``-``; ``write`` neither blocks nor fails.

    What cannot be written is kept, up to a bound, and tried again every ``FLUSH_SECONDS``; that is said once, and once
    when it goes on. A file that is moved is written until ``reopen``, one that is deleted is made again.

    Raises:
        UsageError: the file cannot be opened.
    """

    def __init__(self, path: str, redactor: Redactor) -> None:
        self._path = path
        self._redactor = redactor
        self._records: deque[RequestRecord] = deque()
        self._lines: deque[bytes] = deque()
        self._line_bytes = 0
        self._written_of_first = 0
        self._lost = self._lost_unwritten = self._lost_said = 0  # the first is the writer's caller's
        self._failing = False
        self._closing = False
        self._reopens = False
        self._wakes = threading.Event()
        try:
            self._descriptor: int | None = self._open()
        except OSError as error:
            raise UsageError(f"--request-log {path}: {error.strerror or error}", param="request_log") from None
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def write(self, record: RequestRecord) -> None:
        """Have a record written."""
        if len(self._records) >= MOST_RECORDS:
            self._lost += 1
        else:
            self._records.append(record)

    def reopen(self) -> None:
        """Open the path again, after what is there so far is written."""
        self._reopens = True
        self._wakes.set()

    def close(self) -> None:
        """Write what is there, for a few seconds at most, and end."""
        self._closing = True
        self._wakes.set()
        self._thread.join(_CLOSE_SECONDS)
        waiting = len(self._records) + len(self._lines)
        if waiting:
            log.error("--request-log %s: the last %d records are lost", self._path, waiting)

    # The thread

    def _run(self) -> None:
        while not self._closing:
            self._wakes.wait(FLUSH_SECONDS)
            self._wakes.clear()
            self._flush()
        self._flush()

    def _flush(self) -> None:
        self._encode()
        try:
            self._put_out()
        except OSError as error:
            if not self._failing:
                self._failing = True
                log.error("--request-log %s: %s; the server goes on", self._path, error.strerror or error)
            return
        if self._failing:
            self._failing = False
            log.warning("--request-log %s is written again", self._path)
        lost = self._lost + self._lost_unwritten
        if lost > self._lost_said:
            log.warning("--request-log %s: %d records are lost", self._path, lost - self._lost_said)
            self._lost_said = lost

    def _encode(self) -> None:
        while self._records:
            record = self._records.popleft()
            if self._line_bytes > _MOST_UNWRITTEN_BYTES:
                self._lost_unwritten += 1
                continue
            line = msgspec.json.encode(LogLine.of(record, self._redactor)) + b"\n"
            self._lines.append(line)
            self._line_bytes += len(line)

    def _put_out(self) -> None:
        """Write all lines, and change files where that is due."""
        reopens, self._reopens = self._reopens, False
        if self._deleted():
            self._close_file()
        elif reopens:
            with contextlib.suppress(OSError):  # what is left goes into the next file
                self._write_lines()
            self._close_file()
        self._write_lines()

    def _write_lines(self) -> None:
        if self._descriptor is None:
            self._descriptor = self._open()
        while self._lines:
            line = self._lines[0]
            self._written_of_first += os.write(self._descriptor, line[self._written_of_first :])
            if self._written_of_first == len(line):
                self._lines.popleft()
                self._line_bytes -= len(line)
                self._written_of_first = 0

    def _deleted(self) -> bool:
        return self._descriptor is not None and self._path != "-" and os.fstat(self._descriptor).st_nlink == 0

    def _open(self) -> int:
        if self._path == "-":
            return _STDOUT
        # A FIFO that nobody has open would keep the server from its start.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
        os.set_blocking(descriptor, True)
        return descriptor

    def _close_file(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        self._written_of_first = 0  # a line that was begun is written whole in the next file
        if descriptor is not None and descriptor != _STDOUT:
            os.close(descriptor)
