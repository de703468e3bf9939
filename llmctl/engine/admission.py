"""What a request is refused for before it is queued, whatever else the scheduler holds."""

from __future__ import annotations

from llmctl.engine.request import Request, RequestStatus
from llmctl.engine.sampling_params import check_known
from llmctl.engine.step import RuntimeLimits
from llmctl.errors import CapacityError, RequestError


def check_request(
    request: Request, limits: RuntimeLimits, *, max_length: int, max_uncut: int | None, policy: str
) -> None:
    """Refuse what can never be served.

    Args:
        max_length: tokens of the longest sequence that fits the model and the KV cache. max_uncut: tokens of a step,
            where a prompt must be computed in one; None: it may be cut. policy: of the waiting queue.

    Raises:
        RequestError: a request that was added before, an empty prompt, n other than 1, a token id the model does not
            have, a grammar without its matcher, pooling with tokens to generate, or a deadline under ``fcfs``.
        CapacityError: a request that can never fit.
    """
    if request.status is not RequestStatus.WAITING or request.max_length:
        raise RequestError(f"request {request.request_id}: was added before", param="request_id")
    if request.params.n != 1:
        raise RequestError("n: the engine runs one sample a request; fan it out first", param="n")
    if (request.params.grammar is None) != (request.matcher is None):
        raise RequestError("grammar: expected a request with its matcher, compiled before it is added")
    if request.pooling is not None and request.params.max_tokens != 0:
        raise RequestError("max_tokens: expected 0 with pooling, which generates nothing", param="max_tokens")
    if not request.num_prompt_tokens:
        raise RequestError("prompt: expected at least one token, found none", param="prompt")
    check_known("prompt", request.token_ids, limits.vocab_size)
    request.params.check_vocab(limits.vocab_size)
    if request.deadline and policy == "fcfs":
        raise RequestError("deadline: the policy fcfs knows none", param="deadline")
    _check_capacity(request, limits, max_length, max_uncut)


def _check_capacity(request: Request, limits: RuntimeLimits, max_length: int, max_uncut: int | None) -> None:
    prompt, wanted = request.num_prompt_tokens, request.params.max_tokens
    output = max(1, request.params.min_tokens) if wanted is None else wanted
    if prompt + output > max_length:
        message = f"prompt of {prompt} tokens and {output} to generate need a context of {prompt + output} tokens"
        if max_length < limits.max_model_len:
            holds = f"the KV cache holds {max_length} tokens in all (max_model_len is {limits.max_model_len})"
        else:
            holds = f"max_model_len is {max_length}"
        raise CapacityError(f"{message}; {holds}", fix="shorten the prompt or lower max_tokens", param="prompt")
    if max_uncut is not None and prompt > max_uncut:
        raise CapacityError(
            f"prompt of {prompt} tokens; without chunked prefill at most max_num_batched_tokens = {max_uncut} fit",
            fix="shorten the prompt, enable chunked prefill or raise max_num_batched_tokens",
            param="prompt",
        )
