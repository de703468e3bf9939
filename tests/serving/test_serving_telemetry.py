"""The app makes no spans of its own, whoever set up OpenTelemetry in the process: a URL's query may hold a key."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra otel")

CODE = """
import asyncio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from llmctl.config import ServeConfig
from llmctl.serving.app import create_app
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.context import ServerContext
from llmctl.serving.keys import ServerKeys
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.redaction import Redactor

kept = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
trace.set_tracer_provider(provider)
config, metrics, keys = ServeConfig(), ServerMetrics("m"), ServerKeys()
client = AsyncEngineClient(config, metrics, stall_timeout=60)
app = create_app(ServerContext(config, ("m",), client, metrics, keys, Redactor(keys)))
said = []

async def send(message):
    said.append(message.get("status"))

scope = {"type": "http", "method": "GET", "path": "/version", "query_string": b"k=sk", "headers": [], "root_path": ""}
asyncio.run(app(scope, None, send))
print(said[0], len(kept.get_finished_spans()))
"""


def test_a_provider_of_the_process_gets_no_span() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.stdout.split() == ["200", "0"], result.stderr
