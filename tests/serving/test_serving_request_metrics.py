"""What a request leaves in the metrics, from the worker's messages; no process is started."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil
import pytest
from engine.fake_runtime import FakeRuntime
from small_tokenizers import byte_level

from llmctl.config import ServeConfig
from llmctl.engine.llm_engine import LLMEngine, TokenOutput
from llmctl.engine.request import FinishReason, Request, RequestTimes
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.errors import LlmctlError
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.engine_series import NO_STATS
from llmctl.serving.generation import Generation, SequenceSpec
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.wire import StepMessage, decode_event, encode


class Bench:
    """A client whose worker is played by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.metrics = ServerMetrics("m")
        self.client = AsyncEngineClient(ServeConfig(), self.metrics, stall_timeout=60)
        self.client.worker.tokenizer = byte_level()
        monkeypatch.setattr(self.client.worker, "send", lambda _: None)
        self.client.admit()

    def ask(self, prompts: int = 1, n: int = 1, **params: object) -> Generation:
        sample = SamplingParams(max_tokens=9, **params)  # type: ignore[arg-type]
        return self.client.generate([SequenceSpec([5, 6, 7], sample, samples=n)] * prompts * n)

    def end(self, name: str, tokens: int, cached: int = 0, preemptions: int = 0) -> None:
        times = RequestTimes(1.0, 2.0, 3.0, 5.0, preemptions)
        output = TokenOutput(name, (40,) * tokens, None, FinishReason.LENGTH, None, cached, None, times)
        self.step(output)

    def step(self, *outputs: TokenOutput) -> None:
        message = decode_event(encode(StepMessage(list(outputs), NO_STATS, 0.0)))
        assert isinstance(message, StepMessage)
        self.client.on_step(message)

    def value(self, name: str, **labels: str) -> float | None:
        labels = {"model_name": "m", "engine": "0", **labels}
        return self.metrics.registry.get_sample_value(f"llmctl:{name}", labels)

    def histogram(self, name: str) -> tuple[float | None, float | None]:
        """Count and sum."""
        return self.value(name + "_count"), self.value(name + "_sum")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_prompt_tokens_come_from_somewhere(bench: Bench) -> None:
    bench.ask(prompts=2)
    bench.end("0", 1, cached=2)
    bench.end("1", 1)
    assert bench.value("prompt_tokens_total") == 6
    assert bench.value("prompt_tokens_cached_total") == 2
    assert bench.value("prompt_tokens_by_source_total", source="local_compute") == 4
    assert bench.value("prompt_tokens_by_source_total", source="local_cache_hit") == 2
    assert bench.histogram("request_prefill_kv_computed_tokens") == (2, 4)


def test_each_sequence_has_its_limit_and_its_preemptions(bench: Bench) -> None:
    bench.ask(prompts=2)
    bench.end("0", 1, preemptions=3)
    bench.end("1", 4)
    assert bench.histogram("request_params_max_tokens") == (2, 18)
    assert bench.histogram("request_num_preemptions") == (2, 3)
    assert bench.value("request_num_preemptions_bucket", le="2.0") == 1


def test_the_samples_of_a_prompt_are_one_value(bench: Bench) -> None:
    bench.ask(prompts=2, n=3)
    for name, tokens in {"0": 1, "2": 4, "3": 2, "4": 2}.items():
        bench.end(name, tokens)
    assert bench.histogram("request_params_n") == (0, 0)
    bench.end("1", 3)
    assert bench.histogram("request_params_n") == (1, 3)
    assert bench.histogram("request_max_num_generation_tokens") == (1, 4)
    bench.end("5", 5)
    assert bench.histogram("request_params_n") == (2, 6)
    assert bench.histogram("request_max_num_generation_tokens") == (2, 9)


def test_a_sample_that_a_stop_string_ends_counts_too(bench: Bench) -> None:
    """Its times, preemptions among them, come when the engine has aborted it."""
    bench.ask(n=2, stop=("E",))
    bench.step(TokenOutput("0", (40,)), TokenOutput("1", (40,)))
    assert bench.histogram("request_params_n") == (0, 0)
    for name in ("0", "1"):
        times = RequestTimes(1.0, 2.0, 3.0, 5.0, 2)
        bench.step(TokenOutput(name, finish_reason=FinishReason.ABORT, times=times))
    assert bench.histogram("request_params_n") == (1, 2)
    assert bench.histogram("request_max_num_generation_tokens") == (1, 1)
    assert bench.histogram("request_num_preemptions") == (2, 4)
    assert bench.value("request_success_total", finished_reason="stop") == 2


def test_what_waits_for_a_worker_is_deferred(bench: Bench) -> None:
    bench.ask(prompts=2)
    bench.ask()
    bench.step(TokenOutput("2", (40,)))
    waiting: Callable[[str], float | None] = lambda reason: bench.value("num_requests_waiting_by_reason", reason=reason)  # noqa: E731
    assert (bench.value("num_requests_waiting"), waiting("deferred")) == (0, 0)
    bench.client.on_worker_lost(LlmctlError("dead"), "SIGKILL")
    bench.ask()
    assert (bench.value("num_requests_waiting"), waiting("deferred"), waiting("capacity")) == (3, 3, 0)
    bench.client.on_worker_back()
    stats = NO_STATS.__class__(1, 2, 0.5, 0, 0, 0, 7, 70, 60, 8)
    bench.client.on_step(StepMessage([], stats, 2.0))
    assert (bench.value("num_requests_waiting"), waiting("deferred"), waiting("capacity")) == (2, 0, 2)


def test_the_engine_says_at_the_end_how_often_it_preempted() -> None:
    engine = LLMEngine(FakeRuntime(num_blocks=4, block_size=4), SchedulerConfig(max_num_seqs=2))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    for name in ("a", "b"):
        engine.add_request(Request(name, [1, 2, 3, 4], params))
    outputs: list[TokenOutput] = []
    while engine.has_unfinished():
        outputs += engine.step()
    ends = {o.request_id: o.times.num_preemptions for o in outputs if o.times is not None}
    assert sum(ends.values()) == engine.stats().num_preemptions > 0
    assert ends["a"] == 0


def test_the_worker_is_shown_while_it_runs() -> None:
    metrics, pid = ServerMetrics("m"), [None, os.getpid()]
    metrics.watch(lambda: 0, lambda: pid[-1])

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"llmctl:worker_{name}", {"model_name": "m", "engine": "0"})

    me = psutil.Process()
    assert value("open_fds") == pytest.approx(me.num_fds(), abs=2)
    assert value("resident_memory_bytes") == pytest.approx(me.memory_info().rss, rel=0.1)
    assert value("cpu_seconds_total") == pytest.approx(sum(me.cpu_times()[:2]), abs=1)
    del pid[-1]
    assert value("open_fds") is None
    pid.append(2**22 + 1)  # beyond the largest there can be
    assert value("open_fds") is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [("queue_full", "max_num_queued_reqs"), ("context_length_exceeded", "context_length_exceeded")],
)
def test_a_full_queue_has_vllms_name(code: str, reason: str) -> None:
    metrics = ServerMetrics("m")
    metrics.rejected(code)
    labels = {"model_name": "m", "reason": reason}
    assert metrics.registry.get_sample_value("llmctl:admission_rejections_total", labels) == 1


def test_a_first_death_is_a_rise_from_zero(bench: Bench) -> None:
    assert bench.value("worker_restarts_total", reason="SIGKILL") == 0
    bench.client.on_worker_lost(LlmctlError("dead"), "SIGKILL")
    assert bench.value("worker_restarts_total", reason="SIGKILL") == 1
