"""How many of something a request may have, told from its outline: one table for all endpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmctl.errors import CapacityError, RequestError
from llmctl.serving.outline import Outline
from llmctl.serving.sampling_fields import check_template_variables
from llmctl.text.text_bounds import TextBounds

_OF_CONTEXT = {
    "prompt": (Outline.ids, "tokens"),
    "input": (Outline.ids, "tokens"),
    "tokens": (Outline.ids, "tokens"),
    "messages": (Outline.count, "messages"),
    "tools": (Outline.count, "tools"),
    "functions": (Outline.count, "functions"),
    "documents": (Outline.count, "documents"),
    "system": (Outline.count, "blocks"),
}
"""Fields of which a request has no more than the context has tokens, for each is one at least: how they are counted,
and what they are."""
_TEXTS = ("prompt", "input")
"""Fields that are a prompt where they are a single text, of what takes them."""
_OF_VOCABULARY = {
    "stop_token_ids": Outline.ids,
    "allowed_token_ids": Outline.ids,
    "logit_bias": Outline.members,
}
"""Fields of which a request has no more than there are tokens."""


@dataclass(frozen=True)
class Limits:
    """Of the requests to one model. max_model_len: tokens of its context. vocab_size: how many tokens it knows.
    bounds: what is known of its tokens' lengths."""

    max_model_len: int
    vocab_size: int
    bounds: Callable[[], TextBounds | None] = lambda: None

    def check(self, outline: Outline) -> None:
        """Refuse by its outline what has more of something than the model has room for.

        Raises:
            CapacityError, RequestError.
        """
        for name in filter(outline.takes, _TEXTS):
            self._check_text(outline, name)
        for name, (measure, items) in _OF_CONTEXT.items():
            # Ids are counted by their commas; to count other items takes several times as long as to count commas.
            if measure is Outline.ids or outline.may_have(name, self.max_model_len):
                self.check_items(name, measure(outline, name), items)
        for name, count in _OF_VOCABULARY.items():
            self.check_ids(name, count(outline, name))
        check_template_variables(outline)

    def _check_text(self, outline: Outline, name: str) -> None:
        """Refuse a text whose beginning alone has too many tokens.

        To decode 20 MB of escapes takes 0.2 s, in which nobody else is answered: parsers keep Python's lock.
        """
        if outline.size(name) <= self.max_model_len or (bounds := self.bounds()) is None:
            return
        if (needed := bounds.bytes_of(self.max_model_len + 1)) is None:
            return
        for size in (needed, 6 * needed):  # no escape of JSON takes more than six bytes for one
            self.check_fits(outline.beginning(name, size), name)

    def check_fits(self, text: str, param: str) -> None:
        """Refuse by its bytes alone a text that has too many tokens.

        Raises:
            CapacityError.
        """
        if 4 * len(text) > self.max_model_len and (bounds := self.bounds()) is not None:
            least = bounds.least_tokens(text)
            if least > self.max_model_len:
                raise self.too_long(f"at least {least} tokens", param)

    def check_items(self, param: str, count: int, items: str) -> None:
        """Refuse more of something than the context has tokens, where each is a token at least.

        Args:
            items: what they are, for the refusal.

        Raises:
            CapacityError.
        """
        if count > self.max_model_len:
            raise self.too_long(f"{count} {items}", param)

    def too_long(self, found: str, param: str) -> CapacityError:
        """The refusal of a prompt that has ``found``."""
        return CapacityError(
            f"this model's maximum context length is {self.max_model_len} tokens; the prompt has {found}",
            fix="shorten the prompt",
            param=param,
        )

    def check_ids(self, name: str, count: int) -> None:
        """Refuse more token ids in a parameter than there are.

        Raises:
            RequestError.
        """
        if count > self.vocab_size:
            raise RequestError(
                f"{name}: expected at most {self.vocab_size} token ids (the vocabulary), found {count}", param=name
            )
