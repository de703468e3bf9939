"""From a request of TGI's API to the completion that it stands for."""

from __future__ import annotations

from typing import Any

from llmctl.errors import RequestError
from llmctl.serving.protocol import CompletionRequest
from llmctl.serving.tgi_api.protocol import GenerateBody, GenerateParameters, JsonGrammar, JsonSchemaGrammar


def wants_stream(body: GenerateBody) -> bool:
    """Whether the answer is a stream."""
    return bool(body.stream) if body.streams is None else body.streams


def parameters_of(body: GenerateBody) -> GenerateParameters:
    """The parameters of a request; TGI samples where there are none at all."""
    return GenerateParameters(do_sample=True) if body.parameters is None else body.parameters


def check_parameters(given: GenerateParameters, *, stream: bool) -> None:
    """Refuse what cannot be honoured together, or would change nothing.

    Raises:
        RequestError: ``param`` names the parameter.
    """
    best_of = given.best_of or 1
    for name, asked in {"decoder_input_details": given.decoder_input_details, "best_of": best_of > 1}.items():
        if stream and asked:
            raise RequestError(f"{name}: not available in a stream", param=name)
    if given.top_n_tokens and not stream and not wants_details(given):
        raise RequestError("top_n_tokens: only with details, or in a stream", param="top_n_tokens")
    if best_of > 1 and not _samples(given):
        raise RequestError(
            "best_of: every sample would be the same", fix="set do_sample or a temperature", param="best_of"
        )


def wants_details(given: GenerateParameters) -> bool:
    """Whether the answer has ``details``."""
    return bool(given.details or given.decoder_input_details)


def completion_request(prompt: str | list[int], given: GenerateParameters, *, stream: bool) -> CompletionRequest:
    """The completion that a request asks for.

    Args:
        prompt: what the model is to continue, already truncated.
    """
    scored = stream or wants_details(given) or (given.best_of or 1) > 1
    return CompletionRequest(
        prompt=prompt,
        model=given.adapter_id,
        max_tokens=-1 if given.max_new_tokens is None else given.max_new_tokens,
        n=given.best_of or 1,
        stream=stream,
        temperature=given.temperature if _samples(given) else 0.0,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        seed=given.seed,
        stop=given.stop or None,
        include_stop_str_in_output=True,
        logprobs=given.top_n_tokens or 0 if scored else None,
        prompt_logprobs=0 if given.decoder_input_details else None,
        **_grammar(given),
    )


def _samples(given: GenerateParameters) -> bool:
    """Whether tokens are sampled: as TGI, also when a parameter says so that would change nothing else."""
    return bool(
        given.do_sample
        or given.temperature not in (None, 1.0)
        or (given.top_k or 0) > 0
        or given.top_p not in (None, 1.0)
    )


def _grammar(given: GenerateParameters) -> dict[str, Any]:
    grammar = given.grammar
    if grammar is None:
        return {}
    if isinstance(grammar, JsonGrammar):
        return {"guided_json": grammar.value}
    if isinstance(grammar, JsonSchemaGrammar):
        return {"guided_json": grammar.value.schema_}
    return {"guided_regex": grammar.value}
