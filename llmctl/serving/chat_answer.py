"""OpenAI's ``chat.completion`` and ``chat.completion.chunk``."""

from __future__ import annotations

from typing import Any

from llmctl.engine.output import TextOutput
from llmctl.serving.answer import Answer
from llmctl.serving.context import Model
from llmctl.serving.intake import Prompt
from llmctl.serving.logprobs import chat_logprobs, prompt_logprobs
from llmctl.serving.protocol import ChatCompletionRequest
from llmctl.serving.responses import Envelope, UsageCount
from llmctl.serving.tools.message import MessageReader
from llmctl.serving.tools.support import ToolUse


class ChatAnswer(Answer):
    """``chat.completion`` and ``chat.completion.chunk``."""

    def __init__(self, model: Model, prompt: Prompt, samples: int, body: ChatCompletionRequest, use: ToolUse) -> None:
        """Each choice has a reader where there is something to take apart."""
        object_ = "chat.completion.chunk" if body.stream else "chat.completion"
        usage = UsageCount(len(prompt.token_ids))
        super().__init__(model, Envelope.new("chatcmpl", object_, model.name), usage, samples, body)
        self._prompt = prompt
        self._begun: set[int] = set()
        self.warn(model.intake.tools.warning(body, use))
        parsers = [use.parser(prompt.text) for _ in range(samples)]
        self._readers = [MessageReader(parser, use) for parser in parsers if parser is not None]

    def choice(self, index: int, output: TextOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        reason: str | None = output.finish_reason
        if self._readers:
            message = self._readers[index].message(output)
            reason = self._readers[index].finish_reason(reason)
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(output.logprobs, self.as_ids),
            "finish_reason": reason,
            "stop_reason": output.stop_reason,
        }

    def events(self, index: int, output: TextOutput) -> bytes:
        data = b""
        if index not in self._begun:
            self._begun.add(index)
            data += self._delta(index, {"role": "assistant", "content": None if self._readers else ""})
        logprobs = chat_logprobs(output.logprobs, self.as_ids)
        reason: str | None = output.finish_reason
        if self._readers:
            deltas = list(self._readers[index].deltas(output))
            reason = self._readers[index].finish_reason(reason)
        else:
            deltas = [{"content": output.text}] if output.text else []
        if not deltas and logprobs is not None and output.token_ids:
            deltas = [{} if self._readers else {"content": ""}]
        if not deltas and output.finish_reason is not None:
            deltas = [{}]
        for delta in deltas:
            # The end comes with the last of them: a chunk of its own would count as a token for who times tokens by
            # chunks.
            last = delta is deltas[-1]
            data += self._delta(index, delta, logprobs, reason if last else None, output.stop_reason)
            logprobs = None
        return data

    def document(self, outputs: list[TextOutput]) -> dict[str, Any]:
        body = super().document(outputs)
        scores = outputs[0].prompt_scores if outputs else None
        if self.prompt_logprobs is not None and scores is not None:
            body["prompt_logprobs"] = prompt_logprobs(self.tokenizer, self._prompt, scores, self.prompt_logprobs)
        return body

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if finish_reason is not None:
            choice["stop_reason"] = stop_reason
        return self.chunk(choice)
