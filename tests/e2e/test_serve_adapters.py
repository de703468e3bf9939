"""Adapters of a real server: chosen by name in every API, loaded and unloaded while it runs, kept apart in caches."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from fixtures import ServerProcess, fetch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_adapters import llama_shapes, random_products, write_random
from safetensors.numpy import load_file, save_file

MODEL = "tiny-llama"
PROMPT = "the quick brown fox jumps over the lazy dog and"
ASK = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 0}
SHAPES = llama_shapes()
ATTENTION = {name: shape for name, shape in SHAPES.items() if "self_attn" in name}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters ``one`` (all modules), ``two`` (attention), and some that cannot be served."""
    root = tmp_path_factory.mktemp("adapters")
    write_random(root / "one", SHAPES, rank=4, seed=1)
    write_random(root / "two", ATTENTION, rank=8, seed=2)
    write_random(root / "three", ATTENTION, rank=2, seed=3)
    write_random(root / "large", ATTENTION, rank=9, seed=4)
    write_random(root / "other", {"model.layers.0.self_attn.q_proj": (32, 64)}, seed=5)
    (root / "empty").mkdir()
    (root / "out").symlink_to(root.parent)
    return root


@pytest.fixture(scope="module")
def server(tiny_engine: Path, folders: Path) -> Iterator[ServerProcess]:
    """One slot for two adapters of its own, and room for three in memory."""
    args = ("--model", str(tiny_engine), "--enable-lora", "--max-lora-rank", "8", "--max-cpu-loras", "3")
    modules = ("--lora-modules", f"one={folders / 'one'}", f"two={folders / 'two'}")
    with ServerProcess(*args, *modules, "--lora-dir", str(folders)) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def merged(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The model with adapter ``one`` in its weights."""
    folder = tmp_path_factory.mktemp("merged") / "m"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, (a, b) in random_products(SHAPES, 4, seed=1).items():
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + b @ a
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with ServerProcess("--model", str(folder), "--target", "reference") as process:
        process.wait_ready()
        yield process


def text_of(answer: Any) -> str:
    found: str = answer["choices"][0]["text"]
    return found


def ask(server: ServerProcess, model: str | None, **fields: Any) -> Any:
    status, answer = server.post("/v1/completions", {**ASK, **fields, **({"model": model} if model else {})})
    assert status == 200, answer
    return answer


def load(server: ServerProcess, name: str, path: str, **fields: Any) -> tuple[int, str]:
    return post_text(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **fields})


def unload(server: ServerProcess, name: str) -> tuple[int, str]:
    return post_text(server, "/v1/unload_lora_adapter", {"lora_name": name})


def post_text(server: ServerProcess, path: str, body: dict[str, Any]) -> tuple[int, str]:
    return fetch(server.url + path, json.dumps(body).encode())


def test_the_client_chooses_and_the_answer_is_the_merged_models(
    client: openai.OpenAI, server: ServerProcess, merged: ServerProcess
) -> None:
    """Log-probabilities within 1e-4 of the model that has the adapter in its weights."""
    answer = client.completions.create(model="one", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=0)
    assert answer.model == "one"
    expected = ask(merged, None)
    assert answer.choices[0].text == text_of(expected)
    found = answer.choices[0].logprobs.token_logprobs  # type: ignore[union-attr]
    np.testing.assert_allclose(found, expected["choices"][0]["logprobs"]["token_logprobs"], atol=1e-4)
    texts = {name: text_of(ask(server, name)) for name in ("one", "two", MODEL)}
    assert len(set(texts.values())) == 3


def test_every_api_chooses(client: openai.OpenAI, server: ServerProcess) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    chats = {}
    for name in ("one", "two", MODEL):
        chat = client.chat.completions.create(model=name, messages=messages, max_tokens=6, temperature=0)
        assert chat.model == name
        chats[name] = chat.choices[0].message.content
        response = client.responses.create(model=name, input=messages, max_output_tokens=6, temperature=0)
        assert (response.model, response.output_text) == (name, chats[name])
        body = {"model": name, "max_tokens": 6, "messages": messages, "temperature": 0}
        _, message = server.post("/v1/messages", body)
        assert (message["model"], message["content"][0]["text"]) == (name, chats[name])
        vector = client.embeddings.create(model=name, input=PROMPT)
        assert vector.model == name
        parameters = {"max_new_tokens": 8, **({"adapter_id": name} if name != MODEL else {})}
        _, generated = server.post("/generate", {"inputs": PROMPT, "parameters": parameters})
        assert generated["generated_text"] == text_of(ask(server, name))
        chunks = client.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
        parts = list(chunks)
        assert {part.model for part in parts} == {name}
        assert "".join(part.choices[0].text for part in parts) == text_of(ask(server, name))
    assert len(set(chats.values())) == 3


def test_models_are_listed_with_their_parent(client: openai.OpenAI, folders: Path) -> None:
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert list(listed)[:3] == [MODEL, "one", "two"]
    assert (listed[MODEL]["parent"], listed["one"]["parent"]) == (None, MODEL)
    assert listed["one"]["root"] == str(folders / "one")
    assert client.models.retrieve("two").model_dump()["root"] == str(folders / "two")


def test_prefixes_are_not_shared_between_adapters_nor_between_weights_of_one_name(
    server: ServerProcess,
) -> None:
    def cached(answer: Any) -> int:
        details = answer["usage"].get("prompt_tokens_details") or {}
        found: int = details.get("cached_tokens", 0)
        return found

    prompt = {"prompt": "a book about engines and kernels. " * 3}
    first = {name: ask(server, name, **prompt) for name in ("one", "two", MODEL)}
    assert {name: cached(answer) for name, answer in first.items()} == {"one": 0, "two": 0, MODEL: 0}
    for name in ("one", MODEL, "two"):
        again = ask(server, name, **prompt)
        assert (cached(again) > 0, text_of(again)) == (True, text_of(first[name]))
    assert load(server, "again", "one")[0] == 200
    assert cached(ask(server, "again", **prompt)) > 0  # the same weights under another name
    assert load(server, "again", "three", load_inplace=True)[0] == 200
    other = ask(server, "again", **prompt)
    assert cached(other) == 0
    assert text_of(other) not in {text_of(answer) for answer in first.values()}
    assert unload(server, "again")[0] == 200


def test_a_batch_of_all_is_what_each_is_alone(server: ServerProcess) -> None:
    """One slot: they take turns, and nobody is forgotten."""
    names = [*("one", "two", MODEL) * 6]
    alone = {name: text_of(ask(server, name)) for name in set(names)}
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: text_of(ask(server, name)), names))
    assert together == [alone[name] for name in names]


def test_load_unload_and_what_is_refused(server: ServerProcess) -> None:
    status, answer = server.post("/v1/completions", {**ASK, "model": "three"})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")
    assert "this server has: tiny-llama, one, two" in answer["error"]["message"]
    assert load(server, "three", "three") == (200, "Success: LoRA adapter 'three' added successfully.")
    assert text_of(ask(server, "three")) != text_of(ask(server, MODEL))
    for (name, path), (code, said) in {
        ("three", "three"): (400, "'three' is loaded already"),
        ("a,b", "three"): (400, "lora_name: "),
        ("a\n", "three"): (400, "lora_name: "),
        (MODEL, "three"): (400, "is the model's own name"),
        ("x", "nothing"): (404, "no folder of that name below --lora-dir"),
        ("x", "no\0name"): (404, "no folder of that name below --lora-dir"),
        ("x", ".."): (403, "found one outside it"),
        ("x", "/etc"): (403, "found one outside it"),
        ("x", "out"): (403, "found one outside it"),
        ("x", "out/.."): (403, "found one outside it"),
        ("x", "empty"): (404, "no adapter_config.json"),
        ("x", "large"): (400, "expected a rank of at most 8, found 9"),
        ("x", "other"): (400, "target_modules name modules without tensors"),
    }.items():
        status, text = load(server, name, path)
        assert (status, said in text) == (code, True), (path, status, text)
    assert unload(server, "three") == (200, "Success: LoRA adapter 'three' removed successfully.")
    assert unload(server, "three")[0] == 404
    assert server.post("/v1/completions", {**ASK, "model": "three"})[0] == 404


def test_requests_end_before_what_they_run_with_is_gone(server: ServerProcess) -> None:
    assert load(server, "three", "three")[0] == 200
    body = {**ASK, "model": "three", "max_tokens": 300, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/v1/completions", body)
        server.wait_load(1)
        page = server.get("/metrics")[1]
        info = next(line for line in page.splitlines() if line.startswith("llmctl:lora_requests_info{"))
        assert 'max_lora="1",running_lora_adapters="three",waiting_lora_adapters=""' in info
        status, said = unload(server, "three")
        assert (status, said.endswith("removed successfully; 1 of its requests are answered first.")) == (200, True)
        assert server.post("/v1/completions", {**ASK, "model": "three"})[0] == 404
        status, answer = running.result()
    assert (status, answer["usage"]["completion_tokens"]) == (200, 300)


NAMES = ("x", "y")
FOLDERS = ("one", "two", "three")
Operation = tuple[str, str, str]
"""What is done (``ask``, ``load``, ``replace``, ``unload``), the name, and the folder that is loaded."""
OPERATIONS: Any = st.tuples(
    st.sampled_from(["ask", "ask", "ask", "load", "replace", "unload"]),
    st.sampled_from(NAMES),
    st.sampled_from(FOLDERS),
)
LANES = st.lists(st.lists(OPERATIONS, min_size=1, max_size=6), min_size=2, max_size=4)


def check_lanes(server: ServerProcess, lanes: list[list[Operation]]) -> None:
    """Lanes at once, requests of the base and of a fixed adapter beside them: whoever asks for a name is answered by an
    adapter that had it, or is told that there is none; nothing else fails, and nothing is left."""
    expected = {name: text_of(ask(server, name)) for name in ("one", "two", MODEL)}
    assert load(server, "three", "three")[0] == 200
    expected["three"] = text_of(ask(server, "three"))
    assert unload(server, "three")[0] == 200
    had: dict[str, set[str]] = {name: set() for name in NAMES}
    for do, name, folder in (operation for lane in lanes for operation in lane):
        if do in ("load", "replace"):
            had[name].add(expected[folder])

    def play(lane: list[Operation]) -> list[str]:
        wrong = []
        for do, name, folder in lane:
            if do == "ask":
                status, answer = server.post("/v1/completions", {**ASK, "model": name})
                right = text_of(answer) in had[name] if status == 200 else status == 404
            elif do == "unload":
                status, answer = unload(server, name)
                right = status in (200, 404)
            else:
                status, answer = load(server, name, folder, load_inplace=do == "replace")
                right = status == 200 or (status == 400 and ("is loaded already" in answer or "being loaded" in answer))
            if not right:
                wrong.append(f"{do} {name} {folder}: {status} {answer}")
        return wrong

    def others(_: int) -> list[str]:
        return [f"{name} differs" for name in ("one", MODEL, "two") if text_of(ask(server, name)) != expected[name]]

    with ThreadPoolExecutor(len(lanes) + 2) as pool:
        beside = pool.map(others, range(2))
        wrong = [said for lane in pool.map(play, lanes) for said in lane] + [said for each in beside for said in each]
    assert wrong == []
    for name in NAMES:
        unload(server, name)
    assert [m["id"] for m in json.loads(server.get("/v1/models")[1])["data"]] == [MODEL, "one", "two"]


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(lanes=LANES)
def test_load_and_unload_under_load(server: ServerProcess, lanes: list[list[Operation]]) -> None:
    check_lanes(server, lanes)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(lanes=LANES)
def test_load_and_unload_under_load_at_length(server: ServerProcess, lanes: list[list[Operation]]) -> None:
    check_lanes(server, lanes)


def test_files_that_are_gone_or_others_are_told_of(server: ServerProcess, folders: Path) -> None:
    """Once they must be read again: three adapters fit into memory."""
    others = ("four", "five", "six")  # that no slot has, so that each is read
    for i, name in enumerate(("gone", "changed", *others)):
        write_random(folders / name, ATTENTION, rank=2, seed=10 + i)
        assert load(server, name, name)[0] == 200
    for name in others:
        unload(server, name)
    assert load(server, "three", "three")[0] == 200
    shutil.rmtree(folders / "gone")
    write_random(folders / "changed", ATTENTION, rank=2, seed=20)
    for name, code, said in (("gone", 404, "its files are gone"), ("changed", 503, "its files have changed")):
        status, answer = server.post("/v1/completions", {**ASK, "model": name})
        assert (status, said in answer["error"]["message"]) == (code, True), answer
        assert text_of(ask(server, "three"))
    assert load(server, "changed", "changed", load_inplace=True)[0] == 200
    assert text_of(ask(server, "changed"))
    for name in ("gone", "changed", "three"):
        assert unload(server, name)[0] == 200


def test_a_new_worker_knows_them(server: ServerProcess) -> None:
    before = {name: text_of(ask(server, name)) for name in ("one", "two")}
    (worker,) = psutil.Process(server.process.pid).children()
    os.kill(worker.pid, signal.SIGKILL)
    server.wait_status("/ready", 503, 10)
    server.wait_status("/ready", 200, 60)
    assert {name: text_of(ask(server, name)) for name in before} == before


def test_a_server_without_the_folder_loads_nothing(tiny_engine: Path, folders: Path) -> None:
    with ServerProcess("--model", str(tiny_engine), "--enable-lora", "--max-loras", "2") as process:
        process.wait_ready()
        status, text = load(process, "one", str(folders / "one"))
        assert (status, "not started with --enable-lora and --lora-dir" in text) == (403, True)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--lora-modules", "a=/nowhere"], "--lora-modules needs --enable-lora"),
        (["--max-loras", "2"], "--max-loras needs --enable-lora"),
        (["--enable-lora", "--lora-modules", "a=/nowhere"], "no such folder"),
        (["--enable-lora", "--lora-modules", "adapter"], "expected NAME=PATH, found 'adapter'"),
        (["--enable-lora", "--lora-modules", '{"name": "a"}'], "not a module"),
        (
            ["--enable-lora", "--lora-modules", "a=.", '{"name": "b", "path": "/nowhere"}', "c=x"],
            "--lora-modules b=/nowhere: no such folder",
        ),
        (["--enable-lora", "--lora-dir", "/nowhere"], "--lora-dir /nowhere: no such folder"),
        (["--enable-lora", "--max-loras", "4", "--max-cpu-loras", "3"], "expected at least --max-loras 4, found 3"),
    ],
)
def test_options_that_cannot_be(args: list[str], said: str, tiny_engine: Path) -> None:
    from typer.testing import CliRunner

    from llmctl.cli.main import app

    result = CliRunner().invoke(app, ["serve", "--model", str(tiny_engine), *args])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_one_that_cannot_be_served_keeps_the_server_from_starting(tiny_engine: Path, folders: Path) -> None:
    args = ("--model", str(tiny_engine), "--enable-lora", "--lora-modules", f"large={folders / 'large'}")
    with ServerProcess(*args, "--max-lora-rank", "8") as process:
        assert process.process.wait(60) != 0
        said = process.output
    assert "expected a rank of at most 8, found 9" in said
    assert "--max-lora-rank 9" in said


@pytest.mark.slow
def test_two_hundred_adapters_of_which_eight_are_resident(tiny_engine: Path, tmp_path: Path) -> None:
    """Memory does not grow with what is registered; everybody is answered as alone, base requests in between, too."""
    for i in range(200):
        write_random(tmp_path / str(i), SHAPES, rank=64, seed=i)
    args = ("--model", str(tiny_engine), "--enable-lora", "--max-loras", "8", "--max-lora-rank", "64")
    with ServerProcess(*args, "--max-cpu-loras", "16", "--lora-dir", str(tmp_path)) as server:
        server.wait_ready()
        size = sum(4 * 64 * (rows + columns) for rows, columns in SHAPES.values())

        def resident() -> int:
            return psutil.Process(server.worker_pid).memory_info().rss

        for i in range(40):
            assert load(server, f"a{i}", str(i))[0] == 200
        before = resident()
        for i in range(40, 200):
            assert load(server, f"a{i}", str(i))[0] == 200
        assert resident() - before < 40 * size < 160 * size
        alone = {name: text_of(ask(server, name)) for name in ("a0", "a77", "a199")}
        names = [*(f"a{i}" for i in range(200)), *alone, *(MODEL,) * 20]
        with ThreadPoolExecutor(64) as pool:
            texts = list(pool.map(lambda name: text_of(ask(server, name)), names))
        assert resident() - before < 40 * size
        assert {name: text for name, text in zip(names, texts, strict=True) if name in alone} == alone
        assert len(set(texts[:200])) > 150
