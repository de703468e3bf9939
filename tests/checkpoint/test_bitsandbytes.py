"""bitsandbytes checkpoints: states that are not as it writes them, settings, and what is said of LLM.int8()."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import write_folder
from quantized_files import FORMATS, linear_shapes, write_pair
from torch import Tensor

from llmctl.artifact.describe import describe_model
from llmctl.artifact.plan import plan_build
from llmctl.checkpoint.assemble import check_finite
from llmctl.checkpoint.methods import NOTES
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.config import BuildConfig
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.graph import QuantScheme

MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)) / 16
STATE = "weight.quant_state.bitsandbytes__nf4"


def folder(path: Path, name: str, planes: Mapping[str, Tensor | None], **config: Any) -> Path:
    """One module of a format; ``planes`` replace what the format has (None: leave out)."""
    fmt = FORMATS[name]
    made = {**fmt.make(WEIGHT)[0], **planes}
    tensors = {f"{MODULE}.{suffix}": plane.contiguous() for suffix, plane in made.items() if plane is not None}
    return write_folder(path, {"quantization_config": {**fmt.config, **config}}, tensors)


def octets(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def state(**changes: Any) -> Tensor:
    """Of the doubly quantized NF4 format; None: leave out."""
    found = json.loads(bytes(FORMATS["bnb-nf4-double"].make(WEIGHT)[0][STATE].numpy()))
    return octets(json.dumps({key: value for key, value in (found | changes).items() if value is not None}))


@pytest.mark.parametrize(
    ("planes", "reason"),
    [
        ({STATE: octets("[" * 99999)}, "expected a JSON object: maximum recursion"),
        ({STATE: octets("{'shape': 1}")}, "expected a JSON object: Expecting property name"),
        ({STATE: torch.tensor([255, 254], dtype=torch.uint8)}, "expected a JSON object: "),
        ({STATE: octets('{"shape": ' + "9" * 5000 + "}")}, "expected a JSON object: Exceeds the limit"),
        ({STATE: octets("[1]")}, "expected a JSON object, found list"),
        ({STATE: torch.ones(4)}, "expected dtype U8, found F32"),
        ({STATE: state(quant_type="fp4")}, "quant_type: expected 'nf4', found 'fp4'"),
        ({STATE: state(shape=[3072])}, r"shape: expected two positive integers, found \[3072\]"),
        ({STATE: state(shape=[24, -128])}, "shape: expected two positive integers"),
        ({STATE: state(shape=[10**30, 128])}, r"weight: expected \d+ bytes, two codes each, of shape .*, found 1536"),
        ({STATE: state(blocksize=0)}, "blocksize: expected a positive integer, found 0"),
        ({STATE: state(blocksize=True)}, "blocksize: expected a positive integer, found True"),
        ({STATE: state(blocksize=256)}, "blocks of 256 values do not divide rows of 128.*llmctl quantize"),
        ({STATE: state(shape=[32, 96])}, "blocks of 64 values do not divide rows of 96"),
        ({STATE: state(nested_offset=None)}, "nested_offset: expected a finite float of 32 bits, found None"),
        ({STATE: state(nested_offset=float("nan"))}, "nested_offset: expected a finite float of 32 bits, found nan"),
        ({STATE: state(nested_offset=-1e39)}, r"nested_offset: expected a finite float of 32 bits, found -1e\+39"),
        ({STATE: state(nested_offset=10**400)}, "nested_offset: expected a finite float of 32 bits, found 1000"),
        ({STATE: state(nested_blocksize="256")}, "nested_blocksize: expected a positive integer, found '256'"),
        ({STATE: state(nested_blocksize=16)}, r"nested_absmax: expected 3 values of F32, found F32 \[1\]"),
        ({STATE: state(nested_blocksize=None)}, r"weight\.absmax: expected 48 values of F32, found U8 \[48\]"),
        ({"weight": None}, "weight: expected 1536 bytes, .*, found none"),
        ({"weight": torch.ones(1535, dtype=torch.uint8)}, "weight: expected 1536 bytes, .*, found 1535"),
        ({"weight.absmax": torch.ones(47, dtype=torch.uint8)}, r"absmax: expected 48 values of U8, found U8 \[47\]"),
        ({"weight.absmax": torch.ones(48)}, r"absmax: expected 48 values of U8, found F32 \[48\]"),
        ({"weight.absmax": None}, "absmax: expected 48 values of U8, found none"),
        ({"weight.nested_absmax": None}, "nested_absmax: expected 1 values of F32, found none"),
        (
            {"weight.nested_quant_map": torch.ones(16)},
            r"nested_quant_map: expected 256 .*, found F32 \[16\]",
        ),
        ({"weight.quant_map": torch.ones(8)}, r"quant_map: expected 16 values of F32, found F32 \[8\]"),
        ({"weight.quant_map": torch.full((16,), torch.nan)}, "quant_map: not the values of nf4"),
        ({"weight.quant_map": torch.linspace(-1, 1, 16)}, "quant_map: not the values of nf4"),
    ],
)
def test_states_that_are_not_as_it_writes_them(tmp_path: Path, planes: dict[str, Tensor | None], reason: str) -> None:
    made = folder(tmp_path, "bnb-nf4-double", planes)
    with pytest.raises(CheckpointError, match=f"'{MODULE}': .*{reason}") as error:
        open_checkpoint(made).weight(f"{MODULE}.weight")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("planes", "reason"),
    [
        ({"weight": None}, "weight: expected a matrix of I8 beside its SCB, found none"),
        ({"weight": WEIGHT}, r"weight: expected a matrix of I8 beside its SCB, found F32 \[24, 128\]"),
        ({"SCB": torch.ones(23)}, r"SCB: expected 24 values of F32, found F32 \[23\]"),
        ({"SCB": torch.ones(24).half()}, "SCB: expected 24 values of F32, found F16"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, r"weight_format: expected 0 \(rows\), found 2"),
        ({"weight_format": torch.tensor([0, 0], dtype=torch.uint8)}, "weight_format: expected 1 values of U8"),
    ],
)
def test_rows_that_are_not_as_it_writes_them(tmp_path: Path, planes: dict[str, Tensor | None], reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{MODULE}': {reason}"):
        open_checkpoint(folder(tmp_path, "bnb-int8", planes)).weight(f"{MODULE}.weight")


@pytest.mark.parametrize("nested_block", [512, 10**30])
def test_blocks_of_scales_may_be_longer_than_all_of_them(tmp_path: Path, nested_block: int) -> None:
    planes, meant = FORMATS["bnb-nf4-double"].make(WEIGHT)
    made = folder(tmp_path, "bnb-nf4-double", {**planes, STATE: state(nested_blocksize=nested_block)})
    found = open_checkpoint(made).weight(f"{MODULE}.weight")
    assert isinstance(found, QuantizedWeight)
    assert torch.equal(found.dequantize(), meant)


@pytest.mark.parametrize(("usual_map", "nested_block"), [(True, 256), (False, 256), (True, 64)])
def test_doubly_quantized_scales_are_kept_where_map_and_blocks_are_the_usual_ones(
    tmp_path: Path, usual_map: bool, nested_block: int
) -> None:
    planes, meant = FORMATS["bnb-nf4-double"].make(WEIGHT)
    values = planes["weight.nested_quant_map"] if usual_map else planes["weight.nested_quant_map"] * 1.5
    changes = {"weight.nested_quant_map": values, STATE: state(nested_blocksize=nested_block)}
    opened = open_checkpoint(folder(tmp_path, "bnb-nf4-double", {**planes, **changes}))
    found = opened.weight(f"{MODULE}.weight")
    assert isinstance(found, QuantizedWeight)
    usual = usual_map and nested_block == 256
    described = opened.describe(f"{MODULE}.weight").quant
    assert described == found.scheme == QuantScheme(4, 64, True, book="nf4", nested=256 * usual)
    largest, offset = planes["weight.nested_absmax"], json.loads(bytes(state().numpy()))["nested_offset"]
    expected = values[planes["weight.absmax"].int()] * largest + offset
    assert torch.equal(found.scales.flatten(), expected)
    assert torch.equal(found.dequantize(), meant) == usual_map
    if usual:
        assert found.nested is not None
        assert torch.equal(found.nested[0].floats(), found.scales)
    else:
        assert found.nested is None


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_may_be_stored_as_any_dtype(tmp_path: Path, storage: torch.dtype) -> None:
    """``bnb_4bit_quant_storage``; bytes are not to be taken for numbers of it."""
    planes, meant = FORMATS["bnb-nf4"].make(WEIGHT)
    made = folder(tmp_path, "bnb-nf4", {"weight": planes["weight"].flatten().view(storage)[:, None]})
    found = open_checkpoint(made).weight(f"{MODULE}.weight")
    assert isinstance(found, QuantizedWeight)
    assert torch.equal(found.dequantize(), meant)


def test_settings_of_writers_that_name_no_method(tmp_path: Path) -> None:
    made = folder(tmp_path, "bnb-int8", {"weight_format": None}, quant_method=None)
    assert open_checkpoint(made).describe(f"{MODULE}.weight").quant == QuantScheme(8, -1, True)


@pytest.mark.parametrize(
    ("config", "error", "reason"),
    [
        (
            {"load_in_8bit": True},
            CheckpointError,
            "expected one of load_in_4bit and .*, found both",
        ),
        ({"load_in_4bit": False}, CheckpointError, "to be true, found neither"),
        ({"load_in_4bit": "yes"}, CheckpointError, "load_in_4bit: expected true or false, found 'yes'"),
        ({"bnb_4bit_quant_type": "nf3"}, UnsupportedModelError, "bitsandbytes' 'nf3' is not read; known: nf4, fp4"),
        ({"llm_int8_skip_modules": 3}, CheckpointError, "llm_int8_skip_modules: expected names, found 3"),
    ],
)
def test_settings_that_cannot_be_read(tmp_path: Path, config: dict[str, Any], error: type, reason: str) -> None:
    with pytest.raises(error, match=reason):
        open_checkpoint(folder(tmp_path, "bnb-nf4", {}, **config))


def test_what_is_not_done_as_llm_int8_does_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, said in (("bnb-int8", NOTES["bitsandbytes", 8]), ("bnb-nf4", "")):
        model = str(write_pair(tmp_path / name, FORMATS[name])[0])
        caplog.clear()
        plan = plan_build(BuildConfig(model=model, target="reference"))
        assert len(plan.graph.weights) > len(linear_shapes()) // 2
        assert ("outlying activations" in caplog.text) is bool(said)
        assert describe_model(model)["quantization"]["note"] == said


def test_doubly_quantized_scales_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """NaN is what codes with it multiply out to: no contradiction, but nothing to build from."""
    made = folder(tmp_path, "bnb-nf4-double", {"weight.nested_absmax": torch.tensor([math.nan])})
    weight = open_checkpoint(made).weight(f"{MODULE}.weight")
    assert isinstance(weight, QuantizedWeight)
    with pytest.raises(CheckpointError, match=r"up_proj\.scales': \d+ of 48 values are not finite"):
        check_finite(f"{MODULE}.weight", weight)
