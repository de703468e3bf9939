"""Quantized folders: read back, byte-reproducible, whole or not at all, and what readers look for in the configs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import random_weight, same_weight, tiny_llama

from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.output_format import OutputFormat
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.writer import write_quantized_checkpoint
from llmctl.errors import CheckpointError, UsageError
from llmctl.graph.graph import QuantScheme

SCHEME = QuantScheme(4, 32, False)
AWQ = OutputFormat("awq", SCHEME, ignored=("lm_head",))
GPTQ = OutputFormat("gptq_v2", SCHEME, ignored=("lm_head",))
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    tiny_llama(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    return open_checkpoint(tmp_path / "source")


def linears(source: Checkpoint, scheme: QuantScheme = SCHEME) -> dict[str, QuantizedWeight]:
    names = [name for name in source.names() if name.endswith("_proj.weight")]
    return {
        name.removesuffix(".weight"): random_weight(
            *source.describe(name).shape,
            scheme.bits,
            scheme.group_size,
            symmetric=scheme.symmetric,
            act_order=scheme.act_order,
            seed=i,
        )
        for i, name in enumerate(names)
    }


@pytest.mark.parametrize(
    "settings",
    [
        AWQ,
        GPTQ,
        replace(GPTQ, format="gptq", scheme=QuantScheme(4, 32, True)),
        replace(GPTQ, format="gptq", scheme=QuantScheme(3, 32, True)),
        replace(GPTQ, scheme=QuantScheme(8, 32, False, act_order=True)),
        replace(AWQ, scheme=QuantScheme(4, 32, True)),
    ],
)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_reads_back(tmp_path: Path, source: Checkpoint, settings: OutputFormat, shard_bytes: int) -> None:
    weights = linears(source, settings.scheme)
    norm = torch.rand(64)
    path = write_quantized_checkpoint(
        tmp_path / "out", source, weights, {NORM: norm}, settings, max_shard_bytes=shard_bytes
    )
    found = open_checkpoint(path)
    assert found.names() == source.names()
    assert found.quantization is not None
    assert found.quantization.method == settings.format.removesuffix("_v2")
    assert found.quantization.scheme == settings.scheme
    for module, weight in weights.items():
        assert same_weight(found.weight(f"{module}.weight"), weight)
    for name in source.names():
        if name.removesuffix(".weight") not in weights:
            expected = norm.bfloat16() if name == NORM else source.weight(name)
            assert torch.equal(found.weight(name), expected)
    assert (len(list(path.glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
    assert (path / "tokenizer.json").read_text() == '{"a": 1}'
    assert (path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (path / "generation_config.json").is_file()
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


def test_awq_config(tmp_path: Path, source: Checkpoint) -> None:
    path = write_quantized_checkpoint(tmp_path / "out", source, linears(source), {}, AWQ)
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert config["dtype"] == "bfloat16"
    assert {k: v for k, v in config.items() if k != "quantization_config"} == source.config
    assert not (path / "quantize_config.json").exists()


def test_gptq_config(tmp_path: Path, source: Checkpoint) -> None:
    settings = replace(GPTQ, scheme=QuantScheme(4, 32, False, True), ignored=("lm_head", "model.layers.1.mlp.up_proj"))
    weights = linears(source)
    weights.pop("model.layers.1.mlp.up_proj")
    path = write_quantized_checkpoint(tmp_path / "out", source, weights, {}, settings)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config == json.loads((path / "quantize_config.json").read_text())
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}
    expected |= {"checkpoint_format": "gptq_v2", "lm_head": False, "damp_percent": 0.01, "true_sequential": True}
    assert expected.items() <= config.items()
    assert config["dynamic"] == {r"-:^model\.layers\.1\.mlp\.up_proj$": {}}
    found = open_checkpoint(path)
    assert found.describe("model.layers.1.mlp.up_proj.weight").quant is None
    # Claimed desc_act, but these weights' g_idx is in order.
    assert found.describe("model.layers.1.mlp.down_proj.weight").quant == SCHEME


@pytest.mark.parametrize("reader", ["AwqConfig", "GPTQConfig"])
def test_transformers_understands_the_config(tmp_path: Path, source: Checkpoint, reader: str) -> None:
    from transformers import AutoConfig
    from transformers.utils import quantization_config

    settings = AWQ if reader == "AwqConfig" else GPTQ
    path = write_quantized_checkpoint(tmp_path / "out", source, linears(source), {}, settings)
    raw: dict[str, Any] = AutoConfig.from_pretrained(path).quantization_config
    parsed = getattr(quantization_config, reader).from_dict(raw)
    assert (parsed.bits, parsed.group_size) == (4, 32)


def test_same_bytes_every_time(tmp_path: Path, source: Checkpoint) -> None:
    weights = linears(source)
    backwards = dict(reversed(weights.items()))
    one = write_quantized_checkpoint(tmp_path / "a", source, weights, {NORM: torch.ones(64)}, GPTQ)
    two = write_quantized_checkpoint(tmp_path / "b", source, backwards, {NORM: torch.ones(64)}, GPTQ)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


class Lazy(Mapping[str, QuantizedWeight]):
    """Makes each weight when asked, as one read from per-layer files is; counts how often."""

    def __init__(self, weights: dict[str, QuantizedWeight]) -> None:
        self.weights, self.asked = weights, 0

    def __getitem__(self, name: str) -> QuantizedWeight:
        self.asked += 1
        weight = self.weights[name]
        return replace(weight, codes=weight.codes.clone())

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_weights_may_come_from_a_lazy_mapping(tmp_path: Path, source: Checkpoint) -> None:
    weights = linears(source)
    lazy = Lazy(weights)
    one = write_quantized_checkpoint(tmp_path / "a", source, lazy, {}, AWQ)
    two = write_quantized_checkpoint(tmp_path / "b", source, weights, {}, AWQ)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert lazy.asked == 3 * len(weights)  # layout, integer planes, scales


def test_tied_head(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "source", tied=True)
    source = open_checkpoint(tmp_path / "source")
    weights = linears(source)
    tied = open_checkpoint(write_quantized_checkpoint(tmp_path / "tied", source, weights, {}, AWQ))
    assert not tied.has("lm_head.weight")
    assert tied.config["tie_word_embeddings"] is True
    weights["lm_head"] = random_weight(72, 64)
    untied = open_checkpoint(write_quantized_checkpoint(tmp_path / "untied", source, weights, {}, GPTQ))
    assert untied.config["tie_word_embeddings"] is False
    assert untied.config["quantization_config"]["lm_head"] is True
    assert same_weight(untied.weight("lm_head.weight"), weights["lm_head"])
    assert torch.equal(untied.weight("model.embed_tokens.weight"), source.weight("model.embed_tokens.weight"))


def test_float32_source_becomes_float16(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "source", dtype=torch.float32)
    source = open_checkpoint(tmp_path / "source")
    path = write_quantized_checkpoint(tmp_path / "a", source, linears(source), {}, AWQ)
    found = open_checkpoint(path)
    assert found.dtype == "float16"
    assert torch.equal(found.weight("lm_head.weight"), source.weight("lm_head.weight").half())
    for value, reason in ((1e6, "too large for float16"), (float("nan"), "not finite")):
        with pytest.raises(CheckpointError, match=f"'{NORM}' has values that are {reason}"):
            write_quantized_checkpoint(tmp_path / "b", source, linears(source), {NORM: torch.full((64,), value)}, AWQ)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "source"]


def test_biases_stay(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "source", attention_bias=True)
    source = open_checkpoint(tmp_path / "source")
    found = open_checkpoint(write_quantized_checkpoint(tmp_path / "out", source, linears(source), {}, AWQ))
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(found.weight(name), source.weight(name))


def test_refusals_leave_nothing(tmp_path: Path, source: Checkpoint) -> None:
    weights = linears(source)

    def write(quantized: dict[str, QuantizedWeight], settings: OutputFormat) -> None:
        write_quantized_checkpoint(tmp_path / "out", source, quantized, {}, settings)

    with pytest.raises(ValueError, match=r"_proj': expected .*bits=3"):
        write(
            {"model.layers.0.mlp.up_proj": weights["model.layers.0.mlp.up_proj"]},
            replace(GPTQ, scheme=QuantScheme(3, 32, False)),
        )
    with pytest.raises(ValueError, match=r"'model\.none' has no weight"):
        write({"model.none": random_weight(8, 32)}, AWQ)
    with pytest.raises(ValueError, match="multiple of 8"):
        write({"lm_head": random_weight(12, 32)}, AWQ)
    with pytest.raises(ValueError, match=r"_proj': version 1 of GPTQ's layout is written symmetric only"):
        write(weights, replace(GPTQ, format="gptq"))
    assert [item.name for item in tmp_path.iterdir()] == ["source"]
    write(weights, AWQ)
    with pytest.raises(UsageError, match="exists already"):
        write(weights, AWQ)


@pytest.mark.parametrize("bad", [{"format": "nf4"}, {"dtype": "float32"}])
def test_settings_are_checked(bad: dict) -> None:
    with pytest.raises(ValueError):
        replace(AWQ, **bad)


FP8 = QuantScheme(8, -1, True, book="fp8_e4m3")


@pytest.mark.parametrize(
    ("name", "scheme", "said"),
    [
        ("awq", QuantScheme(8, 32, False), "4 bits only, found 8"),
        ("awq", replace(SCHEME, minimum=True), "integer zeros only, found minimums"),
        ("gptq", SCHEME, "version 1 of GPTQ's layout is written symmetric only"),
        ("gptq", FP8, "integer zeros only, found fp8_e4m3"),
        ("gptq_v2", QuantScheme(8, 32, True, block_rows=8), "integer zeros only, found blocks of 8 rows"),
        ("compressed-tensors", replace(SCHEME, minimum=True), "no minimums"),
        ("compressed-tensors", QuantScheme(3, 32, True), "read at 4 and 8 bits, found 3"),
        ("compressed-tensors", replace(SCHEME, act_order=True), "no act-order groups"),
        ("compressed-tensors", QuantScheme(8, 32, True, block_rows=8), "blocks are of float8 weights"),
        ("compressed-tensors", QuantScheme(4, 40, True), "group size 40 does not divide"),
        ("compressed-tensors-w8a8", QuantScheme(8, 32, True), "one scale a row"),
        ("compressed-tensors-w8a8", QuantScheme(8, -1, False), "8 bits, symmetric"),
        ("compressed-tensors-w8a8", FP8, "W8A8 has 8 bits"),
        ("gguf", FP8, "for integers, not for fp8_e4m3"),
        ("gguf", QuantScheme(4, 32, True, True), "no act-order groups"),
        ("gguf", QuantScheme(4, 16, True), "blocks are of 32 columns, found groups of 16"),
        ("gguf", QuantScheme(8, 32, False), "no type for asymmetric weights of 8 bits"),
        ("gguf", QuantScheme(4, 64, True), "group size 64 does not divide the input width 96"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_said(name: str, scheme: QuantScheme, said: str) -> None:
    with pytest.raises(ValueError, match=rf"'a\.module': .*{said}"):
        OutputFormat(name, scheme).check("a.module", (64, 96))


def test_widths_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="an input width of 48"):
        OutputFormat("gguf", QuantScheme(4, -1, True)).check("a.module", (64, 48))


def test_modules_of_two_schemes_need_a_format_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"awq has one scheme .*groups of 32, but 4 bits, symmetric, a row in m"):
        replace(AWQ, others={"m": QuantScheme(4, -1, True)})
    with pytest.raises(ValueError, match="symmetric and asymmetric modules do not go together"):
        replace(GPTQ, others={"m": QuantScheme(4, 32, True)}).quantization_config()


def test_compressed_tensors_config() -> None:
    settings = OutputFormat("compressed-tensors", SCHEME, {"m": FP8}, ("lm_head",))
    config = settings.quantization_config()
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "mixed-precision")
    first, last = config["config_groups"].values()
    assert (first["targets"], first["format"], first["weights"]["strategy"]) == (["m"], "float-quantized", "channel")
    assert (last["targets"], last["format"], last["weights"]["group_size"]) == (["Linear"], "pack-quantized", 32)
    by_token = OutputFormat("compressed-tensors-w8a8", QuantScheme(8, -1, True)).quantization_config()
    assert by_token["format"] == "int-quantized"
    assert by_token["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


@pytest.mark.parametrize(
    ("scales", "stored"), [(1 / 3, "F32"), (1.5, "F16"), (2.0**-24 * 1.5, "BF16"), (2.0**100, "BF16")]
)
def test_compressed_tensors_keeps_scales(scales: float, stored: str) -> None:
    weight = random_weight(8, 32, symmetric=True)
    weight = replace(weight, scales=torch.full((8, 1), scales))
    row = OutputFormat("compressed-tensors", weight.scheme).row
    assert row.specs(weight)["weight_scale"] == (stored, (8, 1))
    assert torch.equal(row.pack(weight)["weight_scale"].float(), weight.scales)
