from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import CALIBRATION_TEXT, CONFIGS, write_small_llama

from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.config import QuantizeConfig, override_text
from llmctl.errors import UsageError
from llmctl.graph.families import build_graph
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.quantize.modules import Selection, select_modules
from llmctl.quantize.overrides import apply_overrides, parse_override
from llmctl.quantize.rtn import quantize_searched

FOUR = QuantScheme(4, 32, True)
MIXED = ("*.down_proj:bits=8", "layers.0.self_attn:bits=3,group-size=16", "layers.1.v_proj:bits=8", "o_proj:bits=16")
"""3, 4 and 8 bits and dense linears; q, k and v of layer 1 differ."""
SCHEMES = {
    "model.layers.0.self_attn.q_proj": (3, 16),
    "model.layers.0.self_attn.o_proj": None,
    "model.layers.0.mlp.up_proj": (4, 32),
    "model.layers.0.mlp.down_proj": (8, 32),
    "model.layers.1.self_attn.k_proj": (4, 32),
    "model.layers.1.self_attn.v_proj": (8, 32),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> QuantizeConfig:
    text = tmp_path / "calib.txt"
    text.write_text(CALIBRATION_TEXT)
    return QuantizeConfig(
        model=str(model),
        output=str(tmp_path / "out"),
        method="rtn",
        group_size=32,
        override=MIXED,
        calib=str(text),
        calib_samples=4,
        calib_length=32,
    )


def selection() -> Selection:
    return select_modules(build_graph({**CONFIGS["llama"], "vocab_size": 97}), ["lm_head"])


def test_the_last_override_that_says_a_setting_decides_it() -> None:
    texts = ("mlp:bits=8,group-size=16", "layers.1:bits=3", "*.up_proj: group_size=-1")
    kept, schemes = apply_overrides([parse_override(t) for t in texts], selection(), FOUR)
    assert len(kept.modules) == 14
    assert schemes["layers.0.q_proj.weight"] == FOUR
    assert schemes["layers.0.gate_proj.weight"] == QuantScheme(8, 16, True)
    assert schemes["layers.1.gate_proj.weight"] == QuantScheme(3, 16, True)
    assert schemes["layers.1.up_proj.weight"] == QuantScheme(3, -1, True)


def test_a_whole_row_needs_no_table_of_groups() -> None:
    ordered = replace(FOUR, act_order=True)
    _, schemes = apply_overrides([parse_override("o_proj:group-size=-1")], selection(), ordered)
    assert not schemes["layers.0.o_proj.weight"].act_order
    assert schemes["layers.0.q_proj.weight"].act_order


def test_sixteen_bits_leave_a_linear_dense() -> None:
    kept, schemes = apply_overrides([parse_override("layers.1:bits=16")], selection(), FOUR)
    assert len(kept.modules) == 7
    assert "model.layers.1.mlp.up_proj" in kept.ignored
    assert not any(name.startswith("layers.1.") for name in schemes)


@pytest.mark.parametrize(
    "text", ["", "down_proj", ":bits=8", "mlp:", "mlp:bit=8", "mlp:bits=8,bits=4", "mlp:bits=x", "mlp:bits=8;group=3"]
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--override"):
        parse_override(text)


@pytest.mark.parametrize("text", ["lm_head:bits=8", "down_porj:bits=8"])
def test_an_override_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="matches no linear that is quantized"):
        apply_overrides([parse_override(text)], selection(), FOUR)


def test_overrides_may_not_leave_everything() -> None:
    with pytest.raises(UsageError, match="leaves no linear"):
        apply_overrides([parse_override("layers:bits=16")], selection(), FOUR)


def test_a_mapping_says_the_same() -> None:
    mapping = {"match": "*.down_proj", "bits": 8, "group-size": 32}
    assert override_text(mapping) == "*.down_proj:bits=8,group-size=32"
    for odd in ({}, {"match": "mlp"}, {"bits": 8}, {"match": 3, "bits": 8}):
        with pytest.raises(UsageError, match="expected match"):
            override_text(odd)


def bits_and_group(folder: Path) -> dict[str, tuple[int, int] | None]:
    made = open_checkpoint(folder)
    schemes = {name: made.describe(f"{name}.weight").quant for name in SCHEMES}
    return {name: s and (s.bits, s.group_size) for name, s in schemes.items()}


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_every_method_honours_them(method: str, config: QuantizeConfig) -> None:
    report = quantize_checkpoint(replace(config, method=method))
    assert bits_and_group(Path(config.output)) == SCHEMES
    assert report.format == ("gptq_v2" if method == "awq" else "gptq")
    bits = [
        report.linears[f"model.layers.0.{name}_proj"].bits_per_weight for name in ("self_attn.q", "mlp.up", "mlp.down")
    ]
    assert 3 < bits[0] < 4.8 < bits[1] < 5 < 8 < bits[2]
    assert sum(report.schemes.values()) == report.quantized_modules == 12
    assert list(report.layers[1].modules) == [f"layers.1.{n}_proj" for n in ("q", "k", "v", "gate", "up", "down")]


def test_each_linear_is_rounded_to_its_own_grid(config: QuantizeConfig, model: Path) -> None:
    quantize_checkpoint(config)
    source, made = open_checkpoint(model), open_checkpoint(Path(config.output))
    for name, scheme in SCHEMES.items():
        before, after = source.weight(f"{name}.weight"), made.weight(f"{name}.weight")
        assert isinstance(before, torch.Tensor)
        if scheme is None:
            assert torch.equal(after, before.half())
        else:
            assert isinstance(after, QuantizedWeight)
            assert torch.equal(
                after.dequantize(), quantize_searched(before.float(), QuantScheme(*scheme, symmetric=True)).dequantize()
            )


@pytest.mark.parametrize("form", ["gptq_v2", "compressed-tensors", "gguf"])
def test_formats_that_say_bits_by_module(form: str, config: QuantizeConfig, tmp_path: Path) -> None:
    overrides = ("*.down_proj:bits=8", "o_proj:bits=16", "layers.0.mlp.down_proj:group-size=64")
    output = tmp_path / ("out.gguf" if form == "gguf" else "out")
    quantize_checkpoint(replace(config, override=overrides, format=form, output=str(output)))
    found = bits_and_group(output)
    spelt_out = 32 if form == "gguf" else 64  # its blocks repeat the scale of a larger group
    assert found["model.layers.0.mlp.up_proj"] == (4, 32)
    assert found["model.layers.0.mlp.down_proj"] == (8, spelt_out)
    assert found["model.layers.1.self_attn.v_proj"] == (4, 32)
    assert found["model.layers.0.self_attn.o_proj"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "awq", "symmetric": False}, "one group size for all linears, found linears that differ"),
        ({"format": "compressed-tensors"}, "read at 4 and 8 bits"),
        ({"override": ("mlp:bits=5",)}, "bits: expected 3, 4, 8, or 16"),
        ({"override": ("mlp:group-size=48",)}, "--override: group-size 48 does not divide"),
        ({"override": ("mlp:group-size=0",)}, "--override: group-size 0"),
    ],
    ids=str,
)
def test_refusals_leave_nothing_behind(
    changes: dict[str, object], message: str, config: QuantizeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        quantize_checkpoint(replace(config, **changes))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["calib.txt"]
