"""GGUF: files written with gguf.GGUFWriter as llama.cpp's converter does, read back and compared with transformers."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_samples import tiny_llama
from gguf_files import logits_of, small_tokenizer, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llmctl.checkpoint.gguf_config import llama3_factors
from llmctl.checkpoint.gguf_file import open_gguf
from llmctl.checkpoint.gguf_header import GgufFile
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.resolve import resolve_model
from llmctl.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

IDS = torch.arange(24)[None] % 70


def test_rows_of_blocks_are_unpermuted(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "hf", dtype=torch.float32)
    stored = write_gguf(tmp_path / "m.gguf", model, qtype=gguf.GGMLQuantizationType.Q4_1)
    kept, widened = open_checkpoint(stored), open_checkpoint(stored, widen=True)
    for name in ("q_proj", "k_proj"):
        found = kept.weight(f"model.layers.1.self_attn.{name}.weight")
        assert isinstance(found, QuantizedWeight)
        assert torch.equal(found.dequantize(), widened.weight(f"model.layers.1.self_attn.{name}.weight"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_llama_rows_are_unpermuted(tmp_path: Path, tied: bool, bias: bool) -> None:
    model = tiny_llama(tmp_path / "hf", tied=tied, dtype=torch.float32, attention_bias=bias, rope_theta=5e5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model))
    for name in checkpoint.names():
        assert torch.equal(checkpoint.weight(name), model.state_dict()[name]), name
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert checkpoint.config["rope_theta"] == 5e5
    assert checkpoint.config["rms_norm_eps"] == model.config.rms_norm_eps
    with torch.no_grad():
        assert torch.allclose(logits_of(checkpoint, IDS), model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_qwen(tmp_path: Path, family: str) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 72}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    if family == "Qwen3":
        heads["head_dim"] = 32
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, tie_word_embeddings=False)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model))
    assert checkpoint.config["architectures"] == [f"{family}ForCausalLM"]
    with torch.no_grad():
        assert torch.allclose(logits_of(checkpoint, IDS), model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_stored_types(tmp_path: Path, name: str, widen: bool) -> None:
    model = tiny_llama(tmp_path / "hf", dtype=torch.float32)
    qtype = gguf.GGMLQuantizationType[name]
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, qtype=qtype), widen=widen)
    up = "model.layers.1.mlp.up_proj.weight"
    exact = model.state_dict()[up]
    info, found = checkpoint.describe(up), checkpoint.weight(up)
    assert info.shape == tuple(exact.shape) == tuple(found.shape)
    if name in ("F16", "BF16"):
        assert torch.equal(found, exact.to(found.dtype))
        assert (info.dtype, info.nbytes) == (name, exact.numel() * 2)
    else:
        stored = gguf.quants.quantize(exact.numpy(), qtype)
        assert isinstance(found, QuantizedWeight) != widen
        dense = found.dequantize() if isinstance(found, QuantizedWeight) else found
        assert np.array_equal(dense.numpy(), gguf.quants.dequantize(stored, qtype))
        assert (info.dtype, info.nbytes) == ("F32" if widen else "F16", stored.nbytes)
        assert (checkpoint.quantization is None) == widen
    assert checkpoint.dtype == ("bfloat16" if name == "BF16" else "float16")


def test_rope_scaling(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "hf", dtype=torch.float32)
    scaled = write_gguf(
        tmp_path / "a.gguf", model, rope_scaling_type=gguf.RopeScalingType.LINEAR, rope_scaling_factor=4.0
    )
    assert open_gguf(scaled).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    odd = write_gguf(tmp_path / "b.gguf", model, rope_scaling_type=gguf.RopeScalingType.LONGROPE)
    with pytest.raises(UnsupportedModelError, match="longrope"):
        open_gguf(odd)


def test_llama3_factors_are_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rule = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_theta=5e5, rope_scaling=rule, max_position_embeddings=131072
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 5e5 ** (np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / llama3_factors(rule, 5e5, 128), scaled.numpy(), rtol=1e-5)


def test_head_counts_that_contradict_the_tensors(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"k_proj\.weight': expected 128 rows, found shape \[32, 64\]"):
        open_gguf(write_gguf(tmp_path / "m.gguf", model, key_length=64, rope_dimension_count=64, head_count=1))


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match="an empty file, not GGUF") as error:
        open_checkpoint(tmp_path / "a.gguf")
    assert error.value.fix == "fetch it again"


def test_unsupported_files(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "hf")
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "rwkv7")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UnsupportedModelError, match="'rwkv7' is not read; known: gemma2, gemma3, granite, "):
        open_checkpoint(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModelError, match="is none of architecture llama"):
        open_checkpoint(write_gguf(tmp_path / "moe.gguf", model, expert_count=8))
    with pytest.raises(UnsupportedModelError, match="partial rotary"):
        open_checkpoint(write_gguf(tmp_path / "rot.gguf", model, rope_dimension_count=8))


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(tmp_path / "hf"), qtype=gguf.GGMLQuantizationType.Q8_0)
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in ours.metadata.items()} == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].offset == tensor.data_offset
        assert np.array_equal(ours.raw(tensor.name), tensor.data.reshape(-1).view(np.uint8))


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "m.gguf", tiny_llama(folder / "hf"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_truncation_anywhere_is_noticed(tmp_path_factory, small_gguf: Path, data) -> None:
    path = tmp_path_factory.mktemp("t") / "x.gguf"
    whole = small_gguf.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 32))])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "x.gguf" in str(caught.value)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_damaged_header_never_escapes_as_another_error(tmp_path_factory, small_gguf: Path, data) -> None:
    path = tmp_path_factory.mktemp("t") / "x.gguf"
    raw = bytearray(small_gguf.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 6000))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.aux_files()
        for name in checkpoint.names():
            checkpoint.weight(name)
    except CheckpointError:
        pass


def with_field(path: Path, source: Path, key: str, value: Any) -> Path:
    """A GGUF file again, with one metadata field replaced or added."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(path), arch)
    for name, field in reader.fields.items():
        if name not in (key, "general.architecture") and not name.startswith("GGUF."):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    kinds = {bool: "BOOL", int: "INT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    inner = gguf.GGUFValueType[kinds[type(value[0])]] if isinstance(value, list) else None
    writer.kv_data[0].pop(key, None)
    writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


ODD_VALUES = [True, 0, -1, 7, 0.0, float("nan"), float("inf"), "", "many", [1, 2, 3], [0.5, 0.5], ["a", "b"], [True]]


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_metadata_of_another_type_is_refused_in_one_line_or_harmless(
    tmp_path: Path, small_gguf: Path, value: Any
) -> None:
    keys = [*GgufFile(small_gguf).metadata, "general.alignment", "split.count", "llama.expert_count"]
    keys += ["llama.attention.sliding_window", "llama.rope.scaling.type", "llama.rope.scaling.factor"]
    keys += ["tokenizer.ggml.add_bos_token", "tokenizer.chat_template", "general.sampling.temp"]
    said = ""
    for key in keys:
        try:
            checkpoint = open_checkpoint(with_field(tmp_path / "x.gguf", small_gguf, key, value))
            checkpoint.aux_files()
            for name in checkpoint.names():
                checkpoint.weight(name)
        except CheckpointError as error:
            said += f"{error}|"
    assert "x.gguf" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("temp", 0.7, {"temperature": 0.7, "do_sample": True}),
        ("temp", 0.0, {"do_sample": False}),
        ("penalty_repeat", 1.5, {"repetition_penalty": 1.5}),
    ],
)
def test_a_model_is_sampled_where_its_file_says_so(
    tmp_path: Path, small_gguf: Path, key: str, value: float, expected: dict[str, Any]
) -> None:
    path = with_field(tmp_path / "x.gguf", small_gguf, f"general.sampling.{key}", value)
    found = json.loads(open_checkpoint(path).aux_files()["generation_config.json"])
    assert {name: value for name, value in found.items() if not name.endswith("_id")} == expected


