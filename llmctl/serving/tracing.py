"""OpenTelemetry traces: a span a request, in the trace that the client began, sent to a collector by OTLP over HTTP.

Needs the extra ``otel``; nothing of it is imported without ``--otlp-traces-endpoint``. The SDK reads environment
variables of its own: ``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``, ``OTEL_EXPORTER_OTLP_HEADERS`` and so on.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from llmctl import __version__
from llmctl.errors import UsageError
from llmctl.extras import install_command, missing
from llmctl.serving.request_record import Moments, RequestRecord

log = logging.getLogger("llmctl.serving")

SECONDS_BETWEEN_LINES = 60.0
"""How often a line of the SDK's is passed on at most: an unreachable collector makes some with every batch."""
CLOSE_SECONDS = 3.0
_DEFAULT_PATH = "/v1/traces"
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/generate": "text_completion",
    "/generate_stream": "text_completion",
    "/": "text_completion",
}


def traces_url(given: str) -> str:
    """The URL that spans are sent to: as given, with ``/v1/traces`` where it has no path.

    Raises:
        UsageError: not a URL of HTTP, or OpenTelemetry is not installed.
    """
    try:
        parts = urlsplit(given)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fits = False
    if not fits:  # not shown: it may hold a password
        raise UsageError(
            "--otlp-traces-endpoint: expected the URL of an OTLP/HTTP collector, such as http://localhost:4318/v1/traces",
            param="otlp_traces_endpoint",
        )
    if missing("otel"):
        raise UsageError(
            "--otlp-traces-endpoint: OpenTelemetry is not installed",
            fix=install_command("otel"),
            param="otlp_traces_endpoint",
        )
    return parts._replace(path=_DEFAULT_PATH).geturl() if parts.path in ("", "/") else given


class RequestTracer:
    """Makes the span of each finished request; the SDK's own thread sends them.

    Args:
        endpoint: as ``traces_url`` takes it.

    Raises:
        UsageError: as ``traces_url``; one of the SDK's variables is out of its range.
    """

    def __init__(self, endpoint: str) -> None:
        url = traces_url(endpoint)
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        _pass_on_few_lines()
        try:
            self._provider = _provider(url)
        except ValueError as error:
            raise UsageError(
                f"--otlp-traces-endpoint: OpenTelemetry refuses its variables: {error}",
                fix="correct or unset the one that begins with OTEL_",
                param="otlp_traces_endpoint",
            ) from None
        self._tracer = self._provider.get_tracer("llmctl.serving", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def trace(self, record: RequestRecord) -> None:
        """Make the span of a request, if its trace is sampled, and one for each phase that it went through."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        moments = record.moments
        parent = self._propagator.extract(record.trace_context, context=Context())
        began = _nanoseconds(moments, moments.received)
        span = self._tracer.start_span("llm_request", parent, SpanKind.SERVER, start_time=began)
        if span.is_recording():
            span.set_attributes({name: value for name, value in _attributes(record).items() if value is not None})
            if record.error is not None:
                span.set_status(Status(StatusCode.ERROR, record.error))
            inside = set_span_in_context(span, parent)
            for name, begin, end in moments.phases():
                phase = self._tracer.start_span(name, inside, start_time=_nanoseconds(moments, begin))
                phase.end(_nanoseconds(moments, end))
        span.end(_nanoseconds(moments, moments.ended))

    def close(self) -> None:
        """Send what is left, for ``CLOSE_SECONDS`` at most: a collector may be slow or gone."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


def _provider(url: str) -> Any:
    """The SDK's ``TracerProvider``, which sends to a URL in batches.

    Raises:
        ValueError: a variable of the SDK's is out of its range.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {"service.name": "llmctl", "service.version": __version__, **OTELResourceDetector().detect().attributes}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider


def _nanoseconds(moments: Moments, at: float) -> int:
    """Since 1970."""
    return int((at + moments.unix_offset) * 1e9)


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """By OpenTelemetry's conventions for generative AI, and by vLLM's names where those have others or none."""
    moments = record.moments
    return {
        "gen_ai.operation.name": _OPERATIONS.get(record.endpoint),
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.request.temperature": record.temperature,
        "gen_ai.request.top_p": record.top_p,
        "gen_ai.request.n": record.n,
        "gen_ai.request.stream": record.stream,
        "gen_ai.response.finish_reasons": record.finish_reasons or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.completion_tokens": record.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.num_sequences": len(record.finish_reasons) or None,
        "gen_ai.latency.time_in_queue": moments.queue_seconds,
        "gen_ai.latency.time_to_first_token": moments.ttft_seconds,
        "gen_ai.latency.e2e": moments.e2e_seconds,
        "http.response.status_code": record.status,
        "url.path": record.endpoint,
        "error.type": record.error,
        "llmctl.tenant": record.tenant,
        "llmctl.priority": record.priority,
    }


class _FewLines(logging.Handler):
    """Passes on a line, then none for ``SECONDS_BETWEEN_LINES``; the next one says how many there were."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last: float | None = None
        self._kept_back = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Part of ``logging.Handler``."""
        now = time.monotonic()
        if self._last is not None and now - self._last < SECONDS_BETWEEN_LINES:
            self._kept_back += 1
            return
        more = f" (and {self._kept_back} lines since the last one)" if self._kept_back else ""
        self._last, self._kept_back = now, 0
        log.warning("traces: %s%s", " ".join(record.getMessage().split()), more)


def _pass_on_few_lines() -> None:
    sdk = logging.getLogger("opentelemetry")
    sdk.propagate = False
    sdk.handlers = [_FewLines()]
    logging.getLogger("urllib3").setLevel(logging.WARNING)  # at debug: two lines with every batch
