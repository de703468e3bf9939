"""TGI's API through huggingface_hub's InferenceClient, on a real server."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests
from fixtures import LOOP_TEXT, ServerProcess
from huggingface_hub import InferenceClient, TextGenerationOutput
from huggingface_hub.errors import ValidationError

from llmctl.serving.tgi_api.schema import TgiErrorResponse

PROMPT = "a model"


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> InferenceClient:
    return InferenceClient(base_url=server.url, timeout=60)


def test_a_text_is_that_of_a_completion(client: InferenceClient, server: ServerProcess) -> None:
    text = client.text_generation(PROMPT, max_new_tokens=5)
    _, other = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "temperature": 0})
    assert text == other["choices"][0]["text"]
    assert client.text_generation(PROMPT, max_new_tokens=5, return_full_text=True) == PROMPT + text
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 5}}
    assert server.post("/generate", body) == (200, {"generated_text": text})


def test_a_stream_is_the_whole_text(client: InferenceClient) -> None:
    options: Any = {"max_new_tokens": 12, "seed": 1, "temperature": 1.5, "top_n_tokens": 2}
    whole = client.text_generation(PROMPT, details=True, **options)
    *before, last = list(client.text_generation(PROMPT, details=True, stream=True, **options))
    tokens = [output.token for output in (*before, last)]
    assert "".join(token.text for token in tokens if not token.special) == last.generated_text == whole.generated_text
    assert [token.id for token in tokens] == [token.id for token in whole.details.tokens]
    assert [token.logprob for token in tokens] == pytest.approx(
        [token.logprob for token in whole.details.tokens], abs=1e-4
    )
    assert [len(output.top_tokens) for output in (*before, last)] == [2] * len(tokens)
    assert all(output.generated_text is None for output in before)
    assert last.details.generated_tokens == whole.details.generated_tokens == len(tokens)
    assert last.details.seed == whole.details.seed == 1
    assert "".join(client.text_generation(LOOP_TEXT, max_new_tokens=9, stream=True)) == LOOP_TEXT


def test_a_stop_sequence_is_in_the_text(client: InferenceClient) -> None:
    options: Any = {"max_new_tokens": 20, "stop": ["🎉é"], "details": True}
    whole = client.text_generation(LOOP_TEXT, **options)
    *_, last = client.text_generation(LOOP_TEXT, stream=True, **options)
    assert whole.generated_text == last.generated_text == "é日🎉é"
    assert whole.details.finish_reason == last.details.finish_reason == "stop_sequence"


def test_details_of_the_prompt_and_of_samples(client: InferenceClient, server: ServerProcess) -> None:
    found: TextGenerationOutput = client.text_generation(
        PROMPT, max_new_tokens=3, details=True, decoder_input_details=True, best_of=3, do_sample=True, seed=5
    )
    status, tokens = server.post("/tokenize", {"prompt": PROMPT})
    assert status == 200
    assert [token.id for token in found.details.prefill] == tokens["tokens"]
    assert [token.logprob is None for token in found.details.prefill] == [True] + [False] * (tokens["count"] - 1)
    others = found.details.best_of_sequences
    assert len(others) == 2

    def likelihood(sequence: Any) -> float:
        return sum(token.logprob for token in sequence.tokens) / sequence.generated_tokens

    assert likelihood(found.details) >= max(map(likelihood, others))


def test_a_grammar(client: InferenceClient) -> None:
    text = client.text_generation(PROMPT, max_new_tokens=30, grammar={"type": "regex", "value": "(yes|no)"})
    assert text in ("yes", "no")
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    text = client.text_generation(PROMPT, max_new_tokens=100, grammar={"type": "json", "value": schema})
    assert json.loads(text) == {"a": 1}


def test_the_inputs_are_truncated_from_the_left(client: InferenceClient, server: ServerProcess) -> None:
    text = "a model reads é"
    _, tokens = server.post("/tokenize", {"prompt": text})
    kept = tokens["tokens"][-3:]
    assert len(kept) < tokens["count"]
    _, other = server.post("/v1/completions", {"prompt": kept, "max_tokens": 4, "temperature": 0})
    found = client.text_generation(text, max_new_tokens=4, truncate=3, details=True, decoder_input_details=True)
    assert found.generated_text == other["choices"][0]["text"]
    assert [token.id for token in found.details.prefill] == kept
    long = LOOP_TEXT * 100
    with pytest.raises(ValidationError, match="maximum context length"):
        client.text_generation(long, max_new_tokens=4)
    assert client.text_generation(long, max_new_tokens=9, truncate=18) == LOOP_TEXT
    assert client.text_generation(LOOP_TEXT * 10_000, max_new_tokens=9, truncate=18) == LOOP_TEXT


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"watermark": True}, "parameters.watermark: not supported"),
        ({"adapter_id": "x"}, "the model 'x' does not exist"),
        ({"typical_p": 0.5}, "parameters.typical_p: not supported"),
        ({"top_p": 7.0}, "parameters.top_p: "),
        ({"max_new_tokens": 9999}, "lower max_new_tokens"),
        ({"best_of": 129, "do_sample": True}, "parameters.best_of: "),
        ({"grammar": {"type": "regex", "value": "("}}, "^grammar: "),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_is_named(client: InferenceClient, options: Any, said: str, stream: bool) -> None:
    with pytest.raises(ValidationError, match=said):
        list(client.text_generation(PROMPT, stream=stream, **options))


def test_errors_of_the_paths(server: ServerProcess) -> None:
    def post(path: str, body: Any, **headers: str) -> tuple[int, str]:
        status, answer = server.post(path, body, **headers)
        document = TgiErrorResponse.model_validate(answer)
        assert document.error_type == "validation"
        return status, document.error

    # A page in a browser can send this across origins without asking.
    assert post("/", {"inputs": "x"}, **{"Content-Type": "text/plain"})[0] == 415
    assert post("/generate", {"inputs": "x", "stream": True})[1].startswith("stream: ")
    assert post("/generate_stream", {"inputs": "x", "stream": False})[1].startswith("stream: ")
    assert post("/generate", {})[1] == "inputs: Field required"
    assert post("/generate", {"inputs": ""})[1].startswith("inputs: expected at least one token")
    answer = requests.put(server.url + "/", timeout=10)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD, POST")
    TgiErrorResponse.model_validate_json(answer.content)


def test_facts_of_the_model(server: ServerProcess) -> None:
    facts = InferenceClient(server.url, provider="hf-inference").get_endpoint_info()
    assert (facts["model_id"], facts["max_total_tokens"]) == ("tiny-llama", 512)
    info = requests.get(server.url + "/tokenizer_info", timeout=10).json()
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert info["eos_token"] == "<|im_end|>"
    assert "add_generation_prompt" in info["chat_template"]