@pytest.mark.parametrize("value", ["32", [32], 32.0, 0, -32, True])
def test_an_alignment_that_is_none(tmp_path: Path, small_gguf: Path, value: Any) -> None:
    path = with_field(tmp_path / "x.gguf", small_gguf, "general.alignment", 32)
    raw = path.read_bytes()
    at = raw.index(b"general.alignment") + len("general.alignment")
    kinds = {str: 8, list: 9, float: 6, int: 5, bool: 7}
    content = {
        str: lambda v: struct.pack("<Q2s", 2, v.encode()),
        list: lambda v: struct.pack("<IQi", 5, 1, v[0]),
        float: lambda v: struct.pack("<f", v),
        int: lambda v: struct.pack("<i", v),
        bool: lambda v: struct.pack("<?", v),
    }[type(value)](value)
    path.write_bytes(raw[:at] + struct.pack("<I", kinds[type(value)]) + content + raw[at + 8 :])
    with pytest.raises(CheckpointError, match=r"general\.alignment: expected a positive integer, found"):
        open_checkpoint(path)


def test_tensors_that_overlap(tmp_path: Path, small_gguf: Path) -> None:
    raw = bytearray(small_gguf.read_bytes())
    first, second = sorted(GgufFile(small_gguf).tensors.items(), key=lambda item: item[1].offset)[:2]
    name = second[0].encode()
    at = raw.index(name) + len(name) + 4 + 8 * len(second[1].shape) + 4  # past axes, shape and type
    raw[at : at + 8] = struct.pack("<Q", 32)
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"'{second[0]}' overlaps the tensor before it"):
        open_checkpoint(tmp_path / "x.gguf")
    assert first[1].nbytes > 32


