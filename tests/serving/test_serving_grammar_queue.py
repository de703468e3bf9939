"""Requests wait for their grammars outside the scheduler; others go on, and the worker is woken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import cast

import pytest
from engine.fake_runtime import FakeRuntime
from small_tokenizers import byte_level

from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.errors import LlmctlError, QueueFullError
from llmctl.serving import grammar_queue
from llmctl.serving.engine_loop import EngineLoop
from llmctl.serving.grammar_queue import GrammarQueue
from llmctl.serving.transport import WorkerChannel, socket_pair
from llmctl.serving.wire import (
    AbortRequests,
    AddRequests,
    Command,
    Shutdown,
    StepMessage,
    WireRequest,
    decode_event,
    encode,
)
from llmctl.structured.compiler import CompiledGrammar, GrammarCompiler
from llmctl.structured.spec import GrammarSpec

TOKENIZER = byte_level()
SPEC = GrammarSpec("regex", "[a-c]{3}", "guided_regex")
BAD = GrammarSpec("regex", "(a", "regex")


def wire(name: str, spec: GrammarSpec | None = None, tokens: int = 20) -> WireRequest:
    return WireRequest(name, [7, 8], SamplingParams(max_tokens=tokens, grammar=spec, ignore_eos=True), 0, None, 0.0)


class Held(GrammarCompiler):
    """Compiles when it is told to."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER, TOKENIZER.vocab_size, TOKENIZER.eos_token_ids)
        self.go = threading.Event()

    def compile(self, spec: GrammarSpec, forcing: bool = False) -> CompiledGrammar:
        assert self.go.wait(30)
        return super().compile(spec, forcing)


