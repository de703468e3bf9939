"""Checks of a request's sampling fields that need neither the model nor its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import RequestError
from llmctl.serving.protocol import MAX_PROMPT_LOGPROBS, TOKEN_ID_KEY

_TOKEN_ID = re.compile(TOKEN_ID_KEY)


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
    if not given:
        return None
    # int() alone takes spaces, signs, underscores and leading zeros too: two keys could be one token.
    if not all(_TOKEN_ID.fullmatch(token) for token in given):
        raise RequestError("logit_bias: expected token ids as keys", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}
