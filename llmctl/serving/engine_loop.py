"""What the worker runs: commands in, one engine step, one message out, again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.affinity import run_on
from llmctl.config import EngineOptions
from llmctl.engine.adapter_cache import AdapterCache
from llmctl.engine.llm_engine import LLMEngine, TokenOutput
from llmctl.engine.request import Request
from llmctl.errors import DeadlineMissedError, LlmctlError, resource_error
from llmctl.niceness import be_nice
from llmctl.serving.grammar_queue import GrammarQueue
from llmctl.serving.transport import WorkerChannel
from llmctl.serving.wire import (
    AbortRequests,
    AdapterLoaded,
    AdapterRefused,
    AddRequests,
    EngineInfo,
    ErrorInfo,
    Event,
    ForgetAdapter,
    KnowAdapter,
    LoadAdapter,
    Located,
    Progress,
    Refused,
    Scheduled,
    StepMessage,
    WireRequest,
    decode_command,
    encode,
)
from llmctl.serving.worker_settings import IDLE_SECONDS, Processors
from llmctl.structured.compiler import GrammarCompiler
from llmctl.structured.matcher import TokenMatcher

if TYPE_CHECKING:
    from llmctl.artifact.loader import LoadedEngine
    from llmctl.artifact.start import StartedEngine

log = logging.getLogger("llmctl.worker")

_READING_WAIT_MS = 200
"""Requests that wait for an adapter to be read may have deadlines."""


class EngineLoop:
    """Drives one LLMEngine from one channel.

    Commands are taken between steps. A step in which nothing is produced (a chunk of a long prompt) is reported too:
    it is how the API process sees progress. So is an idle wait, every ``idle_seconds``: the time in it counts, and
    without it an idle worker could not be told from one that is stopped.
    """

    def __init__(
        self,
        engine: LLMEngine,
        channel: WorkerChannel,
        compiler: GrammarCompiler,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._idle_wait_ms = max(1, round(1000 * idle_seconds))
        engine.on_first_scheduled = self._tell_scheduled
        engine.on_shed = self._refuse_missed
        engine.on_failed = lambda request_id, error: self._refuse([request_id], error)
        if engine.adapters is not None:
            engine.adapters.wake = channel.wake
        self._refused: list[Refused] = []
        self._new: list[Request] = []
        self._grammars = GrammarQueue(compiler, channel.wake)
        self._began = time.perf_counter()
        self._idle_seconds = 0.0
        self._stopping = False

    def run(self) -> None:
        """Until a Shutdown command."""
        while not self._stopping:
            self._turn()
        self._grammars.close()
        self._engine.close()

    def _turn(self) -> None:
        """Commands, a step, a report."""
        runs = self._engine.has_unfinished() and not self._engine.awaits_adapters()
        outputs = self._take_commands(0) if runs else self._wait()
        if self._grammars:
            self._take_compiled()
        if self._engine.adapters is not None:
            self._take_adapters(self._engine.adapters)
        if self._engine.has_unfinished():
            outputs += self._engine.step()
        if not self._stopping or outputs or self._refused:
            self._report(outputs)

    def _wait(self) -> list[TokenOutput]:
        """Take commands when some have come, or nothing after a while. Returns outputs of aborts."""
        before = time.perf_counter()
        self._engine.settle()
        most = _READING_WAIT_MS if self._engine.has_unfinished() else self._idle_wait_ms
        outputs = self._take_commands(self._grammars.wait_ms(most))
        seconds = time.perf_counter() - before
        self._idle_seconds += seconds
        self._engine.occupancy.waited(seconds)
        return outputs

    def _tell_scheduled(self, request_ids: list[str]) -> None:
        self._channel.send(encode(Scheduled(request_ids)))

    def _refuse_missed(self, requests: list[Request]) -> None:
        for request in requests:
            assert request.deadline.ttft is not None
            error = DeadlineMissedError(
                f"the request waited longer than its TTFT deadline of {1000 * request.deadline.ttft:g} ms",
                fix="try again later, or with a longer deadline",
                param="deadline",
            )
            self._refused.append(Refused([request.request_id], ErrorInfo.of(error)))

    def _report(self, outputs: list[TokenOutput]) -> None:
        busy_seconds = time.perf_counter() - self._began - self._idle_seconds
        waiting = self._waiting(outputs) if self._new else []
        message = encode(StepMessage(outputs, self._engine.stats(), busy_seconds, self._refused, waiting))
        before = time.perf_counter()
        self._channel.send(message)
        self._engine.occupancy.sent(time.perf_counter() - before)
        self._refused = []

    def _waiting(self, outputs: list[TokenOutput]) -> list[str]:
        """Of the requests that came, those whose clients are to be told that they were taken in: no token of theirs is
        there or under way, and what refuses a request in the queue cannot hit them. It is asked again of the others."""
        said = {output.request_id for output in outputs}
        silent = [r for r in self._new if r.request_id not in said and not r.status.finished and not r.num_in_flight]
        self._new = [request for request in silent if self._may_be_refused(request)]
        return [request.request_id for request in silent if not self._may_be_refused(request)]

    def _may_be_refused(self, request: Request) -> bool:
        """Whether it is in the queue and may miss its deadline there, or its adapter's file be found unreadable."""
        if request.times.first_scheduled is not None:
            return False
        sheds = self._engine.scheduler.config.shed and request.deadline.ttft is not None
        return sheds or request.adapter_id is not None

    def _take_commands(self, timeout_ms: int) -> list[TokenOutput]:
        """Apply every command that has come, waiting for the first up to ``timeout_ms``. Returns outputs of aborts."""
        outputs: list[TokenOutput] = []
        for message in self._channel.receive(timeout_ms):
            command = decode_command(message)
            if isinstance(command, AddRequests):
                self._take_in(command)
            elif isinstance(command, AbortRequests):
                outputs += self._engine.abort(command.request_ids)
                self._grammars.drop(command.request_ids)
            elif isinstance(command, LoadAdapter | KnowAdapter | ForgetAdapter):
                self._on_adapter(command)
            else:
                self._stopping = True
                break
        return outputs

    def _on_adapter(self, command: LoadAdapter | KnowAdapter | ForgetAdapter) -> None:
        adapters = self._engine.adapters
        assert adapters is not None, "the API process asks only where --enable-lora was given"
        if isinstance(command, LoadAdapter):
            adapters.load(command.name, Path(command.path))
        elif isinstance(command, KnowAdapter):
            adapters.know(command.adapter_id, Path(command.path))
        else:
            adapters.forget(command.adapter_id)

    def _take_adapters(self, adapters: AdapterCache) -> None:
        for read in adapters.take():
            if read.found is not None:
                for note in read.found.notes if read.name else ():
                    log.warning("%s", note)
                event: Event = AdapterLoaded(read.name, read.adapter_id)
            else:
                assert read.error is not None
                event = AdapterRefused(read.name, ErrorInfo.of(read.error))
                if read.adapter_id:
                    self._engine.fail_adapter(read.adapter_id, read.error)
            if read.name:
                self._channel.send(encode(event))

    def _take_in(self, command: AddRequests) -> None:
        spec = command.requests[0].params.grammar  # the sequences of one HTTP request differ in their seeds only
        if spec is None:
            self._add([_request(wire) for wire in command.requests])
        else:
            try:
                self._grammars.put(spec, command.requests)
            except RuntimeError as error:  # no more threads
                if (spent := resource_error(error)) is None:
                    raise
                self._refuse([wire.request_id for wire in command.requests], spent)

    def _take_compiled(self) -> None:
        for requests, grammar in self._grammars.take():
            if isinstance(grammar, LlmctlError):
                self._refuse([wire.request_id for wire in requests], grammar)
            else:
                self._add([_request(wire, grammar.matcher()) for wire in requests])

    def _add(self, requests: list[Request]) -> None:
        try:
            self._engine.add_requests(requests)
        except LlmctlError as error:
            self._refuse([request.request_id for request in requests], error)
        else:
            self._new += requests

    def _refuse(self, request_ids: list[str], error: LlmctlError) -> None:
        self._refused.append(Refused(request_ids, ErrorInfo.of(error)))


