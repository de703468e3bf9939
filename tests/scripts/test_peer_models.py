"""The models that scripts/bench_peers.py makes for the peers: what they hold, and of which model they are."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from peers import checkpoints, contest, origin


def test_a_work_folder_is_one_models(tiny_llama: Path, tmp_path: Path) -> None:
    mine, other = contest.Setup(tmp_path / "w", str(tiny_llama), (0,)), tmp_path / "other"
    origin.claim(mine)
    (mine.models / "bf16").mkdir()
    origin.claim(mine)
    shutil.copytree(tiny_llama, other)
    with pytest.raises(contest.PeerError, match=f"expected files made from {other} .* found {tiny_llama} "):
        origin.claim(replace(mine, model=str(other)))
    link = tmp_path / "link"
    link.symlink_to(tiny_llama)
    origin.claim(replace(mine, model=str(link)))
    (mine.models / origin.MARKER).unlink()
    with pytest.raises(contest.PeerError, match=f"{mine.models}: expected a made-from.json .* found none"):
        origin.claim(mine)


def test_a_changed_model_is_another(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    setup = contest.Setup(tmp_path / "w", str(model), (0,))
    origin.claim(setup)
    with (model / "config.json").open("a") as config:
        config.write("\n")
    with pytest.raises(contest.PeerError, match="expected files made from"):
        origin.claim(setup)


def test_w8a8_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    """What compressed-tensors readers expect: int8 linears with a scale a row, the rest bf16."""
    from safetensors.torch import load_file

    folder = checkpoints.w8a8_checkpoint(str(tiny_llama), tmp_path / "w8a8")
    dense = load_file(checkpoints.dense_checkpoint(str(tiny_llama), tmp_path / "bf16") / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    linears = [name for name in dense if name.endswith("proj.weight")]
    assert len(linears) == 7 * json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert set(found) == set(dense) | {f"{name}_scale" for name in linears}
    for name, weight in dense.items():
        if name not in linears:
            assert torch.equal(found[name], weight)
            continue
        scale = found[f"{name}_scale"]
        assert found[name].dtype == torch.int8
        assert scale.shape == (weight.shape[0], 1)
        rounding = 0.5 * scale + weight.float().abs() * 2**-8  # half a code, and the reference's own bf16
        assert ((found[name].float() * scale - weight.float()).abs() <= rounding).all()
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"
    assert (folder / "tokenizer.json").exists()


def test_the_dense_checkpoint_is_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoints.dense_checkpoint(str(tiny_llama), tmp_path / "bf16")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).float()(ids).logits
    torch.testing.assert_close(ours, theirs)
