"""Who is told of each finished request: the request log and the traces, as far as they are switched on."""

from __future__ import annotations

from llmctl.config import ServeConfig
from llmctl.serving.redaction import Redactor
from llmctl.serving.request_log import RequestLog
from llmctl.serving.request_record import RequestRecord
from llmctl.serving.tracing import RequestTracer


class RequestObservers:
    """The observers of one server; false when there is none.

    Attributes:
        want_texts: whether records are to have prompts and outputs.
    """

    def __init__(
        self, request_log: RequestLog | None = None, tracer: RequestTracer | None = None, *, want_texts: bool = False
    ) -> None:
        self.want_texts = want_texts
        self._log = request_log
        self._tracer = tracer

    @classmethod
    def of(cls, config: ServeConfig, redactor: Redactor) -> RequestObservers:
        """Those that a configuration asks for.

        Raises:
            UsageError: the request log cannot be opened.
        """
        request_log = RequestLog(config.request_log, redactor) if config.request_log is not None else None
        endpoint = config.otlp_traces_endpoint
        tracer = RequestTracer(endpoint) if endpoint is not None else None
        return cls(request_log, tracer, want_texts=config.request_log_text)

    def __bool__(self) -> bool:
        return self._log is not None or self._tracer is not None

    def tell(self, record: RequestRecord) -> None:
        """A request is over; takes some microseconds, and never waits."""
        if self._log is not None:
            self._log.write(record)
        if self._tracer is not None:
            self._tracer.trace(record)

    def reopen(self) -> None:
        """The request log's file was moved: go on in a new one."""
        if self._log is not None:
            self._log.reopen()

    def close(self) -> None:
        """Put out what is held; takes some seconds at most."""
        if self._log is not None:
            self._log.close()
        if self._tracer is not None:
            self._tracer.close()
