"""An engine client whose worker is the test: its clock, what it says, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixtures import make_tokenizer
from msgspec import structs

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

INFO = EngineInfo("m", "llama", "reference", "none", "float32", 64, 16, 8, 300, 32, 0, 0, "float32", 2, 64)


def admitting_client(
    folder: Path, metrics: ServerMetrics, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> AsyncEngineClient:
    """A client whose worker is ready, and takes what it is sent without a word."""
    make_tokenizer(folder)
    client = AsyncEngineClient(config, metrics, stall_timeout=60.0)
    monkeypatch.setattr(client.worker, "tokenizer", Tokenizer.from_folder(folder))
    monkeypatch.setattr(client.worker, "info", INFO)
    monkeypatch.setattr(client.worker, "send", lambda _: None)
    client.admit()
    return client


class Server:
    """Two seats. ``now``: seconds on the clock that the client reads."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        self.now, self.stats = 1000.0, NO_STATS
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.metrics = ServerMetrics("m")
        self.client = admitting_client(folder, self.metrics, ServeConfig(**config), monkeypatch)

    def generate(self, deadline: Deadline, samples: int = 1) -> Generation:
        return self.client.generate([SequenceSpec([5], SamplingParams(), deadline=deadline)] * samples)

    def step(self, generation: Generation, after: float, *, last: bool = False, prompt_tokens: int = 0) -> None:
        """A token for each sequence, ``after`` seconds of a step, which computed so many tokens of prompts."""
        self.now += after
        self.stats = structs.replace(
            self.stats,
            num_steps=self.stats.num_steps + 1,
            last_step_tokens=prompt_tokens + len(generation.sequences),
            num_generated_tokens=self.stats.num_generated_tokens + len(generation.sequences),
        )
        reason = FinishReason.LENGTH if last else None
        outputs = [TokenOutput(s.request_id, (40,), finish_reason=reason) for s in generation.sequences]
        self.client.on_step(StepMessage(outputs, self.stats, self.now))

    def refuse(self, generation: Generation, error: LlmctlError) -> None:
        refused = [Refused([s.request_id], ErrorInfo.of(error)) for s in generation.sequences]
        self.client.on_step(StepMessage([], self.stats, self.now, refused))

    def counts(self) -> dict[str, float]:
        registry, labels = self.metrics.registry, {"model_name": "m", "engine": "0"}
        found = {
            name: registry.get_sample_value("llmctl:request_deadlines_total", {**labels, "outcome": name})
            for name in OUTCOMES
        }
        return {name: value for name, value in found.items() if value}
