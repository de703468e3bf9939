"""No memory for a step: it is taken back, fewer requests run at once, and nobody's tokens change."""

from __future__ import annotations

import logging

import pytest
from fake_runtime import FakeRuntime, expected_tokens

from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import SamplingBatch, StepPlan
from llmctl.errors import DeviceMemoryError


class Narrow(FakeRuntime):
    """Has memory for steps of up to ``most`` requests."""

    def __init__(self, most: int, steps_in_flight: int) -> None:
        super().__init__(num_blocks=64, steps_in_flight=steps_in_flight)
        self.most = most

    def execute(self, plan: StepPlan, sampling: SamplingBatch):
        if len(plan.slices) > self.most:
            raise DeviceMemoryError("the GPU is out of memory")
        return super().execute(plan, sampling)


def engine_of(most: int, depth: int) -> LLMEngine:
    return LLMEngine(Narrow(most, depth), SchedulerConfig(max_num_seqs=8))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("most", [1, 3])
def test_fewer_requests_run_and_all_are_answered_right(most: int, depth: int, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(most, depth)
    requests = [Request(f"r{i}", [i, 5, 7, 1, i], SamplingParams(temperature=0, max_tokens=6)) for i in range(7)]
    expected = {r.request_id: expected_tokens(r, 0, engine.limits, frozenset()) for r in requests}
    found: dict[str, list[int]] = {}
    engine.add_request(requests[0])  # it decodes when the others come
    for _ in range(2):
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.new_token_ids)
    engine.add_requests(requests[1:])
    with caplog.at_level(logging.WARNING, "llmctl.engine"):
        while engine.has_unfinished():
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.new_token_ids)
            engine.scheduler.check()
    assert found == expected
    assert engine.scheduler.max_num_seqs <= most
    assert "run at once from now on" in caplog.messages[0]


def test_a_step_of_one_request_is_an_error() -> None:
    engine = engine_of(0, 1)
    engine.add_request(Request("r", [1, 2, 3], SamplingParams(max_tokens=2)))
    with pytest.raises(DeviceMemoryError):
        engine.step()
    assert engine.scheduler.requests["r"].num_computed_tokens == 0
