"""A cuda engine holds the checkpoint's codes in the kernels' layout; formats that they refuse stay as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_files import FORMATS, write_pair
from random_weights import random_weight
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_gptq
from tiny_models import MIXTURES, tiny_graph

from llmctl.artifact import builder
from llmctl.artifact.describe import describe_manifest
from llmctl.artifact.loader import read_manifest
from llmctl.checkpoint.assemble import assemble
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.safetensors_io import SafetensorsFile
from llmctl.config import BuildConfig
from llmctl.errors import CheckpointError
from llmctl.graph.code_books import CODE_BOOKS
from llmctl.graph.graph import QuantScheme, Weight, WeightPart
from llmctl.targets.base import BuildOptions
from llmctl.targets.cuda import target
from llmctl.targets.cuda.gemm import weight_format
from llmctl.targets.cuda.layout import from_planes, unpack
from llmctl.targets.cuda.packing import codes_added, cuda_formats, cuda_planes, pack_weight, packed_linears
from llmctl.targets.cuda.target import CUDA_PASSES


def build(model: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(target, "compile_modules", lambda *_args, **_options: [])
    return builder.build_engine(
        BuildConfig(model=str(model), output=str(output), target="cuda:sm_90", dtype="float16", max_model_len=64)
    )


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 32, False), (3, 64, True), (8, -1, False)])
def test_codes_are_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, group_size: int, symmetric: bool
) -> None:
    model = write_gptq(tmp_path / "m", bits=bits, group_size=group_size, symmetric=symmetric)
    engine = build(model, tmp_path / "e", monkeypatch)
    graph, source = read_manifest(engine).graph, open_checkpoint(model)
    file = SafetensorsFile(engine / "weights-00001-of-00001.safetensors")
    packed = packed_linears(graph, {name: file.plane(name) for name in file.tensors})
    assert len(packed) == 2 * 4
    assert sum(linear.format.gated for linear in packed.values()) == 2
    for name, linear in packed.items():
        expected = assemble(graph.weights[name], source)
        assert isinstance(expected, QuantizedWeight)
        codes, scales, zeros, _ = unpack(linear)
        groups, added = expected.scales.shape[1], codes_added(linear.format, expected.scheme)
        assert added == (4 if bits == 3 and symmetric else 0)
        np.testing.assert_array_equal(codes, expected.codes.numpy() + added)
        np.testing.assert_array_equal(scales[:, :groups], expected.scales.numpy())
        np.testing.assert_array_equal(zeros[:, :groups], expected.zeros.numpy() + added)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_other_widths_stand_for_the_same_numbers(bits: int, symmetric: bool) -> None:
    weight = random_weight(40, 96, QuantScheme(bits, 32, symmetric))
    fmt = weight_format(Weight("w", (40, 96), (WeightPart("w"),), weight.scheme), gated=False)
    assert fmt.bits == (4 if bits < 4 else 8)
    codes, scales, zeros, _ = unpack(from_planes(fmt, pack_weight(weight, fmt)))
    group = np.arange(96) // 32
    found = (codes.astype(np.float32) - zeros[:, group]) * scales[:, group].astype(np.float32)
    np.testing.assert_array_equal(found, weight.dequantize().numpy())


def test_scales_beyond_float16_are_refused_by_the_tensors_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of float8 are stored 256 times as large."""
    model, _, _ = write_pair(tmp_path, FORMATS["ct-fp8-tensor"])
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight_scale"))
    save_file({**tensors, name: torch.full_like(tensors[name], 300.0)}, file, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"tensor '.*': expected scales of at most 255.875, .* found 300"
    ) as caught:
        build(model, tmp_path / "e", monkeypatch)
    assert caught.value.fix == "--target reference"


@pytest.mark.parametrize(("bits", "said"), [(3, "3 bits, symmetric, groups of 64, stored as 4 bits"), (4, None)])
def test_what_codes_are_stored_as_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, said: str | None
) -> None:
    model = write_gptq(tmp_path / "m", bits=bits, group_size=64, symmetric=True)
    manifest = read_manifest(build(model, tmp_path / "e", monkeypatch))
    schemes = describe_manifest(manifest)["quantization"]["schemes"]
    assert list(schemes) == [said or "4 bits, symmetric, groups of 64"]


@pytest.mark.parametrize("name", ["bnb-nf4-double", "bnb-fp4"])
def test_codes_of_a_book_stay_at_their_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, _, size = write_pair(tmp_path, FORMATS[name])
    engine = build(model, tmp_path / "e", monkeypatch)
    graph, source = read_manifest(engine).graph, open_checkpoint(model)
    file = SafetensorsFile(engine / "weights-00001-of-00001.safetensors")
    planes = {name: file.plane(name) for name in file.tensors}
    packed = packed_linears(graph, planes)
    assert len(packed) == 2 * 4
    for module, linear in packed.items():
        expected = assemble(graph.weights[module], source)
        assert isinstance(expected, QuantizedWeight)
        codes, scales, zeros, _ = unpack(linear)
        groups = expected.scales.shape[1]
        np.testing.assert_array_equal(codes, expected.codes.numpy())
        np.testing.assert_array_equal(scales[:, :groups], expected.scales.half().numpy())
        assert not zeros.any()
        book = CODE_BOOKS[expected.scheme.book].values
        np.testing.assert_array_equal(planes[f"{module}.tile_book"], np.array(book, np.float32))
    assert sum(planes[f"{m}.{s}"].nbytes for m, linear in packed.items() for s in linear.planes()) <= 1.03 * size


def test_a_refused_format_keeps_its_planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_gptq(tmp_path / "m", bits=4, group_size=16, symmetric=False)
    engine = build(model, tmp_path / "e", monkeypatch)
    assert cuda_formats(read_manifest(engine).graph) == {}
    names = SafetensorsFile(engine / "weights-00001-of-00001.safetensors").tensors
    assert "layers.0.qkv_proj.weight.codes" in names


def test_a_router_s_bias_stays_float32() -> None:
    """Whatever the checkpoint's dtype and the engine's."""
    graph = tiny_graph(MIXTURES["glm4_moe"], None, CUDA_PASSES)
    biases = {op.weights[0] for op in graph.ops if op.kind == "route"}
    planes = cuda_planes(graph, BuildOptions("bfloat16", 128, 16, "bfloat16", graph.passes), None)
    assert len(biases) == 1
    assert {plane.dtypes for name in biases for plane in planes[name]} == {("F32",)}
    others = {plane.dtypes for name in planes.keys() - biases for plane in planes[name]}
    assert others == {("BF16",)}
