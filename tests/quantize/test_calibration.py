import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import make_tokenizer
from random_models import write_model
from safetensors.torch import load_file, save_file

from llmctl.checkpoint.opening import open_checkpoint
from llmctl.errors import LlmctlError, UsageError
from llmctl.quantize.calibration import (
    check_lengths,
    file_of,
    random_prompts,
    read_calibration,
    self_calibration,
    source_digest,
)
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import checkpoint_runtime
from llmctl.text.tokenizer import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def test_text_windows_do_not_overlap_and_are_seeded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    windows = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    found = read_calibration(str(path), tokenizer, 8, 16, seed=3)
    assert found.tokens.dtype == torch.int32
    assert found.tokens.shape == (8, 16)
    assert all(row in windows for row in found.tokens.tolist())
    assert torch.equal(read_calibration(str(path), tokenizer, 8, 16, seed=3).tokens, found.tokens)
    everything = read_calibration(str(path), tokenizer, 10_000, 16, seed=0)
    assert everything.tokens.tolist() == windows
    assert "asked for 10000" in everything.note


def test_json_lines_hold_text_or_messages(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "sit down"}, {"role": "assistant", "content": "and read"}]
    path.write_text(json.dumps({"text": TEXT}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    tokens = read_calibration(str(path), tokenizer, 10_000, 8, seed=0).tokens.flatten().tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    assert text.startswith("the quick")
    assert "<|im_start|>user\nsit down<|im_end|>" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\nnot json\n', "a.jsonl:2: expected a JSON object"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: expected a JSON object"),
        ("b.jsonl", '{"prompt": "x"}\n', "expected a key 'text' or 'messages', found prompt"),
        ("c.txt", "too short", r"less than one sample.*or --calib-length \d"),
        ("c.txt", "a", r"less than one sample \(use more text\)$"),
        ("c.txt", "", "no text in it.*--calib self"),
        ("c.jsonl", "\n\n", "no text in it.*--calib self"),
        ("d.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("e.csv", "x", "expected a .txt or .jsonl file"),
    ],
)
def test_bad_files_are_refused(
    name: str, content: str | bytes, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as caught:
        read_calibration(str(path), tokenizer, 4, 64, seed=0)
    assert caught.value.param == "calib"


def test_sources_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a")
    assert file_of("self") is None
    assert file_of("org/dataset") is None
    assert file_of(str(path)) == path
    for missing in ("nothing.txt", "/nowhere/data", "./data"):
        with pytest.raises(UsageError, match="no such file"):
            file_of(missing)
    before = source_digest(str(path))
    path.write_text("b")
    assert before != source_digest(str(path))
    assert source_digest("self") == ""


def test_datasets_absent_is_one_clear_line(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="'datasets', which is not installed"):
        read_calibration("org/set", tokenizer, 4, 16, seed=0)


def test_datasets_rows_are_streamed_and_failures_told(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        if name == "org/missing":
            raise ConnectionError("cannot reach\nthe hub")
        return [{"text": TEXT}] if name == "org/set" else [{"prompt": "x"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_calibration("org/set:wiki:test", tokenizer, 4, 16, seed=0).tokens.shape == (4, 16)
    assert asked == [("org/set", "wiki", "test", True)]
    with pytest.raises(LlmctlError, match="cannot reach the hub"):
        read_calibration("org/missing", tokenizer, 4, 16, seed=0)
    with pytest.raises(UsageError, match="no column 'text'"):
        read_calibration("org/other", tokenizer, 4, 16, seed=0)


def test_random_prompts_start_with_bos_and_are_ordinary(tokenizer: Tokenizer) -> None:
    prompts = random_prompts(tokenizer, tokenizer.vocab_size, 200, seed=0)
    assert {p[0] for p in prompts} == {0}
    assert not {p[1] for p in prompts} & tokenizer.special_token_ids
    assert prompts == random_prompts(tokenizer, tokenizer.vocab_size, 200, seed=0)
    assert prompts != random_prompts(tokenizer, tokenizer.vocab_size, 200, seed=1)


def test_sizes_that_make_no_sense() -> None:
    check_lengths(1, 3, 3)
    for samples, length in ((0, 16), (4, 2), (4, 129)):
        with pytest.raises(UsageError):
            check_lengths(samples, length, 128)


def test_a_large_model_writes_its_text_with_the_weights_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def keep(*args: Any, **options: Any) -> ReferenceRuntime:
        made.append(checkpoint_runtime(*args, **options))
        return made[0]

    folder = write_model(tmp_path / "llama", "llama")
    wide = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in wide.items()}, folder / "model.safetensors")
    checkpoint, tokenizer = open_checkpoint(folder), Tokenizer.from_folder(folder)
    monkeypatch.setattr("llmctl.targets.reference.weights.checkpoint_runtime", keep)
    monkeypatch.setattr("llmctl.quantize.calibration._WIDE_BYTES", 0)
    monkeypatch.setattr(ReferenceRuntime, "close", lambda _: None)
    found = self_calibration(checkpoint, tokenizer, tokenizer.vocab_size, 3, 8, seed=0)
    assert found.tokens.shape == (3, 8)
    for name in ("q_proj", "gate_proj"):
        (stored,) = [n for n in checkpoint.names() if n.startswith("model.layers.0.") and f".{name}." in n]
        used = made[0].interpreter.weight(f"layers.0.{name}.weight")
        assert used.dtype == torch.bfloat16
        assert used.untyped_storage().data_ptr() == checkpoint.weight(stored).untyped_storage().data_ptr()
