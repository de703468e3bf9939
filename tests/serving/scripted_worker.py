"""An engine client whose worker is the test: its clock, what it says, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixtures import make_tokenizer

from llmctl.config import ServeConfig
from llmctl.engine.deadline import Deadline
from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import LlmctlError
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.generation import Generation, SequenceSpec
from llmctl.serving.goodput import OUTCOMES
from llmctl.serving.metrics import NO_STATS, ServerMetrics
from llmctl.serving.wire import EngineInfo, ErrorInfo, Refused, StepMessage
from llmctl.text.tokenizer import Tokenizer


class Server:
    """Two seats. ``now``: seconds on the clock that the client reads."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        make_tokenizer(folder)
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.metrics = ServerMetrics("m")
        self.client = AsyncEngineClient(ServeConfig(**config), self.metrics, stall_timeout=60.0)
        monkeypatch.setattr(self.client.worker, "tokenizer", Tokenizer.from_folder(folder))
        info = EngineInfo("m", "llama", "reference", "none", "float32", 64, 16, 8, 300, 0, 0, "float32", 2, 64)
        monkeypatch.setattr(self.client.worker, "info", info)
        monkeypatch.setattr(self.client.worker, "send", lambda _: None)
        self.client.admit()

    def generate(self, deadline: Deadline, samples: int = 1) -> Generation:
        return self.client.generate([SequenceSpec([5], SamplingParams(), deadline=deadline)] * samples)

    def step(self, generation: Generation, after: float, *, last: bool = False) -> None:
        self.now += after
        reason = FinishReason.LENGTH if last else None
        outputs = [TokenOutput(s.request_id, (40,), finish_reason=reason) for s in generation.sequences]
        self.client.on_step(StepMessage(outputs, NO_STATS, 0.0))

    def refuse(self, generation: Generation, error: LlmctlError) -> None:
        refused = [Refused([s.request_id], ErrorInfo.of(error)) for s in generation.sequences]
        self.client.on_step(StepMessage([], NO_STATS, 0.0, refused))

    def counts(self) -> dict[str, float]:
        registry, labels = self.metrics.registry, {"model_name": "m", "engine": "0"}
        found = {
            name: registry.get_sample_value("llmctl:request_deadlines_total", {**labels, "outcome": name})
            for name in OUTCOMES
        }
        return {name: value for name, value in found.items() if value}