def _request(wire: WireRequest, matcher: TokenMatcher | None = None) -> Request:
    return Request(
        request_id=wire.request_id,
        prompt_token_ids=wire.prompt_token_ids,
        params=wire.params,
        priority=wire.priority,
        arrival_time=wire.arrival,
        cache_salt=wire.cache_salt,
        tenant=wire.tenant,
        deadline=wire.deadline,
        matcher=matcher,
        pooling=wire.pooling,
        adapter_id=wire.adapter_id,
    )


def start(config: EngineOptions, send: Callable[[Event], None], processors: Processors) -> StartedEngine:
    """The engine that ``config.model`` names, built into the cache first if need be; tells ``send`` how far it is.

    Args:
        processors: those that this process is kept to before anything counts them, and how nice it is once it computes.

    Raises:
        LlmctlError: whatever resolving, building or loading refuses.
    """
    run_on(processors.cpus, param="worker_cpus")
    path = _locate(config, send)
    send(Located(str(path)))
    send(Progress("loading the engine"))
    from llmctl.artifact.start import start_engine

    started = start_engine(path, config)
    be_nice(started.loaded.target.niceness if processors.nice is None else processors.nice)
    send(_info(started.loaded, started.engine))
    return started


def _locate(config: EngineOptions, send: Callable[[Event], None]) -> Path:
    """The engine folder of ``config.model``: itself, or built into the cache."""
    from llmctl.artifact.loader import is_engine

    if is_engine(Path(config.model)):
        return Path(config.model)
    from llmctl.artifact.builder import ensure_engine

    send(Progress(f"preparing an engine for {config.model} (target {config.target})"))
    return ensure_engine(config.model, config)


def _info(loaded: LoadedEngine, engine: LLMEngine) -> EngineInfo:
    from llmctl.artifact.memory_table import memory_rows

    manifest, limits, sizes, sizing = loaded.manifest, engine.limits, loaded.sizes, loaded.sizing
    plan = replace(loaded.plan, num_blocks=limits.num_blocks)  # a runtime that measures may have taken fewer
    quantization = manifest.quantization
    return EngineInfo(
        model_name=manifest.source.name,
        family=manifest.graph.family,
        target=str(manifest.target),
        quantization=quantization.method if not quantization.bits else f"{quantization.method} {quantization.bits}-bit",
        dtype=manifest.options.dtype,
        max_model_len=limits.max_model_len,
        block_size=limits.block_size,
        num_blocks=limits.num_blocks,
        vocab_size=limits.vocab_size,
        hidden_size=manifest.graph.hidden_size,
        weight_bytes=plan.weights,
        kv_cache_bytes=plan.kv_bytes,
        kv_cache_dtype=sizing.options.kv_cache_dtype,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        memory=[list(row) for row in memory_rows(sizing, plan)],
        memory_note=f"budget: {plan.budget_source}",
        kernels=engine.runtime.kernels,
        own_memory="gpu_memory_utilization" in loaded.target.run_options,
        kv_tokens=plan.kv_tokens,
    )
