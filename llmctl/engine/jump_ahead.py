"""Jump-ahead: tokens that a grammar leaves no choice about are known without being sampled.

After a sampled token, those whose masks would have one token each join the request's known tokens. The next step
computes them as one chunk, and samples what follows: a step less for each. They are the tokens that sampling would have
given, and the ones after them are sampled as ever: masks, penalties and the random stream go by known tokens and
positions.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile

from llmctl.engine.request import Request
from llmctl.structured.matcher import TokenMatcher

MOST_TOKENS = 16
"""At once. All requests wait while they are computed."""


def jump(request: Request, matcher: TokenMatcher, eos_token_ids: Collection[int]) -> tuple[tuple[int, ...], bool]:
    """Add what the grammar forces next to a request's known tokens: these, and whether they complete its output.

    None where log-probabilities are wanted, which sampling gives. An end-of-sequence token, which Lark can name, is
    left to be sampled.
    """
    room = request.max_length - len(request.token_ids)
    forced = matcher.forced(min(MOST_TOKENS, room)) if request.params.logprobs is None else []
    forced = list(takewhile(lambda token: token not in eos_token_ids, forced))
    complete = False
    for token in forced:
        complete = matcher.accept(token)
    request.token_ids += forced
    request.num_forced = len(forced)
    request.account.charge_output(len(forced))
    return tuple(forced), complete
