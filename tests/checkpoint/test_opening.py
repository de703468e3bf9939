"""What is no checkpoint, or a damaged one, is refused with what is wrong with it."""

from pathlib import Path

import pytest
from checkpoint_samples import tiny_llama

from llmctl.checkpoint.opening import open_checkpoint
from llmctl.errors import CheckpointError, ModelNotFoundError


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
