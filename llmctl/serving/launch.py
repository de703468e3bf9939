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
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.config import ServeConfig
from llmctl.errors import LlmctlError, NotReadyError, UsageError
from llmctl.serving.config_check import check_config, check_quantization
from llmctl.serving.model_names import served_names

if TYPE_CHECKING:
    import uvicorn

    from llmctl.serving.acceptor import Acceptor
    from llmctl.serving.client import AsyncEngineClient
    from llmctl.serving.context import Model, ServerContext
    from llmctl.serving.keys import ServerKeys
    from llmctl.serving.lifecycle import WorkerLifecycle
    from llmctl.serving.observers import RequestObservers
    from llmctl.serving.redaction import Redactor
    from llmctl.serving.spawned import SpawnedWorker

log = logging.getLogger("llmctl.serving")

# How long /health says why the engine died before the process ends, so that a probe can see it.
DEATH_NOTICE_SECONDS = 2.0
# Connections that wait to be accepted; the system cuts it to what it allows (Linux: net.core.somaxconn, mostly 4096).
# One beyond them is tried again by its client's system after 1 s, 3 s, 7 s, be it a probe of /health.
BACKLOG = 1 << 16
# How long another thread (it tokenizes, or renders a template) may keep Python's lock from the event loop, in seconds:
# answering takes it several times. Beside 64 long stop strings /health took 63 ms with Python's own 5 ms, 8 with this.
SWITCH_SECONDS = 0.0005
# How long responses may take to leave after the last request is done.
FLUSH_SECONDS = 5


def run_server(config: ServeConfig, spawned: SpawnedWorker | None = None) -> None:
    """Serve until told to stop; returns after a drain.

    Args:
        spawned: a worker that was started before, for its imports to run beside ours; its owner ends it.

    Raises:
        LlmctlError: the port is taken, the engine did not start, or it died.
    """
    from llmctl.serving.spawned import early_worker

    gc.disable()  # until the imports are over: what they make stays, and would be scanned again and again
    try:
        with early_worker() if spawned is None else contextlib.nullcontext(spawned) as worker:
            _serve(config, worker)
    finally:
        gc.enable()


def _serve(config: ServeConfig, spawned: SpawnedWorker) -> None:
    from llmctl.serving.allocator import give_freed_memory_back
    from llmctl.serving.redaction import Redactor
    from llmctl.serving.worker_settings import Processors, engine_options, idle_seconds

    give_freed_memory_back()
    check_config(config)
    keys = server_keys(config)
    redactor = Redactor(keys)
    config = dataclasses.replace(config, api_key=None, priority_keys=None)  # from here on there are only digests
    _start_logging(config.log_level, redactor)
    if (warning := keys.warning()) is not None:
        log.warning("%s", warning)
    listener = bind(config.host, config.port)
    signs = idle_seconds(config.stall_timeout)
    spawned.tell(engine_options(config), config.log_level, signs, Processors.of(config))
    sys.setswitchinterval(SWITCH_SECONDS)
    with listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        server = _Server(config, listener, keys, redactor)
        runner.run(server.run(spawned))
    if server.ended_early:
        sys.exit(128 + server.ended_early)


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


def _loop_factory() -> Any:
    """uvloop's event loop, a quarter cheaper per token (with httptools); asyncio's own where there is no uvloop."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


class _Server:
    """One run of the server.

    Attributes:
        ended_early: the signal that ended it before it was ready; 0: none did.
    """

    def __init__(self, config: ServeConfig, listener: socket.socket, keys: ServerKeys, redactor: Redactor) -> None:
        self._config = config
        self._listener = listener
        self._keys = keys
        self._redactor = redactor
        self._began = time.perf_counter()
        self._stop = asyncio.Event()
        self._admits = False
        self.ended_early = 0

    async def run(self, spawned: SpawnedWorker) -> None:
        from llmctl.serving.client import AsyncEngineClient
        from llmctl.serving.metrics import ServerMetrics
        from llmctl.serving.observers import RequestObservers
        from llmctl.serving.worker_settings import Processors

        config = self._config
        names = served_names(config)
        metrics = ServerMetrics(names[0], prefix=config.metrics_prefix)
        client = AsyncEngineClient(
            config,
            metrics,
            stall_timeout=config.stall_timeout,
            max_restarts=config.max_restarts,
            log_level=config.log_level,
            processors=Processors.of(config),
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
            if self._admits:
                what = f"finishing running requests (up to {self._config.drain_timeout:g} s)"
            else:
                self.ended_early, what = number, "ending before the server is ready"
            print(f"{name}: {what}; again to stop at once", file=sys.stderr, flush=True)
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
        from llmctl.serving.body import build_models
        from llmctl.serving.context import Model

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
        context.metrics.set_engine(target=info.target, dtype=info.dtype, kernel_build=info.kernels)
        for module in parse_modules(config.lora_modules):
            await client.adapters.load(module)
        gc.collect()
        gc.freeze()
        client.admit()
        self._admits = True
        seconds = time.perf_counter() - self._began
        names = [adapter.name for adapter in client.adapters]
        await asyncio.to_thread(self._say_ready, context.loaded, worker.engine_path, seconds, names)
        await build_models()

    def _say_ready(self, model: Model, engine: Path, seconds: float, adapters: list[str]) -> None:
        """On the terminal. Requests are taken already: to draw it takes as long as some of them."""
        from llmctl.serving.summary import print_summary

        print_summary(self._config, model, engine, seconds, keyed=bool(self._keys), adapters=adapters)

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


async def _first(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
