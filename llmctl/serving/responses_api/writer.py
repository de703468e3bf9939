"""OpenAI's ``response``, whole or as its typed events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.responses import Response

from llmctl.engine.output import PositionLogprobs, TextOutput
from llmctl.engine.request import FinishReason
from llmctl.errors import LlmctlError
from llmctl.serving.answer import Writer
from llmctl.serving.context import Model
from llmctl.serving.generation import Generation
from llmctl.serving.intake import Prompt
from llmctl.serving.logprobs import chat_logprobs
from llmctl.serving.openai_errors import json_response
from llmctl.serving.protocol import ChatCompletionRequest
from llmctl.serving.responses import UsageCount, named_event
from llmctl.serving.responses_api.document import head
from llmctl.serving.responses_api.items import Event, OutputItems
from llmctl.serving.responses_api.protocol import ResponsesRequest
from llmctl.serving.responses_api.reading import ScoredReader
from llmctl.serving.responses_api.translate import reasoning_variables, renamed
from llmctl.serving.tools.message import MessageReader
from llmctl.serving.tools.support import ToolUse

_EFFORT_UNKNOWN = "reasoning.effort: this model's chat template knows no word for it"


class ResponseWriter(Writer):
    """Writes the one response to ``asked``, which became a request of chats."""

    def __init__(
        self,
        asked: ResponsesRequest,
        model: Model,
        prompt: Prompt,
        samples: int,
        body: ChatCompletionRequest,
        use: ToolUse,
    ) -> None:
        assert samples == 1
        super().__init__(UsageCount(len(prompt.token_ids)))
        intake = model.intake
        asks_effort = asked.reasoning is not None and asked.reasoning.effort is not None
        unknown = asks_effort and not reasoning_variables(asked, intake.tools.traits)
        self.warn(intake.tools.warning(body, use), _EFFORT_UNKNOWN if unknown else None)
        parser = use.parser(prompt.text)
        self._reader = ScoredReader(None if parser is None else MessageReader(parser, use))
        self._items = OutputItems(use.support.row.id_length)
        self._tokenizer, self._text_workers = intake.tokenizer, intake.workers
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._head = head(asked, model)
        self._reason: FinishReason | None = None
        self._number = 0

    async def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        """Part of ``Writer``."""
        begun = self._document("in_progress")
        yield self._encoded([{"type": f"response.{what}", "response": begun} for what in ("created", "in_progress")])
        try:
            async for batch in generation:
                for _, output in batch:
                    data = self._encoded(self._told(output))
                    if data:
                        yield data
            status = self._status()
            yield self._encoded([{"type": f"response.{status}", "response": await self._finished(status)}])
        except LlmctlError as error:
            yield self._encoded(self._failure(renamed(error)))

    async def response(self, outputs: list[TextOutput]) -> Response:
        """Part of ``Writer``."""
        for output in outputs:
            for _ in self._told(output):
                pass
        return json_response(await self._finished(self._status()), headers=self.headers)

    def _encoded(self, events: Iterator[Event] | Sequence[Event]) -> bytes:
        data = []
        for event in events:
            data.append(named_event({"type": event["type"], "sequence_number": self._number, **event}))
            self._number += 1
        return b"".join(data)

    def _told(self, output: TextOutput) -> Iterator[Event]:
        """The events of a delta of the output."""
        self.usage.count(0, output)
        reader, items = self._reader, self._items
        for piece, positions in reader.read(output):
            yield from items.add(piece, self._logprobs(positions), reader.complete)
        yield from items.close_call(reader.complete)
        if output.finish_reason is not None:
            self._reason = output.finish_reason
            yield from items.end(self._status(), reader.complete, self._logprobs(reader.rest))

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> list[dict[str, Any]]:
        found = chat_logprobs(positions, self._as_ids)
        return [] if found is None else [_with_bytes(entry) for entry in found["content"]]

    def _status(self) -> str:
        """Of the response at its end, and of what it ends with."""
        return "incomplete" if self._reason is FinishReason.LENGTH else "completed"

    async def _finished(self, status: str) -> dict[str, Any]:
        """The document of the end."""
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        reasoning = self._items.reasoning
        encode = self._tokenizer.encode
        tokens = await self._text_workers.finish(
            len(reasoning), lambda: len(encode(reasoning, add_special_tokens=False))
        )
        return self._document(status) | {
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": incomplete,
            "output": self._items.made,
            "usage": self._usage(tokens),
        }

    def _failure(self, error: LlmctlError) -> Iterator[Event]:
        """The events of the end by an error."""
        yield from self._items.close("incomplete", self._reader.complete)
        yield {"type": "error", "code": error.code or error.type, "message": str(error), "param": error.param}
        failed = {"code": _failure_code(error), "message": str(error), "param": error.param, "type": error.type}
        yield {
            "type": "response.failed",
            "response": self._document("failed") | {"error": failed, "output": self._items.made},
        }

    def _document(self, status: str) -> dict[str, Any]:
        return self._head | {"status": status}

    def _usage(self, reasoning_tokens: int) -> dict[str, Any]:
        usage = self.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens(1), "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": min(reasoning_tokens, usage.completion_tokens)},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _with_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """A token's entry; OpenAI's type knows no token without bytes."""
    made = {**entry, "bytes": entry["bytes"] or []}
    if "top_logprobs" in entry:
        made["top_logprobs"] = [_with_bytes(other) for other in entry["top_logprobs"]]
    return made


def _failure_code(error: LlmctlError) -> str:
    """Which of OpenAI's codes of failed responses it is."""
    if error.http_status == 429:
        return "rate_limit_exceeded"
    return "server_error" if error.http_status >= 500 else "invalid_prompt"
