"""``llmctl serve``: the API process from its first line to its last.

Order: start the worker (its heavy imports run beside ours), claim the port, tell the worker what to serve, answer
``/health`` at once, admit requests when the worker is ready, drain on SIGTERM or SIGINT, leave no process and no file
behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.config import ServeConfig, itl_target_seconds, parse_bytes
from llmctl.errors import LlmctlError, NotReadyError, UsageError

if TYPE_CHECKING:
    import uvicorn

    from llmctl.serving.acceptor import Acceptor
    from llmctl.serving.client import AsyncEngineClient
    from llmctl.serving.context import ServerContext
    from llmctl.serving.keys import ServerKeys
    from llmctl.serving.lifecycle import WorkerLifecycle
    from llmctl.serving.observers import RequestObservers
    from llmctl.serving.redaction import Redactor
    from llmctl.serving.supervisor import SpawnedWorker

log = logging.getLogger("llmctl.serving")

# How long /health says why the engine died before the process ends, so that a probe can see it.
DEATH_NOTICE_SECONDS = 2.0
_METRICS_PREFIX = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")
_ROOT_PATH = re.compile(r"(/[\w.~-]+)+")
_LOG_LEVELS = ("debug", "info", "warning", "error")
# Connections that wait to be accepted; the system cuts it to what it allows (Linux: net.core.somaxconn, mostly 4096).
# One beyond them is tried again by its client's system after 1 s, 3 s, 7 s, be it a probe of /health.
BACKLOG = 1 << 16
# How long another thread (it tokenizes, or renders a template) may keep Python's lock from the event loop, in seconds:
# answering takes it several times. Beside 64 long stop strings /health took 63 ms with Python's own 5 ms, 8 with this.
SWITCH_SECONDS = 0.0005
# How long responses may take to leave after the last request is done.
FLUSH_SECONDS = 5


def run_server(config: ServeConfig) -> None:
    """Serve until told to stop; returns after a drain.

    Raises:
        LlmctlError: the port is taken, the engine did not start, or it died.
    """
    from llmctl.serving.supervisor import early_worker

    gc.disable()  # until the imports are over: what they make stays, and would be scanned again and again
    with early_worker() as spawned:
        _serve(config, spawned)


def _serve(config: ServeConfig, spawned: SpawnedWorker) -> None:
    from llmctl.serving.redaction import Redactor

    check_config(config)
    keys = server_keys(config)
    redactor = Redactor(keys)
    config = dataclasses.replace(config, api_key=None, priority_keys=None)  # from here on there are only digests
    _start_logging(config.log_level, redactor)
    if (warning := keys.warning()) is not None:
        log.warning("%s", warning)
    listener = bind(config.host, config.port)
    sys.setswitchinterval(SWITCH_SECONDS)
    with listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_Server(config, listener, keys, redactor).run(spawned))


def server_keys(config: ServeConfig) -> ServerKeys:
    """The keys of ``--api-key``, ``--priority-keys`` and ``--api-key-file``.

    Raises:
        UsageError: one of these is not keys.
    """
    from llmctl.serving.keys import ServerKeys

    file = None if config.api_key_file is None else Path(config.api_key_file)
    return ServerKeys(config.api_key, config.priority_keys, file)


def _start_logging(level: str, redactor: Redactor) -> None:
    from llmctl.serving.redaction import RedactingFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter(redactor, "%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def check_config(config: ServeConfig) -> None:
    """Refuse, before anything is started, what could only fail later.

    Raises:
        UsageError: an option out of its range, or a file that is not there.
    """
    from llmctl.artifact.request import EngineRequest

    if not config.model:
        raise UsageError("--model is required", fix="llmctl serve --model demo:smollm2-135m", param="model")
    from llmctl.engine.pooling import Pooling
    from llmctl.engine.waiting_queue import POLICIES
    from llmctl.serving.addresses import parse_origins
    from llmctl.serving.sampling_defaults import given_defaults

    choices = {"log_level": _LOG_LEVELS, "scheduling_policy": POLICIES, "pooling": tuple(Pooling)}
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            option = name.replace("_", "-")
            raise UsageError(f"--{option}: expected {', '.join(allowed)}, found '{value}'", param=name)
    EngineRequest.of(config)
    itl_target_seconds(config.itl_target)
    given_defaults(config.generation_config)
    _check_deadline(config)
    _check_parsers(config)
    if not _METRICS_PREFIX.fullmatch(config.metrics_prefix):
        raise UsageError(
            f"--metrics-prefix: expected letters, digits and underscores, no digit first, found "
            f"'{config.metrics_prefix}'",
            fix="--metrics-prefix vllm; the colon after it is added",
            param="metrics_prefix",
        )
    _check_adapters(config)
    if config.max_body is not None:
        parse_bytes(config.max_body, param="max_body")
    if config.api_key is not None and not config.api_key.strip(", "):
        raise UsageError("--api-key is empty", fix="leave it out to serve without a key", param="api_key")
    if config.priority_keys is not None and not config.priority_keys.strip(", "):
        raise UsageError("--priority-keys is empty", fix="leave it out", param="priority_keys")
    if config.request_log_text and config.request_log is None:
        raise UsageError("--request-log-text needs --request-log", param="request_log_text")
    if config.otlp_traces_endpoint is not None:
        from llmctl.serving.tracing import traces_url

        traces_url(config.otlp_traces_endpoint)
    if config.ssl_certfile and not config.ssl_keyfile:
        raise UsageError("--ssl-certfile needs --ssl-keyfile", param="ssl_keyfile")
    if config.ssl_keyfile and not config.ssl_certfile:
        raise UsageError("--ssl-keyfile needs --ssl-certfile", param="ssl_certfile")
    if config.allowed_origins is not None:
        parse_origins(config.allowed_origins)
    if config.root_path and not _ROOT_PATH.fullmatch(config.root_path):
        raise UsageError(
            f"--root-path: expected a path such as /llm, found '{config.root_path}'",
            fix="a slash at the beginning, none at the end",
            param="root_path",
        )
    if not all(config.served_model_name):
        raise UsageError("--served-model-name is empty", fix="leave it out", param="served_model_name")
    for name in ("ssl_keyfile", "ssl_certfile", "chat_template"):
        file = getattr(config, name)
        if file is not None and not Path(file).is_file():
            raise UsageError(f"--{name.replace('_', '-')} {file}: no such file", param=name)


def _check_adapters(config: ServeConfig) -> None:
    from llmctl.artifact.request import check_lora_enabled
    from llmctl.serving.adapters import parse_modules

    check_lora_enabled(config, {"lora_modules": bool(config.lora_modules), "lora_dir": config.lora_dir is not None})
    if config.lora_modules:
        parse_modules(config.lora_modules, served_names(config))
    if config.lora_dir is not None and not Path(config.lora_dir).is_dir():
        raise UsageError(f"--lora-dir {config.lora_dir}: no such folder", param="lora_dir")


def _check_deadline(config: ServeConfig) -> None:
    from llmctl.engine.deadline import Deadline

    Deadline.parse(config.deadline, "--deadline")
    for name, given in {"deadline": config.deadline is not None, "shed": config.shed}.items():
        if given and config.scheduling_policy == "fcfs":
            raise UsageError(
                f"--{name}: the scheduling policy fcfs knows no deadlines",
                fix="--scheduling-policy fair or priority",
                param=name,
            )


def _check_parsers(config: ServeConfig) -> None:
    from llmctl.serving.tools.generic_prompt import ROW
    from llmctl.serving.tools.support import TOOL_TEMPLATES
    from llmctl.text.output_parser.formats import reasoning_format, tool_format

    if config.tool_template not in TOOL_TEMPLATES:
        raise UsageError(
            f"--tool-template: expected {', '.join(TOOL_TEMPLATES)}, found '{config.tool_template}'",
            param="tool_template",
        )
    if config.reasoning_parser is not None:
        reasoning_format(config.reasoning_parser)
    if config.tool_call_parser is None:
        return
    if tool_format(config.tool_call_parser).name != ROW and config.tool_template == "generic":
        raise UsageError(
            f"--tool-template generic asks for calls of the format {ROW}, found --tool-call-parser "
            f"{config.tool_call_parser}",
            fix="leave --tool-call-parser out",
            param="tool_call_parser",
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UsageError: the address is taken or not ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror or error}", param="host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {host}:{port}: {reason}", fix="choose another --port or --host", param="port"
        ) from error
    return listener


def served_names(config: ServeConfig) -> tuple[str, ...]:
    """The model's names in the API."""
    return config.served_model_name or (default_model_name(config.model),)


