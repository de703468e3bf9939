"""What outlives a worker: kept, held, tried one at a time, put away; no process is started."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from small_tokenizers import byte_level

from llmctl.config import ServeConfig
from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.pooling import Pooling
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import LlmctlError
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.generation import Generation, SequenceSpec
from llmctl.serving.metrics import NO_STATS, ServerMetrics
from llmctl.serving.wire import AbortRequests, AddRequests, Command, ErrorInfo, Refused, StepMessage
from llmctl.structured.spec import GrammarSpec

DEATH = LlmctlError("the engine worker died: killed by SIGKILL")


class Bench:
    """A client whose worker is played by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, queue: int = 100) -> None:
        self.metrics = ServerMetrics("m")
        self.client = AsyncEngineClient(ServeConfig(max_num_queued_reqs=queue), self.metrics, stall_timeout=60)
        self.sent: list[str] = []
        self.aborted: list[str] = []
        self.client.worker.tokenizer = byte_level()
        monkeypatch.setattr(self.client.worker, "send", self._take)
        self.client.admit()

    def _take(self, command: Command) -> None:
        if isinstance(command, AddRequests):
            assert command.requests
            self.sent += [r.request_id for r in command.requests]
        elif isinstance(command, AbortRequests):
            self.aborted += command.request_ids

    def ask(self, sequences: int = 1, grammar: GrammarSpec | None = None) -> Generation:
        return self.client.generate([SequenceSpec([5, 6], SamplingParams(max_tokens=9, grammar=grammar))] * sequences)

    def step(self, *ids: str, end: bool = False, refused: tuple[Refused, ...] = ()) -> None:
        reason = FinishReason.LENGTH if end else None
        outputs = [TokenOutput(i, (40,), finish_reason=reason) for i in ids]
        self.client.on_step(StepMessage(outputs, NO_STATS, 0.0, list(refused)))

    def vector(self, request_id: str) -> None:
        embedding = np.zeros(2, np.float32)
        output = TokenOutput(request_id, finish_reason=FinishReason.STOP, embedding=embedding)
        self.client.on_step(StepMessage([output], NO_STATS, 0.0))

    def die(self, *scheduled: str) -> None:
        self.client.on_scheduled(list(scheduled))
        self.client.on_worker_lost(DEATH, "SIGKILL")
        self.sent.clear()

    def restart(self) -> list[str]:
        self.client.on_worker_back()
        return self.sent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def code_of(generation: Generation) -> str | None:
    error = generation._error
    return error.code if isinstance(error, LlmctlError) else None


def test_what_has_a_token_ends_and_what_has_none_is_sent_again(bench: Bench) -> None:
    begun, half, waiting = bench.ask(), bench.ask(2), bench.ask(2)
    bench.step("0", "2")
    bench.die("0", "1", "2")
    assert [code_of(g) for g in (begun, half, waiting)] == ["engine_dead", "engine_dead", None]
    assert bench.restart() == ["3", "4"]
    assert not bench.client._survivors.holding
    bench.ask()
    assert bench.sent == ["3", "4", "5"]
    bench.step("3", "4", "5", end=True)
    assert (waiting.done, bench.client.busy) == (True, False)


def test_an_embedding_without_its_vector_is_sent_again(bench: Bench) -> None:
    nothing = SamplingParams(max_tokens=0)
    generation = bench.client.generate([SequenceSpec([5, 6], nothing, pooling=Pooling.MEAN)])
    bench.die("0")
    assert bench.restart() == ["0"]
    assert [s.wire.pooling for s in generation.sequences if s.wire is not None] == [Pooling.MEAN]
    bench.vector("0")
    (output,) = asyncio.run(generation.result())
    assert output.embedding is not None
    assert (generation.deaths, bench.client.busy) == (1, False)


def test_suspects_come_one_at_a_time_and_before_all_others(bench: Bench) -> None:
    for _ in range(4):
        bench.ask()
    bench.die("0", "1")
    assert bench.restart() == ["0"]
    bench.ask()
    bench.step()
    assert bench.sent == ["0"]
    bench.step("0")
    assert bench.sent == ["0", "1"]
    bench.step("0", "1")
    assert bench.sent == ["0", "1", "2", "3", "4"]


