"""Tokenizer: what it reads from a model's folder, and how it refuses a damaged one."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_fallback, byte_fallback_backend, byte_level, byte_level_backend

from llmctl.errors import CheckpointError, RequestError
from llmctl.text.tokenizer import Tokenizer


def folder(path: Path, **files: Any) -> Path:
    """A model folder with a good ``tokenizer.json``, and the JSON files given by name."""
    byte_level_backend().save(str(path / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / f"{name}.json").write_text(text, encoding="utf-8")
    return path


def test_round_trip_and_vocabulary(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder(tmp_path))
    ids = tokenizer.encode("The fox 世界 😀<|im_end|>")
    assert ids[-1] == tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.decode(ids) == "The fox 世界 😀"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "The fox 世界 😀<|im_end|>"
    assert tokenizer.id_to_token(ids[-1]) == "<|im_end|>"
    assert tokenizer.id_to_token(10_000) is None
    assert tokenizer.vocab_size == max(i for i in range(1000) if tokenizer.id_to_token(i) is not None) + 1
    assert tokenizer.chat_template is None


def test_special_tokens_as_text_or_objects_and_the_config_wins(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "special": True}, "pad_token": None}
    tokenizer = Tokenizer.from_folder(
        folder(tmp_path, tokenizer_config=config, special_tokens_map={"eos_token": "</s>", "unk_token": "<s>"})
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|im_end|>")
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<s>"}


@pytest.mark.parametrize(("listed", "ids"), [(7, {7}), ([7, 9], {7, 9}), (None, set())])
def test_ends_are_the_generation_configs_and_the_tokenizers(tmp_path: Path, listed: Any, ids: set[int]) -> None:
    tokenizer = Tokenizer.from_folder(
        folder(tmp_path, tokenizer_config={"eos_token": "</s>"}, generation_config={"eos_token_id": listed})
    )
    assert tokenizer.eos_token_ids == ids | {tokenizer.token_to_id("</s>")}


def test_truncation_saved_with_a_tokenizer_is_off(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"


def test_chat_template_file_wins_over_the_config(tmp_path: Path) -> None:
    config = {"chat_template": "config", "bos_token": "<s>"}
    made = Tokenizer.from_folder(folder(tmp_path, tokenizer_config=config)).chat_template
    assert made is not None
    assert made.render([]) == "config"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    made = Tokenizer.from_folder(tmp_path).chat_template
    assert made is not None
    assert made.render([]) == "<s>file"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    made = Tokenizer.from_folder(folder(tmp_path, tokenizer_config={"chat_template": named})).chat_template
    assert made is not None
    assert made.render([]) == "d"


def test_files_may_come_as_bytes(tmp_path: Path) -> None:
    files = {
        "tokenizer.json": byte_level_backend().to_str().encode(),
        "tokenizer_config.json": b'{"eos_token": "</s>"}',
    }
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer.encode("fox") == Tokenizer.from_folder(folder(tmp_path)).encode("fox")
    assert tokenizer.eos_token_ids == {tokenizer.token_to_id("</s>")}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer": "{"}, "tokenizer.json is not understood"),
        ({"tokenizer_config": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json is not valid JSON: nested too deeply"),
        (
            {"generation_config": {"eos_token_id": [[]] * 10_000}},
            r"eos_token_id: expected integers, found \[\[\], \[\]",
        ),
        ({"tokenizer_config": "[]"}, "tokenizer_config.json: expected a JSON object, found list"),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id: expected integers, found '2'"),
        ({"tokenizer_config": {"chat_template": [{"name": "x", "template": "y"}]}}, r"'default' \(found: x\)"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template: expected text, found int"),
        ({"tokenizer_config": {"chat_template": "{% if %}"}}, "chat template: line 1"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        Tokenizer.from_folder(folder(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        Tokenizer.from_folder(tmp_path)


def test_what_is_no_text_and_no_token_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="not valid Unicode at character 1"):
        byte_level().encode("a\ud800")
    for bad in (-1, 2**32):
        with pytest.raises(RequestError, match=f"{bad} is not a token id"):
            byte_level().decode([5, bad])


def test_token_bytes_of_byte_level_tokens_are_raw_bytes() -> None:
    tokenizer = byte_level()
    assert tokenizer.token_bytes(tokenizer.token_to_id("Ġ") or 0) == b" "
    assert tokenizer.token_bytes(tokenizer.token_to_id("Ġfox") or 0) == b" fox"
    assert tokenizer.token_bytes(tokenizer.token_to_id("<tool call>") or 0) == b"<tool call>"
    alphabet = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert {bytes([b]) for b in range(256)} <= alphabet
    assert tokenizer.token_bytes(10_000) == b""


def test_token_bytes_of_sentencepiece_tokens_keep_their_space() -> None:
    tokenizer = byte_fallback()
    assert tokenizer.token_bytes(tokenizer.token_to_id("▁fox") or 0) == b" fox"
    assert tokenizer.first_token_bytes(tokenizer.token_to_id("▁fox") or 0) == b"fox"
    assert tokenizer.token_bytes(tokenizer.token_to_id("<0xE4>") or 0) == b"\xe4"
    assert tokenizer.token_bytes(tokenizer.token_to_id("<s>") or 0) == b"<s>"
    assert byte_fallback_backend().decode([tokenizer.token_to_id("▁fox") or 0]) == "fox"


def test_a_long_text_lets_other_threads_run_and_has_the_same_tokens() -> None:
    """Python's lock is free in the backend's batch forms only."""
    tokenizer, backend = byte_level(), byte_level_backend()
    text = "The fox; 世界 é " * 2000
    ids = tokenizer.encode(text)
    assert ids == backend.encode(text).ids
    assert tokenizer.decode(ids) == backend.decode(ids) == text
    assert tokenizer.encode_up_to(len(ids), text) == ids
    assert tokenizer.encode_up_to(len(ids) - 1, text) == len(ids)
    for work in (lambda: tokenizer.encode(text * 8), lambda: tokenizer.decode(ids * 40)):
        with _Ticking() as ticking:
            work()
        assert ticking.count > 3


class _Ticking:
    """Counts how often another thread gets to run, a few ms apart."""

    def __enter__(self) -> _Ticking:
        self.count, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._tick)
        self._thread.start()
        time.sleep(0.01)
        self.count = 0
        return self

    def __exit__(self, *_: object) -> None:
        count = self.count
        self._end.set()
        self._thread.join()
        self.count = count

    def _tick(self) -> None:
        while not self._end.wait(0.001):
            self.count += 1