def aux(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    model = tiny_llama(tmp_path / "hf")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, tokenizer=small_tokenizer(72, **changes)))
    return {name: json.loads(content) for name, content in checkpoint.aux_files().items()}


def test_tokenizer_files(tmp_path: Path) -> None:
    files = aux(tmp_path, chat_template="{{ messages }}", eot_token_id=5)
    tokenizer = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    assert tokenizer.encode("ab ab").tokens == ["ab", "Ġab"]
    assert tokenizer.encode("12").tokens == ["1", "2"]  # smollm: every digit alone, though "12" is a merge
    assert tokenizer.encode("a<|im_end|><tool>b").tokens == ["a", "<|im_end|>", "<tool>", "b"]
    assert tokenizer.decode([8, 2, 3]) == "a<tool>"  # <|im_end|> is special, <tool> is not
    config = files["tokenizer_config.json"]
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert config["chat_template"] == "{{ messages }}"
    assert config["add_bos_token"] is False
    assert files["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": [2, 0, 5], "pad_token_id": 0}


def test_what_the_file_recommends_for_sampling(tmp_path: Path) -> None:
    recommended = {"temp": 0.7, "top_k": 20, "penalty_repeat": 1.1}
    model = tiny_llama(tmp_path / "hf")
    path = write_gguf(tmp_path / "m.gguf", model, **{f"sampling_{name}": v for name, v in recommended.items()})
    document = json.loads(open_checkpoint(path).aux_files()["generation_config.json"])
    assert document.pop("eos_token_id")
    assert {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}.items() <= document.items()


def test_tokenizer_that_adds_bos(tmp_path: Path) -> None:
    files = aux(tmp_path, pre="llama-bpe")
    tokenizer = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    assert tokenizer.encode("ab").tokens == ["<|im_start|>", "ab"]
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]
    assert tokenizer.encode("12", add_special_tokens=False).tokens == ["12"]
    assert files["tokenizer_config.json"]["add_bos_token"] is True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre": "kimi-k2"}, r"pre-tokenizer 'kimi-k2' is not known; known: gpt-2, llama-bpe, qwen2 and \d+ more"),
        ({"pre": None}, "pre-tokenizer 'None' is not known"),
        ({"model": "t5"}, "tokenizer model 't5' is not read"),
        ({"merges": ["a b c"]}, "not a pair"),
        ({"list": ["a"] * 72}, "occurs twice"),
        ({"types": [1]}, "72 tokens but 1 token types"),
    ],
)
def test_tokenizers_that_cannot_be_expressed(tmp_path: Path, changes: dict, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        aux(tmp_path, **changes)


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    try:
        return open_checkpoint(resolve_model("demo:smollm2-135m"), widen=True)
    except ModelNotFoundError as error:
        pytest.skip(str(error))


def test_demo_model_knows_the_capital_of_france(demo: Checkpoint) -> None:
    tokenizer = Tokenizer.from_str(demo.aux_files()["tokenizer.json"].decode())
    ids = tokenizer.encode("The capital of France is").ids
    following = int(logits_of(demo, torch.tensor([ids]))[0, -1].argmax())
    assert tokenizer.id_to_token(following) == "ĠParis"


def test_demo_tokenizer_through_transformers(demo: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, content in demo.aux_files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(demo.config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "In 1969, naïve 日本語 <|im_end|>\n\n  x"
    assert theirs(text).input_ids == Tokenizer.from_str(demo.aux_files()["tokenizer.json"].decode()).encode(text).ids
    assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == 2
    prompt = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert json.loads(demo.aux_files()["generation_config.json"])["eos_token_id"] == [2, 0]
