"""Code books: fp8 and NF4 as methods, from the nearest value to what an engine computes with."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import random_tokens, write_model
from safetensors.torch import load_file
from scored_texts import scores
from typer.testing import CliRunner

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.checkpoint import compressed_tensors_planes
from llmctl.checkpoint.bitsandbytes_planes import nest_scales
from llmctl.checkpoint.nested import usual_values
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.cli.main import app
from llmctl.config import BuildConfig, ConvertConfig, QuantizeConfig
from llmctl.errors import UsageError
from llmctl.graph.code_books import CODE_BOOKS
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.books import quantize_book
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.targets.cpu.toolchain import find_compiler

FP8 = QuantScheme(8, -1, True, book="fp8_e4m3")
NF4 = QuantScheme(4, 64, True, book="nf4")
WRITTEN = {
    "fp8": ("fp8", "compressed-tensors"),
    "nf4": ("nf4", "bitsandbytes"),
    "nf4-double": ("nf4", "bitsandbytes-double"),
}
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama", "llama", hidden_size=64, intermediate_size=128)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> QuantizeConfig:
    return QuantizeConfig(model=str(model), output=str(tmp_path / "out"), method="nf4")


@pytest.mark.parametrize("scheme", [FP8, NF4], ids=["fp8", "nf4"])
def test_every_weight_goes_to_the_nearest_value_of_its_book(scheme: QuantScheme) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 2, 48)[:, None]
    made = quantize_book(weight, scheme)
    values = torch.tensor(CODE_BOOKS[scheme.book].values).nan_to_num(torch.inf)
    points = values.double() * made.scales.double()[:, made.group_index()].unsqueeze(-1)
    nearest = (weight.double().unsqueeze(-1) - points).abs().amin(dim=-1)
    found = (weight.double() - made.dequantize().double()).abs()
    assert torch.all(found <= nearest + 1e-6 * weight.abs())
    assert torch.all(made.dequantize().abs() <= weight.abs().amax(dim=1, keepdim=True) * 1.005)


@pytest.mark.parametrize("scheme", [FP8, NF4], ids=["fp8", "nf4"])
def test_rows_of_zeros_stay(scheme: QuantScheme) -> None:
    made = quantize_book(torch.zeros(3, 64), scheme)
    assert torch.equal(made.dequantize(), torch.zeros(3, 64))
    assert not (made.codes & 0x7F == 0x7F).any()


def test_float8_with_groups_is_not_packed() -> None:
    with pytest.raises(ValueError, match="a scale a row or a block, found groups of 32"):
        compressed_tensors_planes.check_packable((64, 128), replace(FP8, group_size=32))


def test_every_float8_is_itself() -> None:
    """A row of all finite values, the largest 448, has scale 1."""
    values = torch.tensor([v for v in CODE_BOOKS["fp8_e4m3"].values if v == v])
    made = quantize_book(values.unsqueeze(0), FP8)
    assert made.scales.item() == 1
    assert torch.equal(made.dequantize()[0], values)


def test_the_map_of_nested_scales_is_bitsandbytes_own() -> None:
    """To the bit, whatever torch's linspace rounds to on this machine; and what that says, at most a step away."""
    values = usual_values()
    digest = hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    positive = [10.0 ** (i - 6) * (b[:-1] + b[1:]) / 2 for i in range(7) for b in [torch.linspace(0.1, 1, 2**i + 1)]]
    meant = torch.cat([*positive, *(-p for p in positive), torch.tensor([0.0, 1.0])]).sort().values
    torch.testing.assert_close(values, meant, rtol=2.0**-23, atol=0)


def test_nested_scales_are_the_nearest_of_the_map() -> None:
    values = usual_values()
    scales = torch.rand(100, 7, generator=torch.Generator().manual_seed(1)) ** 4
    nested = nest_scales(scales)
    assert nested.supers.shape == (3,)
    flat, at = scales.flatten().double(), torch.arange(700) // 256
    points = values.double() * nested.supers[at].double()[:, None] + nested.offsets[0]
    nearest = (flat[:, None] - points).abs().amin(dim=1)
    assert torch.all((nested.floats().flatten().double() - flat).abs() <= nearest + 1e-7)


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_read_is_what_was_measured(kind: str, config: QuantizeConfig, model: Path) -> None:
    method, written = WRITTEN[kind]
    report = quantize_checkpoint(replace(config, method=method, format=written))
    made = open_checkpoint(Path(config.output)).weight(f"{MODULE}.weight")
    source = open_checkpoint(model).weight(f"{MODULE}.weight")
    assert isinstance(made, QuantizedWeight)
    assert isinstance(source, torch.Tensor)
    error = float((made.dequantize() - source).square().sum() / source.square().sum())
    assert report.layers[1].modules["layers.1.down_proj"] == pytest.approx(error, rel=1e-5)
    assert (report.method, report.format, report.error_of) == (method, written, "weight")
    bits = {"fp8": 8 + 16 / 128, "nf4": 4.5, "nf4-double": 4 + 8 / 64}[kind]
    assert bits <= report.bits_per_weight < bits + 8  # planes of a fixed size weigh on small matrices