def test_a_suspect_of_several_sequences_is_tried_until_all_have_begun(bench: Bench) -> None:
    bench.ask(2)
    bench.ask()
    bench.die("0")
    assert bench.restart() == ["0", "1"]
    bench.step("0")
    assert bench.sent == ["0", "1"]
    bench.step("1")
    assert bench.sent == ["0", "1", "2"]


def test_the_second_death_in_a_row_is_the_requests_last(bench: Bench) -> None:
    poison, innocent, other = bench.ask(), bench.ask(), bench.ask()
    bench.die("0", "1", "2")
    assert bench.restart() == ["0"]
    bench.die("0")
    assert [code_of(g) for g in (poison, innocent, other)] == ["request_quarantined", None, None]
    assert "died twice" in str(poison._error)
    assert bench.restart() == ["1", "2"]  # they were not in a step, so nothing is held against them any more
    bench.die("1")
    assert code_of(innocent) is None
    assert bench.restart() == ["1"]


def test_a_grammar_that_was_sent_is_a_suspect_too(bench: Bench) -> None:
    """Compiling it may have been the worker's end, without a step."""
    plain, grammar = bench.ask(), bench.ask(grammar=GrammarSpec("regex", "a"))
    bench.die()
    assert bench.restart() == ["1"]
    bench.die()
    assert code_of(grammar) == "request_quarantined"
    assert code_of(plain) is None
    assert bench.restart() == ["0"]


def test_a_sequence_that_cannot_go_on_ends_its_request(bench: Bench) -> None:
    generation, other = bench.ask(3), bench.ask()
    bench.step("0", "1", "2", "3")
    bench.step(refused=(Refused(["1"], ErrorInfo.of(LlmctlError("the output cannot go on"))),))
    assert generation.done
    assert not other.done
    assert bench.aborted == ["0", "2"]
    assert bench.client._running.keys() == {"3"}


@pytest.mark.parametrize("how", ["abort", "refusal"])
def test_a_suspect_that_ends_otherwise_makes_room(bench: Bench, how: str) -> None:
    first = bench.ask()
    bench.ask()
    bench.die("0", "1")
    assert bench.restart() == ["0"]
    if how == "abort":
        first.abort()
        assert bench.aborted == ["0"]
        bench.step()
    else:
        bench.step(refused=(Refused(["0"], ErrorInfo.of(DEATH)),))
    assert bench.sent == ["0", "1"]


def test_who_leaves_meanwhile_is_not_sent(bench: Bench) -> None:
    suspect, other = bench.ask(), bench.ask()
    bench.ask()
    bench.die("0")
    suspect.abort()
    other.abort()
    assert bench.restart() == ["2"]


def test_no_more_are_sent_than_the_worker_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was taken is not refused because its worker died."""
    bench = Bench(monkeypatch, queue=2)
    for _ in range(5):
        bench.ask()
    bench.die()
    assert bench.restart() == ["0", "1"]
    bench.step()
    assert bench.sent == ["0", "1"]
    bench.client.on_scheduled(["0"])
    bench.step("0")
    assert bench.sent == ["0", "1", "2"]
    bench.client.on_scheduled(["1", "2"])
    bench.step("0", "1", "2")
    assert bench.sent == ["0", "1", "2", "3", "4"]


def test_metrics_tell_it_and_begin_anew(bench: Bench) -> None:
    bench.ask()
    stats = NO_STATS.__class__(1, 0, 0.5, 0, 0, 0, 7, 70, 60, 8)
    bench.client.on_step(StepMessage([], stats, 2.0))
    bench.die()
    text = bench.metrics.render()[0].decode()
    labels = 'engine="0",model_name="m"'
    assert f'llmctl:worker_restarts_total{{{labels},reason="SIGKILL"}} 1.0' in text
    assert 'llmctl:num_requests_running{engine="0",model_name="m"} 0.0' in text
    assert 'llmctl:num_requests_waiting{engine="0",model_name="m"} 1.0' in text


def test_a_stop_string_whose_times_never_come_is_counted(bench: Bench) -> None:
    bench.client.generate([SequenceSpec([5], SamplingParams(max_tokens=9, stop=("E",)))])
    bench.step("0")
    assert bench.aborted == ["0"]
    bench.die()
    bench.die()
    text = bench.metrics.render()[0].decode()
    assert 'finished_reason="stop",model_name="m"} 1.0' in text
