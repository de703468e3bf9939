"""OpenAI's ``text_completion``."""

from __future__ import annotations

from typing import Any

from llmctl.engine.output import TextOutput
from llmctl.serving.answer import Answer
from llmctl.serving.context import Model
from llmctl.serving.intake import Prompt
from llmctl.serving.logprobs import completion_logprobs, echoed_positions, prompt_logprobs
from llmctl.serving.protocol import CompletionRequest
from llmctl.serving.responses import Envelope, UsageCount


class CompletionAnswer(Answer):
    """``text_completion``."""

    def __init__(self, model: Model, prompts: list[Prompt], samples: int, body: CompletionRequest) -> None:
        usage = UsageCount(sum(len(p.token_ids) for p in prompts))
        super().__init__(model, Envelope.new("cmpl", "text_completion", model.name), usage, samples, body)
        self._prompts = prompts
        self._echo = bool(body.echo)
        self._logprobs = body.logprobs
        self.scores_prompts |= self._echo and body.logprobs is not None
        self._begun: set[int] = set()

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index // self.samples]

    def choice(self, index: int, output: TextOutput) -> dict[str, Any]:
        choice = self._choice(index, output, echoes=self._echo)
        if self.prompt_logprobs is not None and output.prompt_scores is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self.tokenizer, self._prompt(index), output.prompt_scores, self.prompt_logprobs
            )
        return choice

    def events(self, index: int, output: TextOutput) -> bytes:
        choice = self._choice(index, output, echoes=self._echo and index not in self._begun)
        self._begun.add(index)
        if not choice["text"] and choice["finish_reason"] is None and choice["logprobs"] is None:
            return b""
        return self.chunk(choice)

    def _choice(self, index: int, output: TextOutput, *, echoes: bool) -> dict[str, Any]:
        """What output adds to a choice; with its prompt if it ``echoes``."""
        return {
            "index": index,
            "text": (self._prompt(index).text or "") + output.text if echoes else output.text,
            "logprobs": self._logprobs_of(index, output, echoes),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _logprobs_of(self, index: int, output: TextOutput, echoes: bool) -> dict[str, list[Any]] | None:
        scores = output.prompt_scores if echoes else None
        if self._logprobs is None or (scores is None and output.logprobs is None):
            return None
        prompt = self._prompt(index)
        start = len(prompt.text or "") if self._echo else 0
        body = completion_logprobs(output.logprobs or (), self.as_ids, start)
        if scores is None:
            return body
        before = completion_logprobs(echoed_positions(self.tokenizer, prompt, scores, self._logprobs), self.as_ids)
        return {name: before[name] + body[name] for name in body}