def test_bitsandbytes_planes_are_named_and_packed_as_it_has_them(config: QuantizeConfig, model: Path) -> None:
    quantize_checkpoint(config)
    tensors = load_file(Path(config.output) / "model.safetensors")
    codes = quantize_book(open_checkpoint(model).weight(f"{MODULE}.weight").float(), NF4).codes.flatten()  # type: ignore[union-attr]
    assert torch.equal(tensors[f"{MODULE}.weight"], (codes[::2] * 16 + codes[1::2]).unsqueeze(1))
    state = json.loads(bytes(tensors[f"{MODULE}.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state == {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [64, 128]}
    settings = json.loads((Path(config.output) / "config.json").read_text())["quantization_config"]
    assert settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "fp8", "bits": 4}, "--bits 4: --method fp8 has --bits 8 only"),
        ({"method": "fp8", "group_size": 64}, "--group-size 64: --method fp8 has --group-size -1 only"),
        ({"method": "fp8", "override": ("down_proj:group-size=32",)}, "--method fp8 has group-size -1 only"),
        ({"method": "fp8", "format": "gptq"}, "--method fp8 is written as compressed-tensors"),
        ({"symmetric": False}, "--asymmetric: --method nf4 has --symmetric only"),
        ({"format": "gguf"}, "is written as bitsandbytes or bitsandbytes-double"),
        ({"group_size": 16}, "blocks have 32, 64, 128"),
        ({"group_size": 96}, "does not divide the input width"),
        ({"target_bpw": 4.5}, "--target-bpw: --method nf4 has 4 bits only"),
        ({"target_size": "1MiB"}, "--target-size: --method nf4 has 4 bits only"),
        ({"override": ("down_proj:bits=8",)}, "--method nf4 has bits 4 only"),
    ],
    ids=str,
)
def test_what_a_book_has_no_choice_of_is_refused(
    changes: dict[str, object], said: str, config: QuantizeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        quantize_checkpoint(replace(config, **changes))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_linears_of_a_book_may_be_left_dense_and_have_other_blocks(config: QuantizeConfig) -> None:
    report = quantize_checkpoint(replace(config, override=("down_proj:group-size=128", "o_proj:bits=16")))
    made = open_checkpoint(Path(config.output))
    assert made.describe(f"{MODULE}.weight").quant == replace(NF4, group_size=128)
    assert made.describe("model.layers.1.self_attn.o_proj.weight").quant is None
    assert "model.layers.0.self_attn.o_proj" in report.dense_modules


def test_a_converted_one_keeps_every_number(config: QuantizeConfig, tmp_path: Path) -> None:
    from llmctl.checkpoint.convert import convert_checkpoint

    quantize_checkpoint(replace(config, format="bitsandbytes-double"))
    again = ConvertConfig(model=config.output, to="bitsandbytes", output=str(tmp_path / "again"))
    assert convert_checkpoint(again).schemes == {"nf4, groups of 64": 14}
    with pytest.raises(UsageError, match="--to bitsandbytes-double: expected one of"):
        convert_checkpoint(replace(again, to="bitsandbytes-double", output=str(tmp_path / "no")))


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("nf4-double", "reference"),
        *(pytest.param(kind, "cpu", marks=pytest.mark.slow) for kind in WRITTEN),
    ],
)
def test_engines_compute_with_what_was_written(kind: str, target: str, config: QuantizeConfig, tmp_path: Path) -> None:
    if target == "cpu" and find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    from llmctl.targets.reference.weights import checkpoint_runtime

    method, written = WRITTEN[kind]
    quantize_checkpoint(replace(config, method=method, format=written))
    path = tmp_path / "engine"
    build_engine(BuildConfig(config.output, output=str(path), target=target, dtype="float32", eval_text="none"))
    engine = load_engine(path, EngineRequest(kv_cache_bytes=4 << 20, max_num_seqs=4))
    tokens = random_tokens(3, 40, 90)
    found = scores(open_runtime(engine), tokens)
    wanted = scores(checkpoint_runtime(open_checkpoint(Path(config.output)), num_blocks=16, max_model_len=64), tokens)
    assert abs(found - wanted).mean() < 1e-4
    said = CliRunner().invoke(app, ["inspect", config.output]).stdout
    assert "nf4" in said if method == "nf4" else "fp8" in said
