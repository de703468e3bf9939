"""compressed-tensors, fp8 and ModelOpt checkpoints: what is refused, and in which words; methods that are not read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import write_folder
from quantized_files import FORMATS, model_config
from tiny_checkpoint import write_gptq

from llmctl.checkpoint.methods import REFUSED
from llmctl.checkpoint.name_patterns import NameMatcher
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight, stack_rows
from llmctl.checkpoint.safetensors_io import SafetensorsFile, map_tensor, tensor_spec, write_safetensors
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.graph import QuantScheme
from llmctl.graph.hf_config import read_arch

MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)) / 16


_GPTQ = {"quant_method": "gptq", "format": "gptq", "bits": 4, "group_size": 64}
_AWQ = {"quant_method": "awq", "format": "gemm", "bits": 4, "group_size": 64}


def folder(path: Path, name: str, *, planes: dict[str, Any] | None = None, **config: Any) -> Path:
    """One module of a format; ``planes`` and ``config`` replace what the format has (None: leave out)."""
    fmt = FORMATS[name]
    made = {**fmt.make(WEIGHT)[0], **(planes or {})}
    tensors = {f"{MODULE}.{suffix}": plane.contiguous() for suffix, plane in made.items() if plane is not None}
    return write_folder(path, {fmt.key: {**fmt.config, **config}}, tensors)


def weights(**changes: Any) -> dict[str, Any]:
    """The config groups of one group, its weights changed."""
    args = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 128, **changes}
    return {"group_0": {"targets": ["Linear"], "weights": args}}


@pytest.mark.parametrize("target", ["Linear", MODULE, r"re:.*up_proj$", "re:model"])
def test_targets_that_name_the_module(tmp_path: Path, target: str) -> None:
    groups = {
        "other": {"targets": ["re:.*down_proj"], "weights": {"type": "int", "num_bits": 8, "strategy": "channel"}},
        "group_0": {**weights()["group_0"], "targets": [target]},
    }
    checkpoint = open_checkpoint(folder(tmp_path, "ct-w4-g128", config_groups=groups))
    assert checkpoint.names() == [f"{MODULE}.weight"]
    assert checkpoint.describe(f"{MODULE}.weight").quant == QuantScheme(4, -1, True)


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        ("lm_head", True),
        ("lm", False),
        ("re:lm", True),
        ("re:head", False),
        (r"re:^(?!.*experts).*$", True),
        (r"re:^(?!.*head).*$", False),
    ],
)
def test_patterns_match_from_the_start(entry: str, meant: bool) -> None:
    assert NameMatcher().matches(("lm_head",), entry) is meant


@pytest.mark.parametrize("place", ["ignore", "targets"])
def test_patterns_that_never_end_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr("llmctl.checkpoint.name_patterns.SECONDS", 0.01)
    endless = "re:((a?.{1,999}){1,999}){1,999}[!?]"
    groups = {"g": {**weights()["group_0"], "targets": [endless]}}
    config = {"ignore": [endless]} if place == "ignore" else {"config_groups": groups}
    with pytest.raises(CheckpointError, match=r"'re:\(.*' takes more than 0\.01 s to match; name the modules"):
        open_checkpoint(folder(tmp_path, "ct-w4-g128", **config)).describe(f"{MODULE}.weight")


def test_a_pattern_that_calls_itself_is_given_up() -> None:
    with pytest.raises(ValueError, match=r"'re:\(\?R\)' takes more memory than there is to match"):
        NameMatcher().matches(("lm_head",), "re:(?R)")


@pytest.mark.parametrize("target", [r"re:.*language_model\.layers", r"re:model\.layers", "OWN", MODULE])
def test_patterns_know_a_multimodal_checkpoint_s_own_names(tmp_path: Path, target: str) -> None:
    own = MODULE.replace("model.", "model.language_model.", 1)
    fmt = FORMATS["ct-w4-g128"]
    groups = {"g": {**weights()["group_0"], "targets": [own if target == "OWN" else target]}}
    config = {"text_config": model_config(), fmt.key: {**fmt.config, "config_groups": groups}}
    tensors = {f"{own}.{suffix}": plane.contiguous() for suffix, plane in fmt.make(WEIGHT)[0].items()}
    checkpoint = open_checkpoint(write_folder(tmp_path, {**model_config(), **config}, tensors))
    assert checkpoint.describe(f"{MODULE}.weight").quant == QuantScheme(4, -1, True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": {"ignore": [MODULE]}}, "though the config's ignore list names it"),
        ({"config": {"ignore": ["re:.*up_proj"]}}, "though the config's ignore list names it"),
        ({"config": {"config_groups": {"g": {**weights()["group_0"], "targets": ["re:.*down"]}}}}, "no config group"),
        ({"config": {"config_groups": weights(symmetric=False)}}, "asymmetric, but there is no weight_zero_point"),
        ({"config": {"config_groups": weights(group_size=32)}}, r"scales: expected shape .* \[256, 4\].*found"),
        ({"planes": {"weight_shape": None}}, "weight_packed needs a weight_shape"),
        ({"planes": {"weight_shape": torch.tensor([256, 64])}}, r"weight_packed: expected shape \[256, 8\]"),
        ({"planes": {"weight_packed": None}}, "weight: expected a matrix of I8 or a weight_packed, found none"),
        ({"planes": {"weight_zero_point": torch.ones(256, 1, dtype=torch.int8)}}, "zero points are not all 0"),
        (
            {"planes": {"weight_zero_point": torch.ones(3, dtype=torch.int8)}},
            r"_zero_point: .* I8 \[256, 1\], found I8 \[3\]",
        ),
        ({"planes": {"weight_zero_point": torch.ones(32, dtype=torch.int32)}}, r"_zero_point: expected I32 \[32, 1\]"),
        ({"planes": {"weight_zero_point": torch.ones(256, 1)}}, "_zero_point: .* found F32"),
        ({"planes": {"weight_packed": torch.ones(256, 16)}}, "weight_packed: expected dtype I32, found F32"),
        ({"planes": {"weight_scale": torch.ones(256, 1, dtype=torch.uint8)}}, "weight_scale: .* F32, found U8"),
        ({"planes": {"weight_shape": torch.tensor([256.0, 128.0])}}, "weight_shape: .* I64, found F32"),
        ({"planes": {"weight_g_idx": torch.zeros(128)}}, "weight_g_idx: .* I64, found F32"),
    ],
)
def test_planes_that_contradict_the_config(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    made = folder(tmp_path, "ct-w4-g128", planes=changes.get("planes"), **changes.get("config", {}))
    with pytest.raises(CheckpointError, match=reason) as error:
        open_checkpoint(made).weight(f"{MODULE}.weight")
    assert MODULE in str(error.value)


@pytest.mark.parametrize(
    ("config", "error", "reason"),
    [
        ({"config_groups": weights(num_bits=3)}, UnsupportedModelError, "type int with 3 bits by group are not read"),
        ({"config_groups": weights(type="float", num_bits=4)}, UnsupportedModelError, "type float with 4 bits"),
        ({"config_groups": weights(group_size="x")}, CheckpointError, "group_size: expected a positive integer"),
        ({"config_groups": {}}, CheckpointError, "expected an object config_groups"),
        ({"format": "nvfp4-pack-quantized"}, UnsupportedModelError, "'nvfp4-pack-quantized' is not read; known: pack"),
        ({"config_groups": weights(strategy="block")}, CheckpointError, "block_structure: expected two positive"),
        ({"config_groups": weights(symmetric="false")}, CheckpointError, "symmetric: expected true .*, found 'false'"),
        ({"config_groups": weights(actorder="by size")}, CheckpointError, "actorder: expected group or .*'by size'"),
        ({**_GPTQ, "sym": 1}, CheckpointError, "sym: expected true or false, found 1"),
        ({**_GPTQ, "desc_act": "no"}, CheckpointError, "desc_act: expected true or false, found 'no'"),
        ({**_AWQ, "zero_point": "no"}, CheckpointError, "zero_point: expected true or false, found 'no'"),
        ({"config_groups": weights(num_bits=4.0)}, UnsupportedModelError, r"with 4\.0 bits"),
        ({"ignore": ["re:("]}, CheckpointError, r"config\.json: ignore: 're:\(' is no regular expression"),
        ({"ignore": ["re:a{9999999999999}"]}, CheckpointError, r"'re:a\{9+\}': expected patterns of at most 100000 "),
        ({"ignore": ["re:((a{999}){ 999,}){1,999}"]}, CheckpointError, "repetitions written out"),
        ({"ignore": ["re:" + "(" * 99 + "a{600}" + "){1}" * 98 + "){600}"]}, CheckpointError, "written out"),
        ({"ignore": ["re:" + "(" * 6000 + ")" * 6000]}, CheckpointError, "is no regular expression"),
        ({"ignore": 5}, CheckpointError, "ignore: expected names, found 5"),
        ({"quant_method": "fp8", "ignored_layers": {"a": 1}}, CheckpointError, "ignored_layers: expected names"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": 1}, CheckpointError, "exclude_modules:"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path: Path, config: dict[str, Any], error: type, reason: str) -> None:
    with pytest.raises(error, match=reason):
        open_checkpoint(folder(tmp_path, "ct-w4-g128", **config))


@pytest.mark.parametrize(
    ("order", "refused"), [("group", True), (True, True), ("Dynamic", True), ("weight", False), (None, False)]
)
def test_columns_out_of_order_need_their_groups(tmp_path: Path, order: Any, refused: bool) -> None:
    made = folder(tmp_path, "ct-w4-g32-asym", config_groups=weights(group_size=32, symmetric=False, actorder=order))
    if refused:
        with pytest.raises(CheckpointError, match="the config says actorder group, but there is no weight_g_idx"):
            open_checkpoint(made).describe(f"{MODULE}.weight")
    else:
        assert open_checkpoint(made).describe(f"{MODULE}.weight").quant == QuantScheme(4, 32, False)


@pytest.mark.parametrize(
    ("suffix", "change", "reason"),
    [
        ("qweight", lambda plane: plane.view(torch.float32), "qweight: expected dtype I32, found F32"),
        ("scales", torch.Tensor.int, "scales: expected dtype F16 or BF16 or F32, found I32"),
        ("g_idx", torch.Tensor.float, "g_idx: expected dtype I32 or I64, found F32"),
        ("g_idx", lambda plane: plane[:, None], r"g_idx: expected one axis, found shape \[64, 1\]"),
    ],
)
def test_gptq_planes_of_another_kind(
    tmp_path: Path, suffix: str, change: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    made = write_gptq(tmp_path, act_order=True)
    file, name = SafetensorsFile(made / "model.safetensors"), f"{MODULE}.{suffix}"
    tensors = {stored: map_tensor(file, stored) for stored in file.tensors}
    tensors[name] = change(tensors[name]).contiguous()
    write_safetensors(file.path, {stored: tensor_spec(tensor) for stored, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=f"'{MODULE}': {reason}"):
        open_checkpoint(made).describe(f"{MODULE}.weight")


def test_either_key_of_settings_is_understood(caplog: pytest.LogCaptureFixture) -> None:
    for key in ("quantization_config", "compression_config"):
        read_arch({**model_config(), key: {}})
    assert not caplog.records


def test_unpacked_zero_points_of_old_writers(tmp_path: Path) -> None:
    """Writers before compressed-tensors 0.9 did not pack them."""
    planes, meant = FORMATS["ct-w4-g32-asym"].make(WEIGHT)
    packed = planes["weight_zero_point"]
    signed = torch.stack([packed >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1) - 8
    checkpoint = open_checkpoint(
        folder(tmp_path, "ct-w4-g32-asym", planes={"weight_zero_point": signed.to(torch.int8)})
    )
    found = checkpoint.weight(f"{MODULE}.weight")
    assert isinstance(found, QuantizedWeight)
    torch.testing.assert_close(found.dequantize(), meant)


@pytest.mark.parametrize("name", ["ct-fp8-channel", "fp8-blocks", "modelopt-fp8"])
def test_nan_codes_are_refused(tmp_path: Path, name: str) -> None:
    codes = FORMATS[name].make(WEIGHT)[0]["weight"].clone()
    codes.view(torch.uint8)[3, 4] = 0xFF
    made = folder(tmp_path, name, planes={"weight": codes})
    if FORMATS[name].file != "config.json":
        (made / FORMATS[name].file).write_text(json.dumps(FORMATS[name].config))
        (made / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=f"'{MODULE}': weight: NaN among the float8 codes"):
        open_checkpoint(made).weight(f"{MODULE}.weight")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 weights in e5m2 are not read"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4 blocks"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ' is not read; known: FP8"),
        *(({"quant_method": name}, name) for name in REFUSED),
    ],
)
def test_methods_that_are_not_read(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    made = write_folder(tmp_path, {"quantization_config": config}, {"model.norm.weight": torch.ones(4)})
    with pytest.raises(UnsupportedModelError, match=reason):
        open_checkpoint(made)


@pytest.mark.parametrize(
    "also", [{}, {"quantization_config": {"bits": 4, "group_size": 64}}, {"text_config": {"model_type": "llama"}}]
)
def test_mlx_names_its_method_nowhere(tmp_path: Path, also: dict[str, Any]) -> None:
    config = {"quantization": {"bits": 4, "group_size": 64}, **also}
    made = write_folder(tmp_path, config, {"model.norm.weight": torch.ones(4)})
    with pytest.raises(UnsupportedModelError, match="MLX's layout") as error:
        open_checkpoint(made)
    assert "llmctl quantize" in str(error.value.fix)


@pytest.mark.parametrize(("rows", "blocks"), [((256, 128), 128), ((96, 128), 1), ((128, 96), 128)])
def test_blocks_of_rows_are_kept_where_no_seam_cuts_one(rows: tuple[int, int], blocks: int) -> None:
    scheme = QuantScheme(8, 64, True, book="fp8_e4m3", block_rows=128)
    parts = []
    for count in rows:
        scales = torch.rand(scheme.row_blocks(count), 2)
        codes = torch.randint(0, 127, (count, 128), dtype=torch.uint8)
        parts.append(QuantizedWeight(codes, scales, torch.zeros(scales.shape, dtype=torch.uint8), scheme))
    found = stack_rows(parts)
    assert found.scheme.block_rows == blocks
    assert torch.equal(found.dequantize(), torch.cat([part.dequantize() for part in parts]))
