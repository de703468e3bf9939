"""Checkpoint against transformers' own folders, AWQ and GPTQ folders, headless names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_samples import random_weight, same_weight, tiny_llama, write_folder

from llmctl.checkpoint import awq, gptq
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.graph import QuantScheme

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


@pytest.mark.parametrize(("tied", "shard"), [(False, "1GB"), (True, "1GB"), (False, "40KB")])
def test_reads_what_transformers_writes(tmp_path: Path, tied: bool, shard: str) -> None:
    model = tiny_llama(tmp_path, tied=tied, shard=shard)
    checkpoint = open_checkpoint(tmp_path)
    state = model.state_dict()
    assert set(checkpoint.names()) == set(state) - ({"lm_head.weight"} if tied else set())
    assert checkpoint.has("lm_head.weight") is not tied
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.quantization is None
    for name in checkpoint.names():
        assert torch.equal(checkpoint.weight(name), state[name])
        info = checkpoint.describe(name)
        assert (info.shape, info.dtype, info.quant) == (tuple(state[name].shape), "BF16", None)
    assert checkpoint.nbytes == sum(checkpoint.describe(name).nbytes for name in checkpoint.names())


@pytest.mark.parametrize("base_only", [False, True])
def test_gpt2_names_with_and_without_prefix(tmp_path: Path, base_only: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    (model.transformer if base_only else model).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    name = "transformer.h.0.attn.c_attn.weight"
    assert checkpoint.has(name)
    assert checkpoint.describe(name).shape == (32, 96)  # Conv1D: [in, out], as stored
    assert torch.equal(checkpoint.weight(name), model.state_dict()[name])


def quantized_folder(path: Path, weight: QuantizedWeight, planes: dict, config: dict, **files: dict) -> Path:
    tensors = {f"model.layers.0.mlp.up_proj.{suffix}": plane for suffix, plane in planes.items()}
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.ones(weight.shape[0])
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(3, 5)
    write_folder(path, {"quantization_config": config} if config else {}, tensors)
    for name, document in files.items():
        (path / f"{name}.json").write_text(json.dumps(document))
    return path


UP = "model.layers.0.mlp.up_proj.weight"


def test_awq_folder(tmp_path: Path) -> None:
    weight = random_weight(16, 64)
    ignored = {"modules_to_not_convert": ["lm_head"]}
    checkpoint = open_checkpoint(quantized_folder(tmp_path, weight, awq.pack(weight), {**AWQ, **ignored}))
    assert same_weight(checkpoint.weight(UP), weight)
    info = checkpoint.describe(UP)
    assert (info.shape, info.quant, info.dtype) == ((16, 64), weight.scheme, "F16")
    assert info.nbytes == 16 * 64 // 2 + 2 * 16 // 2 + 2 * 16 * 2
    assert checkpoint.quantization.ignored == ("lm_head",)
    assert checkpoint.names() == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.0.mlp.up_proj.weight",
    ]
    # Presence of qweight decides, module by module.
    assert checkpoint.describe("model.layers.0.mlp.down_proj.weight").quant is None
    assert isinstance(checkpoint.weight("model.layers.0.mlp.down_proj.weight"), torch.Tensor)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", gptq.FORMATS)
@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_gptq_folder(tmp_path: Path, bits: int, layout: str, key: str) -> None:
    weight = random_weight(32, 64, bits, act_order=True)
    config = {**GPTQ, "bits": bits, "desc_act": True, key: layout}
    checkpoint = open_checkpoint(quantized_folder(tmp_path, weight, gptq.pack(weight, layout), config))
    assert same_weight(checkpoint.weight(UP), weight)
    assert checkpoint.describe(UP).quant == weight.scheme


def test_gptq_settings_in_their_own_file(tmp_path: Path) -> None:
    weight = random_weight(8, 64)
    folder = quantized_folder(
        tmp_path, weight, gptq.pack(weight), {}, quantize_config={k: GPTQ[k] for k in GPTQ if k != "quant_method"}
    )
    assert same_weight(open_checkpoint(folder).weight(UP), weight)


@pytest.mark.parametrize("written", gptq.FORMATS)
def test_lying_format_tag_of_a_symmetric_checkpoint(tmp_path: Path, written: str) -> None:
    weight = random_weight(8, 64, symmetric=True)
    lie = next(layout for layout in gptq.FORMATS if layout != written)
    config = {**GPTQ, "sym": True, "checkpoint_format": lie}
    folder = quantized_folder(tmp_path, weight, gptq.pack(weight, written), config)
    assert same_weight(open_checkpoint(folder).weight(UP), weight)


def test_describe_and_weight_agree_when_desc_act_is_claimed_but_g_idx_is_in_order(tmp_path: Path) -> None:
    weight = random_weight(8, 64)
    checkpoint = open_checkpoint(quantized_folder(tmp_path, weight, gptq.pack(weight), {**GPTQ, "desc_act": True}))
    assert checkpoint.describe(UP).quant == checkpoint.weight(UP).scheme == weight.scheme


def test_modules_with_their_own_bits_and_group_size(tmp_path: Path) -> None:
    weight = random_weight(32, 64, bits=8, group=16)
    checkpoint = open_checkpoint(quantized_folder(tmp_path, weight, gptq.pack(weight), GPTQ))
    assert checkpoint.describe(UP).quant == QuantScheme(8, 16, False)
    assert same_weight(checkpoint.weight(UP), weight)


@pytest.mark.parametrize(
    ("config", "error", "reason"),
    [
        ({}, CheckpointError, "no quantization_config says how"),
        ({**AWQ, "version": "gemv"}, UnsupportedModelError, "gemv"),
        ({"quant_method": "new"}, UnsupportedModelError, "'new' is not read; known: awq, gptq"),
        ({**GPTQ, "format": "marlin"}, UnsupportedModelError, "marlin"),
        ({**GPTQ, "bits": "many"}, CheckpointError, "'many'"),
        ({**GPTQ, "group_size": float("inf")}, CheckpointError, "found 4 and inf"),
        ({**GPTQ, "modules_to_not_convert": 3}, CheckpointError, "modules_to_not_convert: expected names, found 3"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path: Path, config: dict, error: type, reason: str) -> None:
    weight = random_weight(8, 64)
    with pytest.raises(error, match=reason):
        open_checkpoint(quantized_folder(tmp_path, weight, awq.pack(weight), config))


def test_planes_that_contradict_one_another(tmp_path: Path) -> None:
    weight = random_weight(8, 64)
    planes = {**awq.pack(weight), "scales": torch.ones(3, 8).half()}
    checkpoint = open_checkpoint(quantized_folder(tmp_path, weight, planes, AWQ))
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj'"):
        checkpoint.describe(UP)
    planes.pop("qzeros")
    checkpoint = open_checkpoint(quantized_folder(tmp_path, weight, planes, AWQ))
    with pytest.raises(CheckpointError, match="qzeros"):
        checkpoint.weight(UP)


def test_symmetric_claim_against_the_data(tmp_path: Path) -> None:
    weight = random_weight(8, 64)
    folder = quantized_folder(tmp_path, weight, gptq.pack(weight), {**GPTQ, "sym": True})
    with pytest.raises(CheckpointError, match="sym is true, but"):
        open_checkpoint(folder).weight(UP)


def test_dtype_under_its_old_and_new_name(tmp_path: Path) -> None:
    one = {"x.weight": torch.ones(2)}
    assert open_checkpoint(write_folder(tmp_path / "a", {"torch_dtype": "float16"}, one)).dtype == "float16"
    assert open_checkpoint(write_folder(tmp_path / "b", {"dtype": "bfloat16"}, one)).dtype == "bfloat16"
    assert open_checkpoint(write_folder(tmp_path / "c", {}, one)).dtype == "float32"


def test_aux_files_and_fingerprint(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {}, {"x.weight": torch.ones(2)})
    first = open_checkpoint(folder).fingerprint()
    assert first == open_checkpoint(folder).fingerprint()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not part of it")
    assert set(open_checkpoint(folder).aux_files()) == {"tokenizer.json"}
    second = open_checkpoint(folder).fingerprint()
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    assert len({first, second, open_checkpoint(folder).fingerprint()}) == 3
    (folder / "README.md").unlink()


def test_missing_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path, {}, {"x.weight": torch.ones(2)}))
    assert not checkpoint.has("y.weight")
    for read in (checkpoint.weight, checkpoint.describe):
        with pytest.raises(CheckpointError, match=r"no tensor 'y\.weight'"):
            read("y.weight")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {}, {"x.weight": torch.ones(2)})
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    index = {"weight_map": {"x.weight": "a.safetensors", "y.weight": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'x\.weight' is also in a\.safetensors"):
        open_checkpoint(folder)


def test_headers_are_described_without_torch(tmp_path: Path) -> None:
    weight = random_weight(16, 64)
    folder = quantized_folder(tmp_path, weight, awq.pack(weight), AWQ)
    code = (
        "import sys; from pathlib import Path; from llmctl.checkpoint.opening import open_checkpoint\n"
        f"c = open_checkpoint(Path({str(folder)!r})); [c.describe(n) for n in c.names()]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
