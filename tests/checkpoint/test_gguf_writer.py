"""GGUF files that are written: blocks as ggml reads them, models and tokenizers carried whole or refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoint_samples import random_weight
from random_models import write_model

from llmctl.checkpoint import gguf_encode
from llmctl.checkpoint.gguf_config import gguf_name, hf_name
from llmctl.checkpoint.gguf_file import permute_rows, unpermute_rows
from llmctl.checkpoint.gguf_writer import file_metadata
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.output_format import OutputFormat
from llmctl.checkpoint.writer import write_quantized_checkpoint
from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.graph.hf_config import read_arch
from llmctl.text.tokenizer import Tokenizer

Edit = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("Q4_0", QuantScheme(4, 32, True)),
        ("Q4_0", QuantScheme(3, 32, True)),
        ("Q4_0", QuantScheme(2, 64, True)),
        ("Q4_0", QuantScheme(4, -1, True)),
        ("Q8_0", QuantScheme(8, 32, True)),
        ("Q8_0", QuantScheme(8, 96, True)),
        ("Q4_1", QuantScheme(4, 32, False)),
        ("Q4_1", QuantScheme(3, 96, False)),
    ],
    ids=str,
)
def test_blocks_are_what_ggml_reads(kind: str, scheme: QuantScheme) -> None:
    weight = random_weight(24, 192, scheme.bits, scheme.group_size, symmetric=scheme.symmetric)
    weight = replace(weight, scales=torch.ldexp(torch.ones_like(weight.scales), -(weight.zeros % 5).int()).half())
    assert gguf_encode.block_type(weight.scheme) == kind
    blocks = gguf_encode.pack(weight)[gguf_encode.PLANE]
    ((_, shape),) = gguf_encode.plane_specs(weight).values()
    assert tuple(blocks.shape) == shape
    found = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(found), weight.dequantize())


def test_scales_beyond_float16_are_refused() -> None:
    weight = random_weight(8, 32, symmetric=True)
    with pytest.raises(ValueError, match="not finite in float16"):
        gguf_encode.pack(replace(weight, scales=torch.full((8, 1), 1e6)))


def test_names_and_rows_go_both_ways() -> None:
    for name in ("token_embd.weight", "blk.3.attn_q.bias", "output.weight", "blk.0.ffn_norm.weight"):
        found = hf_name(name, "llama", "a file")
        assert found is not None
        assert gguf_name(found, "llama", "a file") == (name, None)
    expert = "model.layers.0.block_sparse_moe.experts.13.w2.weight"
    assert gguf_name(expert, "llama+experts", "a file") == ("blk.0.ffn_down_exps.weight", 13)
    with pytest.raises(UnsupportedModelError, match=r"no name for tensor 'model\.layers\.0\.mlp\.experts"):
        gguf_name("model.layers.0.mlp.experts.0.up_proj.weight", "llama", "a file")
    rows = torch.arange(48)
    assert not torch.equal(permute_rows(rows, 3), rows)
    assert torch.equal(unpermute_rows(permute_rows(rows, 3), 3), rows)


def edited(folder: Path, file: str, edit: Edit) -> Path:
    path = folder / file
    document = json.loads(path.read_text()) if path.exists() else {}
    edit(document)
    path.write_text(json.dumps(document))
    return folder


def metadata(folder: Path) -> dict[str, Any]:
    return file_metadata(open_checkpoint(folder))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500000.0}, "llama"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rms_norm_eps": 1e-5}, "llama"),
        ("mistral", {"sliding_window": None}, "llama"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", **YARN}}, "qwen2"),
        ("qwen3", {}, "qwen3"),
    ],
)
def test_a_model_is_read_back_as_it_was(family: str, changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "dense", family, **changes))
    module = "model.layers.1.self_attn.k_proj"
    weight = random_weight(*source.describe(f"{module}.weight").shape, symmetric=True)
    settings = OutputFormat("gguf", weight.scheme)
    made = open_checkpoint(write_quantized_checkpoint(tmp_path / "m.gguf", source, {module: weight}, {}, settings))
    assert made.config["model_type"] == name
    before, after = read_arch(source.config), read_arch(made.config)
    assert after.family.name == name
    assert replace(after, family=before.family) == before
    assert set(made.names()) == set(source.names())
    for tensor in set(source.names()) - {f"{module}.weight"}:
        assert torch.equal(made.weight(tensor).float(), source.weight(tensor).half().float()), tensor
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    vectors = {t.name: t.tensor_type.name for t in reader.tensors if len(t.shape) == 1}
    assert set(vectors.values()) == {"F32"}


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("phi", {}, "not written for phi models; it is for gemma2, gemma3_text, granite, granitemoe, llama, mistral, "),
        ("mistral", {}, "sliding-window attention of mistral models"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 16.0}}, "cannot carry this model's rope"),
    ],
)
def test_a_model_that_would_be_read_as_another_is_refused(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        metadata(write_model(tmp_path / "dense", family, **changes))


def test_what_a_tokenizer_says_is_carried(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "dense", "llama", vocab_size=400)
    edited(
        folder,
        "generation_config.json",
        lambda d: d.update(eos_token_id=[0, 7, 5], temperature=0.6, top_k=20, repetition_penalty=1.1),
    )
    made = metadata(folder)
    tokenizer = Tokenizer.from_folder(folder)
    ends = {made[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")}
    assert made["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert {5, 7} < ends
    assert made["general.sampling.temp"] == 0.6
    assert made["general.sampling.top_k"] == 20
    assert made["general.sampling.penalty_repeat"] == 1.1
    assert len(made["tokenizer.ggml.tokens"]) == len(made["tokenizer.ggml.token_type"]) == 400
    assert made["tokenizer.ggml.tokens"][399] == "[PAD399]"
    assert made["tokenizer.chat_template"] == tokenizer.chat_template.source  # type: ignore[union-attr]
    assert made["tokenizer.ggml.pre"] == "gpt-2"
    edited(folder, "generation_config.json", lambda d: d.update(do_sample=False))
    assert "general.sampling.temp" not in metadata(folder)


def stage(kind: str, **more: Any) -> Edit:
    return lambda d: d.update(pre_tokenizer={"type": kind, **more})


def added(**flags: bool) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        document["added_tokens"][-1].update(flags)

    return edit


def template(*ids: int) -> Edit:
    tokens = [{"SpecialToken": {"id": f"t{i}", "type_id": 0}} for i in ids]
    return lambda d: d.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [*tokens, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {f"t{i}": {"id": f"t{i}", "ids": [i], "tokens": [f"t{i}"]} for i in ids},
        }
    )


def without_the_text(document: dict[str, Any]) -> None:
    template(0)(document)
    document["post_processor"]["single"].pop()


def model(**changes: Any) -> Edit:
    return lambda d: d["model"].update(changes)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (model(byte_fallback=True), r"its stages before BPE \(ByteLevel\) are not sentencepiece's"),
        (model(end_of_word_suffix="</w>"), "its BPE has end_of_word_suffix '</w>'"),
        (stage("Whitespace"), r"its stages before BPE \(Whitespace\) are no pre-tokenizer that is known"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), r"\(Lowercase, ByteLevel\)"),
        (added(lstrip=True), "'x <.*' would be tokenized otherwise"),
        (template(5), r"adds \[5\] where its BOS token would be"),
        (template(0, 0), r"adds \[0, 0\]"),
        (without_the_text, "its post-processor changes the text's tokens"),
        (model(merges=[]), "it has no merges"),
    ],
)
def test_a_tokenizer_that_would_be_read_as_another_is_refused(edit: Edit, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"GGUF is not written for this tokenizer: .*{said}"):
        metadata(edited(write_model(tmp_path / "dense", "llama"), "tokenizer.json", edit))


def test_a_bos_is_carried(tmp_path: Path) -> None:
    folder = edited(write_model(tmp_path / "dense", "llama"), "tokenizer.json", template(0))
    made = metadata(folder)
    assert made["tokenizer.ggml.add_bos_token"] is True
    assert made["tokenizer.ggml.bos_token_id"] == 0
    assert made["tokenizer.ggml.add_eos_token"] is False


def test_more_ends_or_tokens_than_there_is_room_for_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "dense", "llama")
    edited(folder, "generation_config.json", lambda d: d.update(eos_token_id=[4, 5, 6, 7]))
    with pytest.raises(UsageError, match=r"5 tokens end a generation: .* GGUF has keys for 3"):
        metadata(folder)
    narrow = write_model(tmp_path / "narrow", "llama")
    edited(
        narrow,
        "tokenizer.json",
        lambda d: d["added_tokens"].append({**d["added_tokens"][-1], "id": 900, "content": "<far>"}),
    )
    with pytest.raises(UsageError, match=r"token '<far>' has id \d+, and the embedding has \d+ rows"):
        metadata(narrow)


def test_a_token_that_is_called_as_padding_would_be_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "dense", "llama", vocab_size=400)
    taken = {"content": "[PAD399]"}
    edited(folder, "tokenizer.json", lambda d: d["added_tokens"].append({**d["added_tokens"][-1], **taken}))
    with pytest.raises(UsageError, match=r"not written for this tokenizer: .* a token occurs twice"):
        metadata(folder)
