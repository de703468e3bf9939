"""Offline use of an engine: prompts in, completions out; and the log-probabilities of given texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.output import OutputProcessor, TextOutput, merge_outputs
from llmctl.engine.request import Request, RequestTimes, fan_out
from llmctl.engine.sampling_params import SamplingParams
from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One sample of one prompt.

    Attributes:
        prompt_index: which prompt. sample_index: which of its n samples.
        prompt_token_ids: the prompt as the engine saw it.
        output: all of the output in one piece (text, token ids, log-probabilities, finish reason, times).
    """

    prompt_index: int
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    output: TextOutput

    @property
    def text(self) -> str:
        """The generated text."""
        return self.output.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The generated tokens."""
        return self.output.token_ids


def generate(
    engine: LLMEngine,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    on_finish: Callable[[Completion], None] | None = None,
) -> list[Completion]:
    """Complete prompts with continuous batching, as many at once as the engine takes.

    Args:
        engine: with no other requests under way.
        prompts: texts (encoded with the model's own special tokens) or token ids.
        params: one for all prompts, or one each.
        on_finish: called with each completion as it is done.

    Returns:
        In order of prompts; the n samples of a prompt one after the other.

    Raises:
        RequestError, CapacityError: a prompt that can never run; the others are aborted.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"generate: {len(prompts)} prompts but {len(each)} sampling parameters")
    run = _Run(engine, tokenizer, on_finish)
    encoded = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    return run.complete([Request(f"prompt-{i}", ids, p) for i, (ids, p) in enumerate(zip(encoded, each, strict=True))])


def score(engine: LLMEngine, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Log-probability of every token after the first, f32 [len-1]: what perplexity is made of.

    Raises:
        CapacityError: more tokens than the engine's max_model_len.
    """
    return score_all(engine, [token_ids])[0]


def score_all(engine: LLMEngine, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """``score`` of several sequences, batched.

    Raises:
        CapacityError: a sequence longer than the engine's max_model_len.
    """
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, temperature=0.0)
    requests = [Request(f"score-{i}", ids, params) for i, ids in enumerate(sequences)]
    scores: dict[str, NDArray[np.float32]] = {}

    def collect() -> None:
        for output in engine.step():
            if output.prompt_scores is not None:
                scores[output.request_id] = output.prompt_scores.logprobs

    _drain(engine, deque([r] for r in requests), collect)
    return [scores[r.request_id] for r in requests]


class _Run:
    """One call of ``generate``."""

    def __init__(self, engine: LLMEngine, tokenizer: Tokenizer, on_finish: Callable[[Completion], None] | None) -> None:
        self._engine = engine
        self._processor = OutputProcessor(tokenizer)
        self._on_finish = on_finish
        self._parts: dict[str, list[TextOutput]] = {}
        self._places: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self._done: dict[str, Completion] = {}

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        groups = [fan_out(request) for request in requests]
        for prompt_index, group in enumerate(groups):
            for sample_index, request in enumerate(group):
                self._places[request.request_id] = (prompt_index, sample_index, tuple(request.prompt_token_ids))
                self._parts[request.request_id] = []
                self._processor.add(request.request_id, request.prompt_token_ids, request.params)
        _drain(self._engine, deque(groups), self._step)
        return [self._done[request.request_id] for group in groups for request in group]

    def _step(self) -> None:
        processed = self._processor.process(self._engine.step())
        aborted = {ended.request_id: ended.times for ended in self._engine.abort(processed.aborts)}
        for output in processed.outputs:
            self._parts[output.request_id].append(output)
            if output.finish_reason is not None:
                self._finish(output.request_id, output.times or aborted[output.request_id])

    def _finish(self, request_id: str, times: RequestTimes | None) -> None:
        prompt_index, sample_index, prompt_ids = self._places[request_id]
        output = structs.replace(merge_outputs(self._parts.pop(request_id)), times=times)
        completion = Completion(prompt_index, sample_index, prompt_ids, output)
        self._done[request_id] = completion
        if self._on_finish is not None:
            self._on_finish(completion)


def _drain(engine: LLMEngine, groups: deque[list[Request]], step: Callable[[], None]) -> None:
    """Feed groups of requests (each all or none) as the queue has room, stepping until everything is done."""
    if engine.has_unfinished():
        raise ValueError("the engine is busy with other requests")
    room = engine.scheduler.config.max_num_queued_reqs
    try:
        while groups or engine.has_unfinished():
            while groups and (not engine.has_unfinished() or len(engine.scheduler.waiting) + len(groups[0]) <= room):
                engine.add_requests(groups.popleft())
            step()
    finally:
        engine.abort(list(engine.scheduler.requests))
