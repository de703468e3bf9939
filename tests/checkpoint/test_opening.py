"""What is no checkpoint, or a damaged one, is refused with what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import tiny_llama, write_folder
from tiny_checkpoint import dense_tensors, write_arrays

from llmctl.checkpoint.opening import open_checkpoint
from llmctl.errors import CheckpointError, ModelNotFoundError
from llmctl.text.tokenizer import Tokenizer


def test_damaged_folders(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_llama(folder, shard="40KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=f"{shard.name}: truncated: expected {len(whole)} .* {len(whole) - 10}"):
        open_checkpoint(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing shard {shard.name}"):
        open_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../etc/passwd"}}')
    with pytest.raises(CheckpointError, match="not a file name"):
        open_checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        open_checkpoint(folder)
    with pytest.raises(ModelNotFoundError):
        open_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000, '{"a":' * 70 + "1" + "}" * 70])
@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "generation_config.json"])
def test_deeply_nested_files(tmp_path: Path, name: str, text: str) -> None:
    folder = write_folder(tmp_path, {"eos_token_id": 2}, {"x": torch.ones(1)})
    (folder / name).write_text(text)
    with pytest.raises(
        CheckpointError, match=f"{name}: (expected a JSON object nested at most 64 deep|not valid JSON)"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 5}, None, {5, 2}),
        ({"eos_token_id": [5, 6]}, None, {5, 6, 2}),
        ({"eos_token_id": [5, 6]}, {"temperature": 0.5}, {5, 6, 2}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": None}, {5, 6, 2}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {7, 2}),
        ({}, {"eos_token_id": [7]}, {7, 2}),
        ({"eos_token_id": None}, None, {2}),
    ],
)
def test_ends_are_the_generation_configs_else_the_configs(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, ends: set[int]
) -> None:
    """Token 2 is the tokenizer's own."""
    folder = write_arrays(tmp_path, dense_tensors(), **config)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    files = open_checkpoint(folder).aux_files()
    assert Tokenizer.from_files(files).eos_token_ids == ends
    if generation is not None:
        kept = files["generation_config.json"]
        found = json.loads(kept if isinstance(kept, bytes) else kept.read_text())
        assert {**generation, "eos_token_id": 0} == {**found, "eos_token_id": 0}


@pytest.mark.parametrize("ends", ["2", [2, "3"], 1.5, True, -1, {"a": 1}])
def test_ends_that_are_no_ids(tmp_path: Path, ends: Any) -> None:
    folder = write_folder(tmp_path, {"eos_token_id": ends}, {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id: expected whole numbers, found"):
        open_checkpoint(folder)
