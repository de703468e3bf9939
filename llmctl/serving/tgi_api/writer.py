"""What TGI's endpoints answer: a generated text with its tokens, whole or an event for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llmctl.engine.output import PositionLogprobs, TextOutput, TokenText, prompt_positions
from llmctl.errors import LlmctlError
from llmctl.serving.answer import Writer
from llmctl.serving.context import Model
from llmctl.serving.error_shapes import TGI, problem_of
from llmctl.serving.intake import Prompt
from llmctl.serving.logprobs import finite, shown
from llmctl.serving.responses import UsageCount, event
from llmctl.serving.tgi_api.protocol import GenerateParameters
from llmctl.serving.tgi_api.translate import wants_details


class TgiWriter(Writer):
    """``GenerateResponse`` and ``StreamResponse``.

    Args:
        inputs: the text that was given. listed: the whole answer is the one item of a list.
    """

    def __init__(
        self, model: Model, prompt: Prompt, given: GenerateParameters, inputs: str, *, listed: bool = False
    ) -> None:
        super().__init__(UsageCount(len(prompt.token_ids)), model.intake.workers)
        self.scores_prompts = bool(given.decoder_input_details)
        self._tokenizer = model.intake.tokenizer
        self._prompt = prompt
        self._given = given
        self._details = wants_details(given)
        self._before = inputs if given.return_full_text else ""
        self._listed = listed
        self._texts: list[str] = []
        self._num_chars = 0  # of those texts
        self._num_tokens = 0

    def document(self, outputs: list[TextOutput]) -> Any:
        """The text; of several the one whose tokens were likeliest, by TGI's measure, the mean of log-probabilities."""
        if not outputs:  # the client has gone, and nobody reads it
            return None
        best = max(outputs, key=_likelihood) if len(outputs) > 1 else outputs[0]
        made: dict[str, Any] = {"generated_text": self._before + best.text}
        if self._details:
            made["details"] = self._sequence(best)
            if len(outputs) > 1:
                rest = [output for output in outputs if output is not best]
                made["details"]["best_of_sequences"] = [
                    {"generated_text": self._before + output.text, **self._sequence(output)} for output in rest
                ]
        return [made] if self._listed else made

    def events(self, index: int, output: TextOutput) -> bytes:  # noqa: ARG002
        """An event for each token of a delta."""
        positions = output.logprobs or ()
        texts = list(_pieces(positions, output.text, self._num_chars))
        self._texts.append(output.text)
        self._num_chars += len(output.text)
        found = []
        for position, text in zip(positions, texts, strict=True):
            self._num_tokens += 1
            made: dict[str, Any] = {"index": self._num_tokens, "token": self._token(position.token, text)}
            if self._given.top_n_tokens:
                made["top_tokens"] = self._top(position)
            found.append({**made, "generated_text": None, "details": None})
        if output.finish_reason is not None:
            if not found:  # a grammar that was complete ended it, and what a stop string held back may be left
                found.append(self._end_of_sequence(output.text))
            found[-1]["generated_text"] = self._before + "".join(self._texts)
            found[-1]["details"] = self._ending(output) if self._details else None
        return b"".join(map(event, found))

    def failure(self, error: LlmctlError) -> bytes:
        """The error's document as an event."""
        return event(TGI.body(problem_of(error)))

    def _end_of_sequence(self, text: str) -> dict[str, Any]:
        """The last event of a text that ended without a token: clients look for the whole text at one's side."""
        token = {"id": min(self._tokenizer.eos_token_ids, default=0), "text": text, "logprob": None, "special": True}
        return {"index": self._num_tokens + 1, "token": token, "generated_text": None, "details": None}

    def _ending(self, output: TextOutput) -> dict[str, Any]:
        return {**self._facts(output), "input_length": len(self._prompt.token_ids)}

    def _facts(self, output: TextOutput) -> dict[str, Any]:
        return {
            "finish_reason": _finish_reason(output),
            "generated_tokens": output.num_output_tokens,
            "seed": self._given.seed,
        }

    def _sequence(self, output: TextOutput) -> dict[str, Any]:
        positions = output.logprobs or ()
        texts = _pieces(positions, output.text, 0)
        made = {
            **self._facts(output),
            "prefill": self._prefill(output),
            "tokens": [self._token(p.token, text) for p, text in zip(positions, texts, strict=True)],
        }
        if self._given.top_n_tokens:
            made["top_tokens"] = [self._top(position) for position in positions]
        return made

    def _prefill(self, output: TextOutput) -> list[dict[str, Any]]:
        if output.prompt_scores is None:
            return []
        positions = prompt_positions(self._tokenizer, self._prompt.token_ids, output.prompt_scores, 0)
        return [{"id": p.token.token_id, "text": shown(p.token), "logprob": finite(p.token.logprob)} for p in positions]

    def _token(self, token: TokenText, text: str | None = None) -> dict[str, Any]:
        """A token with the text that it adds; None: with its own."""
        special = token.token_id in self._tokenizer.special_token_ids
        named = shown(token) if special or text is None else ""
        return {
            "id": token.token_id,
            "text": (text or "") + named,
            "logprob": finite(token.logprob),
            "special": special,
        }

    def _top(self, position: PositionLogprobs) -> list[dict[str, Any]]:
        return [self._token(token) for token in position.top]


def _pieces(positions: Sequence[PositionLogprobs], text: str, start: int) -> Iterator[str]:
    """What each token adds to a text that began ``start`` characters before; the last, all that is left.

    A stop string that may begin holds text back: what a token says can come with the next.
    """
    at = 0
    for position in positions[1:]:
        end = position.offset - start
        yield text[at:end]
        at = end
    if positions:
        yield text[at:]


def _likelihood(output: TextOutput) -> float:
    positions = output.logprobs or ()
    return sum(position.token.logprob for position in positions) / max(1, len(positions))


def _finish_reason(output: TextOutput) -> str:
    if output.finish_reason == "length":
        return "length"
    return "stop_sequence" if isinstance(output.stop_reason, str) else "eos_token"
