"""A step that is under way: what it will give back, once the device is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from llmctl.engine.step import StepResult, TokenScores
from llmctl.targets.cuda.errors import device_errors
from llmctl.targets.cuda.queue import Mark
from llmctl.targets.cuda.sampling import Described, Sampled

Execution = Literal["graph", "eager"]


@dataclass(frozen=True)
class Scores:
    """A request's score targets, in order."""

    request_id: str
    count: int
    top: int
    parts: tuple[Described, ...]

    def result(self) -> TokenScores:
        """Once the step's end is passed."""
        joined, at = TokenScores.zeros(self.count, self.top), 0
        for part in self.parts:
            scores = part.result()
            joined.put(at, scores)
            at += len(scores)
        return joined


class CudaStep:
    """A step that the device may still be running; an ``engine.step.PendingStep``."""

    def __init__(
        self,
        sampled: Sampled | None,
        scores: list[Scores],
        pooled: Mapping[str, Tensor],
        began: Mark,
        ended: Mark,
        execution: Execution,
    ) -> None:
        self._sampled, self._scores, self._pooled, self._execution = sampled, scores, pooled, execution
        self._began, self._ended = began, ended
        self._value: StepResult | None = None

    def result(self) -> StepResult:
        """Block until the step is done.

        Raises:
            DeviceError: the device failed.
        """
        if self._value is None:
            with device_errors():
                self._ended.wait()
            tokens, logprobs = (np.zeros(0, np.int32), None) if self._sampled is None else self._sampled.result()
            scores = {s.request_id: s.result() for s in self._scores}
            seconds = self._ended.seconds_since(self._began)
            pooled = {request: tensor.numpy() for request, tensor in self._pooled.items()}
            self._value = StepResult(tokens, logprobs, scores, seconds, self._execution, pooled)
        return self._value
