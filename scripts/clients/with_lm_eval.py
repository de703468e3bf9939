"""lm-evaluation-harness: its models for OpenAI-compatible servers, given single requests as tasks make them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from scenarios import (
    FEW,
    MESSAGES,
    NO_MODEL,
    TEXT,
    Endpoint,
    expect,
    play,
    refused,
    repeats,
    said,
    tokenizer,
)


def texts(at: Endpoint, **options: Any) -> LocalCompletionsAPI:
    """A model of texts, which counts tokens with the model's own tokenizer."""
    os.environ["OPENAI_API_KEY"] = at.key
    return LocalCompletionsAPI(
        model=at.model,
        base_url=at.url + "/completions",
        tokenizer_backend="huggingface",
        tokenizer=tokenizer(),
        max_retries=1,
        **options,
    )


def instance(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, arguments, 0)]


def generated(model: Any, context: Any, **options: Any) -> str:
    wanted = {"until": ["\n\n\n"], "max_gen_toks": FEW, **options}
    (text,) = model.generate_until(instance("generate_until", context, wanted), disable_tqdm=True)
    return str(text)


def chat(at: Endpoint) -> None:
    os.environ["OPENAI_API_KEY"] = at.key
    model = LocalChatCompletion(model=at.model, base_url=at.url + "/chat/completions", max_retries=1)
    said(generated(model, model.apply_chat_template(MESSAGES)))


def completions(at: Endpoint) -> None:
    said(generated(texts(at), TEXT))


def seed(at: Endpoint) -> None:
    repeats(lambda n: generated(texts(at, seed=n), TEXT, temperature=1, do_sample=True))


def logprobs(at: Endpoint) -> None:
    def scores(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        asked = [item for pair in pairs for item in instance("loglikelihood", *pair)]
        return texts(at).loglikelihood(asked, disable_tqdm=True)

    right, wrong = scores([("The capital of France is", " Paris"), ("The capital of France is", " qxzj")])
    expect(wrong[0] < right[0] < 0, f"Paris to be likelier than noise, found {right}, {wrong}")
    expect(not wrong[1], "noise not to be greedy")


def bad_model(at: Endpoint) -> None:
    refused(lambda: completions(Endpoint(at.root, at.key, NO_MODEL)), "404")


def wrong_key(at: Endpoint) -> None:
    refused(lambda: completions(at.with_wrong_key()), "401")


if __name__ == "__main__":
    play(chat, completions, seed, logprobs, bad_model, wrong_key)
