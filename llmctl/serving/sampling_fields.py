"""Checks of a request's fields that need neither the model nor its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from llmctl.engine.sampling_params import SamplingParams, check_num_bad_words, check_num_stops
from llmctl.errors import RequestError
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import MAX_PROMPT_LOGPROBS

_DIGITS = b"0123456789,"
_IDS = msgspec.json.Decoder(list[int])

MAX_TEMPLATE_BYTES = 64 * 1024
"""Of JSON, for ``chat_template_kwargs``: switches of a template, and they are copied for it."""


def check_sampling(outline: Outline) -> None:
    """Refuse numbers out of their ranges, and too many stop strings or bad words.

    Raises:
        RequestError.
    """
    SamplingParams(**outline.numbers())
    check_num_stops(outline.strings("stop"))
    check_num_bad_words(outline.strings("bad_words"))


def check_template_variables(outline: Outline) -> None:
    """Refuse more variables for the chat template than any reads.

    Raises:
        RequestError.
    """
    found = len(outline.data("chat_template_kwargs"))
    if found > MAX_TEMPLATE_BYTES:
        raise RequestError(
            f"chat_template_kwargs: expected at most {MAX_TEMPLATE_BYTES} bytes of JSON, found {found}",
            fix="send only what the chat template reads",
            param="chat_template_kwargs",
        )


def check_scores(params: SamplingParams, prompt_tokens: int) -> None:
    """Bound what an answer holds of its prompts: it is whole in memory, and a prompt may be as long as the context.

    Raises:
        RequestError: more than ``MAX_PROMPT_LOGPROBS`` log-probabilities.
    """
    if params.prompt_logprobs is None:
        return
    count = prompt_tokens * params.n * (1 + params.prompt_logprobs)
    if count > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"prompt_logprobs: expected at most {MAX_PROMPT_LOGPROBS} log-probabilities in all, found {count} "
            f"({prompt_tokens} prompt tokens x {params.n} samples x {1 + params.prompt_logprobs})",
            fix="send fewer prompts in a request, or ask for fewer of the most likely tokens",
            param="prompt_logprobs",
        )


def logit_bias_of(given: Mapping[str, float] | None) -> dict[int, float] | None:
    """Biases by token id; None: there are none.

    Raises:
        RequestError: a key that is no token id.
    """
    return dict(zip(bias_ids(given), given.values(), strict=True)) if given else None


def bias_ids(given: Mapping[str, object]) -> list[int]:
    """The token ids that are the keys of biases, one at least.

    Raises:
        RequestError: a key that is no token id.
    """
    # Tens of thousands of them are no rarity: passes that run in C, for the event loop waits. int() would take spaces,
    # signs, underscores and leading zeros too: two keys could be one token. Digits and commas are JSON without those.
    keys = ",".join(given)
    try:
        if keys.encode().translate(None, _DIGITS):
            raise ValueError(keys)
        ids = _IDS.decode(f"[{keys}]")
    except ValueError:
        ids = []
    if len(ids) != len(given):  # a key with a comma is two
        raise RequestError("logit_bias: expected token ids as keys", param="logit_bias")
    return ids
