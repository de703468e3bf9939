"""Embeddings of a real server: through the official openai client, against transformers, beside chats."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fixtures import ServerProcess
from numpy.typing import NDArray

from llmctl.text.tokenizer import Tokenizer

MODEL = "tiny-llama"
HIDDEN = 64
TEXTS = ["the quick brown fox", "a model is a graph", "é", "stop here or go on: the answer " * 12]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def states(tiny_llama: Path) -> list[NDArray[np.float64]]:
    """transformers' hidden states of each text, [tokens, HIDDEN]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    tokenizer = Tokenizer.from_folder(tiny_llama)
    found = []
    for text in TEXTS:
        with torch.no_grad():
            made = model(torch.tensor([tokenizer.encode(text)]), output_hidden_states=True)
        found.append(made.hidden_states[-1][0].numpy())
    return found


def unit(vector: NDArray[Any]) -> NDArray[Any]:
    return vector / np.linalg.norm(vector)


def vectors(client: openai.OpenAI, **fields: Any) -> list[NDArray[Any]]:
    return [np.array(entry.embedding) for entry in client.embeddings.create(model=MODEL, **fields).data]


def test_a_batch_is_what_transformers_has(client: openai.OpenAI, states: list[NDArray[np.float64]]) -> None:
    """The client asks for base64 unless it is told otherwise."""
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    assert (answer.object, answer.model) == ("list", MODEL)
    assert [entry.index for entry in answer.data] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(s) for s in states)
    for entry, expected in zip(answer.data, states, strict=True):
        np.testing.assert_allclose(entry.embedding, unit(expected[-1]), atol=1e-5)
    for found, expected in zip(
        vectors(client, input=TEXTS, encoding_format="float", extra_body={"pooling": "mean"}), states, strict=True
    ):
        np.testing.assert_allclose(found, unit(expected.mean(0)), atol=1e-5)


def test_dimensions_and_length(client: openai.OpenAI, states: list[NDArray[np.float64]]) -> None:
    (short,) = vectors(client, input=TEXTS[0], dimensions=5)
    np.testing.assert_allclose(short, unit(states[0][-1][:5]), atol=1e-5)
    (plain,) = vectors(client, input=TEXTS[0], dimensions=HIDDEN, extra_body={"normalize": False})
    np.testing.assert_allclose(plain, states[0][-1], rtol=1e-3, atol=1e-4)


def test_every_kind_of_input(client: openai.OpenAI, server: ServerProcess) -> None:
    _, tokens = server.post("/tokenize", {"prompt": TEXTS[0]})
    ids = tokens["tokens"]
    (expected,) = vectors(client, input=TEXTS[0])
    for given in ([TEXTS[0]], ids, [ids]):
        np.testing.assert_allclose(vectors(client, input=given), [expected], atol=1e-6)
    assert len(vectors(client, input=[ids, ids[:2], ids])) == 3


def test_base64_on_the_wire(server: ServerProcess) -> None:
    body = {"input": "a", "encoding_format": "base64", "dimensions": 3}
    status, answer = server.post("/embeddings", body)
    assert status == 200
    assert len(base64.b64decode(answer["data"][0]["embedding"], validate=True)) == 12
    assert set(answer["usage"]) == {"prompt_tokens", "total_tokens"}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": []}, "input", "expected at least one prompt"),
        ({"input": ""}, "input", "at least one token, found none"),
        ({"input": [[]]}, "input", "at least one token, found none"),
        ({"input": [[5], [384]]}, "input", "token id 384 is outside the vocabulary"),
        ({"input": [5] * 513}, "input", "maximum context length is 512 tokens; the prompt has 513"),
        ({"input": "x y " * 5000}, "input", "maximum context length"),
        ({"input": ["a"] * 1025}, "input", "at most 1024 sequences"),
        ({"input": "a", "dimensions": 65}, "dimensions", "at most the model's 64, found 65"),
        ({"input": "a", "truncate_prompt_tokens": 4}, "truncate_prompt_tokens", "not supported"),
        ({"input": "a", "pooling": "cls"}, "pooling", "'last' or 'mean'"),
        ({"prompt": "a"}, "input", "Field required"),
        ({"input": "a", "deadline": "soon"}, "deadline", "expected ttft:MS"),
    ],
)
def test_what_is_refused(server: ServerProcess, fields: dict[str, Any], param: str, said: str) -> None:
    status, answer = server.post("/v1/embeddings", fields)
    assert (status, answer["error"]["param"]) == (400, param)
    assert said in answer["error"]["message"]


def test_one_as_long_as_the_context(client: openai.OpenAI) -> None:
    assert len(vectors(client, input=[[5 + i % 300 for i in range(512)]], extra_body={"pooling": "mean"})) == 1


def test_chats_beside_embeddings_are_what_they_are_alone(client: openai.OpenAI) -> None:
    def chat(seed: int) -> str:
        return (
            client.completions.create(
                model=MODEL, prompt="a model", max_tokens=24, seed=seed, extra_body={"ignore_eos": True}
            )
            .choices[0]
            .text
        )

    alone = [chat(seed) for seed in range(4)]
    expected = vectors(client, input=TEXTS, extra_body={"pooling": "mean"})
    with ThreadPoolExecutor(8) as threads:
        chats = [threads.submit(chat, seed) for seed in range(4)]
        embedded = [threads.submit(vectors, client, input=TEXTS * 5, extra_body={"pooling": "mean"}) for _ in range(4)]
        assert [each.result() for each in chats] == alone
        for each in embedded:
            np.testing.assert_allclose(each.result(), expected * 5, atol=1e-5)


def test_the_servers_pooling_and_its_record(tiny_engine: Path, tmp_path: Path) -> None:
    """Also a deadline with a time between tokens, of which an embedding has none."""
    log = tmp_path / "log"
    options = ("--pooling", "mean", "--deadline", "ttft:60000,itl:0.001", "--request-log", str(log))
    with ServerProcess("--model", str(tiny_engine), *options, "--request-log-text") as server:
        server.wait_ready()
        made = {}
        for pooling in (None, "mean", "last"):
            body = {"input": [TEXTS[0], "a"], "pooling": pooling, "user": "u", "priority": -1, "dimensions": 4}
            status, answer = server.post("/v1/embeddings", body)
            assert status == 200, answer
            made[pooling] = answer["data"][0]["embedding"]
        assert made[None] == made["mean"] != made["last"]
        _, page = server.get("/metrics")
        assert f'request_success_total{{engine="0",finished_reason="stop",model_name="{MODEL}"}} 6.0' in page
        assert 'outcome="met"' in page
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["endpoint"] for record in records] == ["/v1/embeddings"] * 3
    for record in records:
        assert (record["tenant"], record["priority"], record["prompts"]) == ("user u", -1, [TEXTS[0], "a"])
        assert (record["status"], record["output_tokens"], record["finish_reasons"]) == (200, 0, ["stop", "stop"])
        assert (record["stream"], record["n"], record["max_tokens"], record.get("outputs")) == (None,) * 4
        assert record["e2e_s"] > 0