class Worker:
    """An engine loop in a thread, behind a real channel."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self.ours, theirs = socket_pair()
        self.ours.settimeout(30)
        engine = LLMEngine(FakeRuntime(60, 4, 60, TOKENIZER.vocab_size), SchedulerConfig(), TOKENIZER.eos_token_ids)
        channel = WorkerChannel(theirs)
        self.thread = threading.Thread(target=EngineLoop(engine, channel, compiler, 60.0).run, daemon=True)
        self.thread.start()
        self._data = b""
        self.text: dict[str, bytes] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.refused: dict[str, LlmctlError] = {}

    def send(self, command: Command) -> None:
        message = encode(command)
        self.ours.sendall(len(message).to_bytes(4, "little") + message)

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            while len(self._data) < 4 or len(self._data) < 4 + int.from_bytes(self._data[:4], "little"):
                self._data += self.ours.recv(1 << 16)
            end = 4 + int.from_bytes(self._data[:4], "little")
            event, self._data = decode_event(self._data[4:end]), self._data[end:]
            if isinstance(event, StepMessage):
                self._take(event)

    def _take(self, event: StepMessage) -> None:
        for output in event.outputs:
            data = b"".join(TOKENIZER.token_bytes(i) for i in output.new_token_ids)
            self.text[output.request_id] = self.text.get(output.request_id, b"") + data
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason
        for refused in event.refused:
            self.refused |= dict.fromkeys(refused.request_ids, refused.error.error())

    def end(self) -> None:
        self.send(Shutdown())
        self.thread.join(30)
        assert not self.thread.is_alive()


def test_others_go_on_while_a_grammar_is_compiled_and_an_idle_worker_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_queue, "_CHECK_MS", 60_000)
    compiler = Held()
    worker = Worker(compiler)
    worker.send(AddRequests([wire("a", SPEC), wire("b", SPEC)]))
    worker.send(AddRequests([wire("free")]))
    worker.until(lambda: "free" in worker.reasons)
    assert worker.reasons == {"free": FinishReason.LENGTH}
    compiler.go.set()  # the worker waits for commands now, longer than ``until`` does for it
    worker.until(lambda: worker.reasons.keys() >= {"a", "b"})
    assert all(len(worker.text[name]) == 3 and set(worker.text[name]) <= set(b"abc") for name in "ab")
    assert worker.reasons["a"] == worker.reasons["b"] == FinishReason.STOP
    worker.end()


def test_a_grammar_that_is_refused_refuses_its_request_by_its_own_field() -> None:
    worker = Worker(GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, TOKENIZER.eos_token_ids))
    worker.send(AddRequests([wire("a", BAD)]))
    worker.send(AddRequests([wire("b", GrammarSpec("regex", "(a", "guided_regex")), wire("c", SPEC)]))
    worker.until(lambda: worker.refused.keys() >= {"a", "b", "c"})
    assert worker.refused["a"].param == "regex"
    assert str(worker.refused["a"]).startswith("regex: cannot be enforced")
    assert worker.refused["b"].param == "guided_regex"
    assert str(worker.refused["b"]).startswith("guided_regex: cannot be enforced")
    assert worker.refused["b"].http_status == 400
    worker.end()


def test_what_is_aborted_meanwhile_never_runs() -> None:
    compiler = Held()
    worker = Worker(compiler)
    worker.send(AddRequests([wire("a", SPEC), wire("b", SPEC)]))
    worker.send(AddRequests([wire("c", GrammarSpec("regex", "d{3}"))]))
    worker.send(AbortRequests(["a", "c"]))
    worker.send(AddRequests([wire("free", tokens=1)]))
    worker.until(lambda: "free" in worker.reasons)
    compiler.go.set()
    worker.until(lambda: "b" in worker.reasons)
    worker.end()
    assert worker.text.keys() == {"free", "b"}


def test_compiling_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_queue, "COMPILE_SECONDS", 0.0)
    compiler = Held()
    queue = GrammarQueue(compiler, lambda: None)
    for pattern in ("a", "b", "c"):  # two threads
        queue.put(GrammarSpec("regex", pattern, "regex"), [wire(pattern)])
    running = cast(list[Future[CompiledGrammar]], list(compiler._cache.values()))
    while sum(future.running() for future in running) < 2:
        time.sleep(0.001)
    errors = [grammar for _, grammar in queue.take()]
    assert not queue
    assert [str(error) for error in errors[:2]] == ["regex: took longer than 0 s to compile"] * 2
    assert isinstance(errors[2], QueueFullError)
    compiler.go.set()


def test_a_grammar_that_gets_no_processor_is_not_its_clients_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_queue, "COMPILE_SECONDS", 0.0)
    compiler = Held()
    queue = GrammarQueue(compiler, lambda: None)
    queue.put(SPEC, [wire("a", SPEC)])
    (future,) = compiler._cache.values()
    while not future.running() or not compiler._clocks:
        time.sleep(0.001)
    monkeypatch.setattr(grammar_queue, "COMPILE_SECONDS", 1000.0)
    ((_, error),) = queue.take()
    assert isinstance(error, QueueFullError)
    assert str(error).startswith("the machine is busy: in 1000 s the grammar had a processor for 0.0 s")
    compiler.go.set()
    future.result(30)
    assert not compiler._clocks
    queue.put(SPEC, [wire("a", SPEC)])
    ((_, compiled),) = queue.take()
    assert isinstance(compiled, CompiledGrammar)


def test_a_request_that_singles_out_tokens_is_forced_to_none() -> None:
    """Its grammar's text in the only tokens that it allows, which are not those that the tokenizer would take."""
    worker = Worker(GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, TOKENIZER.eos_token_ids))
    spec = GrammarSpec("regex", "the fox")
    letters = tuple(i for c in "the fox" for i in TOKENIZER.encode(c, add_special_tokens=False))
    params = SamplingParams(max_tokens=20, grammar=spec, allowed_token_ids=letters)
    worker.send(AddRequests([wire("forced", spec)]))
    worker.send(AddRequests([WireRequest("letters", [7, 8], params, 0, None, 0.0)]))
    worker.until(lambda: worker.reasons.keys() | worker.refused.keys() >= {"forced", "letters"})
    assert worker.text["forced"] == worker.text["letters"] == b"the fox"
    assert not worker.refused
    worker.end()