def default_model_name(model: str) -> str:
    """The served name of ``--model``: an engine's source model, a folder's or file's own name, else as given."""
    path = Path(model)
    if (path / "engine.json").is_file():
        from llmctl.artifact.loader import source_of

        return source_of(path)
    if path.exists():
        return path.resolve().stem if path.is_file() else path.resolve().name
    return model


def _loop_factory() -> Any:
    """uvloop's event loop, a quarter cheaper per token (with httptools); asyncio's own where there is no uvloop."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


class _Server:
    """One run of the server."""

    def __init__(self, config: ServeConfig, listener: socket.socket, keys: ServerKeys, redactor: Redactor) -> None:
        self._config = config
        self._listener = listener
        self._keys = keys
        self._redactor = redactor
        self._began = time.perf_counter()
        self._stop = asyncio.Event()

    async def run(self, spawned: SpawnedWorker) -> None:
        from llmctl.serving.client import AsyncEngineClient
        from llmctl.serving.metrics import ServerMetrics
        from llmctl.serving.observers import RequestObservers

        config = self._config
        names = served_names(config)
        metrics = ServerMetrics(names[0], prefix=config.metrics_prefix)
        client = AsyncEngineClient(
            config,
            metrics,
            stall_timeout=config.stall_timeout,
            max_restarts=config.max_restarts,
            log_level=config.log_level,
        )
        client.worker.on_progress = lambda line: print(f"{line} …", file=sys.stderr, flush=True)
        observers = RequestObservers.of(config, self._redactor)
        self._install_signals(client.worker, observers)
        await client.worker.start(spawned)
        try:
            from llmctl.serving.app import create_app
            from llmctl.serving.context import ServerContext

            context = ServerContext(config, names, client, metrics, self._keys, self._redactor, observers)
            server = self._http_server(create_app(context))
            gc.freeze()
            gc.enable()
            serving = asyncio.create_task(server.serve(sockets=[]))
            acceptor = self._acceptor(server)
            try:
                await self._supervise(context)
            finally:
                acceptor.close()
                await self._stop_http(server, serving)
        finally:
            await client.close()
            await asyncio.to_thread(observers.close)

    def _http_server(self, app: Any) -> uvicorn.Server:
        import uvicorn

        from llmctl.serving.http_protocol import BoundedHttpProtocol

        config = self._config

        class Server(uvicorn.Server):
            """uvicorn without its signal handlers: signals mean a drain here."""

            @contextlib.contextmanager
            def capture_signals(self) -> Any:
                yield

        settings = uvicorn.Config(
            app,
            http=BoundedHttpProtocol,
            log_config=None,
            # Its warnings are a line for every request that is no HTTP, which anybody may send.
            log_level="debug" if config.log_level == "debug" else "error",
            access_log=config.log_level == "debug",
            lifespan="off",
            ws="none",
            server_header=False,
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        try:
            settings.load()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--ssl-certfile/--ssl-keyfile: {getattr(error, 'strerror', None) or error}", param="ssl_certfile"
            ) from error
        return Server(settings)

    def _acceptor(self, server: uvicorn.Server) -> Acceptor:
        """In place of uvicorn's own way of taking connections."""
        from llmctl.serving.acceptor import Acceptor
        from llmctl.serving.http_protocol import HEADER_SECONDS, BoundedHttpProtocol
        from llmctl.serving.middleware import asks_for_liveness

        settings, root_path = server.config, self._config.root_path
        return Acceptor(
            self._listener,
            lambda: BoundedHttpProtocol(settings, server.server_state, {}),
            lambda said: asks_for_liveness(said, root_path),
            HEADER_SECONDS,
            settings.ssl,
        )

    def _install_signals(self, worker: WorkerLifecycle, observers: RequestObservers) -> None:
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if self._stop.is_set():
                print("stopping at once", file=sys.stderr, flush=True)
                worker.kill()
                os._exit(128 + number)
            name = signal.Signals(number).name
            print(
                f"{name}: finishing running requests (up to {self._config.drain_timeout:g} s); again to stop at once",
                file=sys.stderr,
                flush=True,
            )
            worker.drain()
            self._stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        if self._config.api_key_file is not None or self._config.request_log is not None:
            loop.add_signal_handler(signal.SIGHUP, self._reload, observers)

    def _reload(self, observers: RequestObservers) -> None:
        """SIGHUP: read the key file again, open the request log again."""
        observers.reopen()
        try:
            self._keys.reload()
        except UsageError as error:
            log.error("SIGHUP: %s; the keys are what they were", error)
            return
        log.info("SIGHUP: %d API keys", len(self._keys))
        if (warning := self._keys.warning()) is not None:
            log.warning("%s", warning)

    async def _supervise(self, context: ServerContext) -> None:
        """From start to the decision to end.

        Raises:
            LlmctlError: the engine did not start, or died.
        """
        from llmctl.serving.status_line import log_status

        client = context.client
        status = asyncio.create_task(log_status(context.metrics))
        dead = asyncio.create_task(client.worker.until_dead())
        stop = asyncio.create_task(self._stop.wait())
        try:
            ready = asyncio.create_task(self._become_ready(context))
            await _first(ready, stop)
            if ready.done():
                ready.result()
                await _first(dead, stop)
            ready.cancel()
            if dead.done() and not self._stop.is_set():
                await asyncio.sleep(DEATH_NOTICE_SECONDS)
                raise dead.result()
            await self._drain(client)
        finally:
            for task in (status, dead, stop):
                task.cancel()

    async def _become_ready(self, context: ServerContext) -> None:
        from llmctl.serving.adapters import parse_modules
        from llmctl.serving.context import Model
        from llmctl.serving.summary import print_summary

        client, config = context.client, self._config
        worker = client.worker
        info = await worker.until_ready()
        assert worker.tokenizer is not None
        assert worker.engine_path is not None
        check_quantization(config.quantization, info.quantization)
        context.loaded = Model.from_folder(context.names[0], worker.engine_path, worker.tokenizer, info, config)
        context.metrics.set_cache_config(
            block_size=info.block_size,
            num_gpu_blocks=info.num_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
            cache_dtype=info.kv_cache_dtype,
        )
        for module in parse_modules(config.lora_modules):
            await client.adapters.load(module)
        gc.collect()
        gc.freeze()
        client.admit()
        seconds, names = time.perf_counter() - self._began, [adapter.name for adapter in client.adapters]
        print_summary(config, context.loaded, worker.engine_path, seconds, keyed=bool(self._keys), adapters=names)

    async def _drain(self, client: AsyncEngineClient) -> None:
        try:
            await asyncio.wait_for(client.until_idle(), self._config.drain_timeout)
        except TimeoutError:
            log.warning("requests still running after %g s are ended", self._config.drain_timeout)
            client.fail_all(NotReadyError("the server is shutting down"))

    async def _stop_http(self, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        server.should_exit = True
        await asyncio.wait([serving])
        if not serving.cancelled() and (error := serving.exception()) is not None:
            raise LlmctlError(f"the HTTP server failed: {error}") from error


VLLM_METHODS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("awq_marlin", "auto_awq", "cpu_awq"), ("awq",)),
    **dict.fromkeys(("gptq_marlin", "auto_gptq", "gptq_bitblas"), ("gptq",)),
    "moe_wna16": ("awq", "gptq"),
}
"""vLLM's names of kernels that read what a checkpoint's method is; every other name is a method's own."""


def check_quantization(asked: str | None, found: str) -> None:
    """Refuse ``--quantization`` of another method than the model has.

    Args:
        found: as ``EngineInfo`` has it, such as ``gptq 4-bit``.

    Raises:
        UsageError.
    """
    method = found.split()[0]
    if asked is None or method in VLLM_METHODS.get(asked.lower(), (asked.lower(),)):
        return
    dense = method == "none"
    raise UsageError(
        f"--quantization {asked}: the model's weights are {'not quantized' if dense else f'quantized by {method}'}",
        fix="llmctl quantize makes a quantized checkpoint; else leave it out"
        if dense
        else f"--quantization {method}, or leave it out",
        param="quantization",
    )


async def _first(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
