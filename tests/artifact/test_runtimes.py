"""Engine planes and checkpoint tensors give the same weights, and runtimes that agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import VOCAB, write_dense, write_gptq

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import WeightPlane, load_engine
from llmctl.artifact.manifest import MANIFEST_NAME, Target, manifest_to_bytes
from llmctl.artifact.runtimes import EngineWeights, load_runtime, open_runtime, runtime_from_checkpoint
from llmctl.checkpoint.assemble import assemble, checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.config import BuildConfig, EngineConfig
from llmctl.engine.step import SequenceSlice, StepPlan
from llmctl.errors import CheckpointError, EngineLoadError, UsageError
from llmctl.graph.graph import Graph, QuantScheme, Weight, WeightPart
from llmctl.graph.passes import apply_passes
from llmctl.targets.reference.runtime import ReferenceRuntime

PLAN = StepPlan((SequenceSlice("a", np.random.default_rng(0).integers(0, VOCAB, 20).tolist(), 0, [2, 0], True),))


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["dense", "asymmetric 4-bit", "symmetric 3-bit", "8-bit"])
def test_an_engine_runs_as_its_checkpoint_does(
    kind: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Target ``reference``, and ``cpu`` where no compiler was found at build time."""
    monkeypatch.setattr("llmctl.artifact.plan.find_compiler", lambda: None)
    folder = tmp_path / "checkpoint"
    if kind == "dense":
        write_dense(folder)
    else:
        bits = {"asymmetric 4-bit": 4, "symmetric 3-bit": 3, "8-bit": 8}[kind]
        write_gptq(folder, bits=bits, symmetric=bits == 3)
    config = BuildConfig(model=str(folder), output=str(tmp_path / "engine"), target=target, dtype="float32")
    engine = load_engine(build_engine(config), kv_cache_bytes=2**20)
    runtime = load_runtime(engine)
    assert isinstance(runtime, ReferenceRuntime)
    assert runtime.limits.num_blocks == engine.plan.num_blocks
    assert runtime.limits.max_model_len == engine.max_model_len
    expected = runtime_from_checkpoint(open_checkpoint(folder), num_blocks=4)
    torch.testing.assert_close(runtime.logits(PLAN), expected.logits(PLAN), atol=1e-5, rtol=1e-5)


def test_a_cuda_engine_has_no_runtime_here(tmp_path: Path) -> None:
    write_dense(tmp_path / "checkpoint")
    config = BuildConfig(str(tmp_path / "checkpoint"), str(tmp_path / "engine"), target="reference")
    engine = load_engine(build_engine(config))
    with pytest.raises(UsageError, match="--target cuda:sm_90: this version builds cuda engines but has no runtime"):
        open_runtime(engine.path, EngineConfig(target="cuda:sm_90"))
    foreign = replace(engine, manifest=replace(engine.manifest, target=Target("cuda", ("sm_90",))))
    (engine.path / MANIFEST_NAME).write_bytes(manifest_to_bytes(foreign.manifest))
    for run in (lambda: load_runtime(foreign), lambda: open_runtime(engine.path, EngineConfig())):
        with pytest.raises(EngineLoadError, match="target cuda:sm_90: this version builds cuda engines but") as caught:
            run()
        assert "--target cpu" in str(caught.value.fix)


def planes_of(weight: QuantizedWeight, name: str) -> dict[str, WeightPlane]:
    """The engine's storage of a quantized weight, written out from its definition."""
    codes = weight.codes.numpy()
    if weight.scheme.bits != 8:
        even, odd = codes[:, ::2], codes[:, 1::2]
        odd = np.pad(odd, ((0, 0), (0, even.shape[1] - odd.shape[1])))
        codes = even | odd << 4
    planes = {"codes": ("U8", codes), "scales": ("F16", weight.scales.numpy())}
    if not weight.scheme.symmetric:
        planes["zeros"] = ("U8", weight.zeros.numpy())
    if weight.g_idx is not None:
        planes["g_idx"] = ("I32", weight.g_idx.numpy())
    return {f"{name}.{k}": WeightPlane(dtype, array.shape, array) for k, (dtype, array) in planes.items()}


def random_weight(rows: int, columns: int, scheme: QuantScheme, seed: int = 0) -> QuantizedWeight:
    rng = torch.Generator().manual_seed(seed)
    groups, top = scheme.groups(columns), 2**scheme.bits
    zeros = torch.randint(1, top, (rows, groups), generator=rng)
    order = torch.randint(0, groups, (columns,), generator=rng).int()
    return QuantizedWeight(
        torch.randint(0, top, (rows, columns), generator=rng).to(torch.uint8),
        torch.rand(rows, groups, generator=rng).half(),
        (torch.full_like(zeros, top // 2) if scheme.symmetric else zeros).to(torch.uint8),
        scheme,
        order if scheme.act_order else None,
    )


def single(name: str, shape: tuple[int, ...], quant: QuantScheme | None, *parts: WeightPart) -> Graph:
    weight = Weight(name, shape, parts or (WeightPart("t.weight"),), quant)
    return SimpleNamespace(weights={name: weight})  # type: ignore[return-value]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "columns", "group"), [(4, 33, 11), (3, 32, -1), (8, 33, 11), (4, 1, 1)])
def test_planes_round_trip(bits: int, columns: int, group: int, symmetric: bool, act_order: bool) -> None:
    scheme = QuantScheme(bits, group, symmetric, act_order)
    weight = random_weight(5, columns, scheme)
    found = EngineWeights(single("w", (5, columns), scheme), planes_of(weight, "w"))["w"]
    assert isinstance(found, QuantizedWeight)
    assert found.scheme == scheme
    for plane in ("codes", "scales", "zeros"):
        torch.testing.assert_close(getattr(found, plane), getattr(weight, plane), atol=0, rtol=0)
    torch.testing.assert_close(found.dequantize(), weight.dequantize(), atol=0, rtol=0)


def test_bfloat16_planes() -> None:
    expected = torch.randn(3, 4).bfloat16()
    plane = WeightPlane("BF16", (3, 4), expected.view(torch.uint16).numpy())
    found = EngineWeights(single("w", (3, 4), None), {"w": plane})["w"]
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


class Tensors:
    """A weight source over a dict."""

    def __init__(self, **tensors: Any) -> None:
        self._tensors = tensors

    def weight(self, name: str) -> Any:
        return self._tensors[name]


def test_assemble_dense_parts() -> None:
    a, b = torch.randn(4, 6), torch.randn(6, 5)
    parts = (
        WeightPart("a", rows=(1, 3)),
        WeightPart("b", transpose=True),
        WeightPart("b", transpose=True, rows=(4, 5)),
    )
    found = assemble(Weight("w", (8, 6), parts), Tensors(a=a, b=b))
    torch.testing.assert_close(found, torch.cat([a[1:3], b.T, b.T[4:5]]), atol=0, rtol=0)
    with pytest.raises(CheckpointError, match=r"a, b, b: expected shape \[9, 6\], found \[8, 6\]"):
        assemble(Weight("w", (9, 6), parts), Tensors(a=a, b=b))


def test_assemble_quantized_parts() -> None:
    scheme = QuantScheme(4, 3, False)
    a, b = random_weight(4, 6, scheme, 1), random_weight(5, 6, scheme, 2)
    parts = (WeightPart("a", rows=(1, 3)), WeightPart("b"))
    found = assemble(Weight("w", (7, 6), parts, scheme), Tensors(a=a, b=b))
    assert isinstance(found, QuantizedWeight)
    torch.testing.assert_close(found.dequantize(), torch.cat([a.dequantize()[1:3], b.dequantize()]), atol=0, rtol=0)
    with pytest.raises(CheckpointError, match="tensor 'a': expected a dense weight, found QuantScheme"):
        assemble(Weight("w", (7, 6), parts), Tensors(a=a, b=b))
    with pytest.raises(CheckpointError, match=r"tensor 'a': expected QuantScheme.*, found a dense weight"):
        assemble(Weight("w", (7, 6), parts, scheme), Tensors(a=a.dequantize(), b=b))
    ordered = QuantScheme(4, 3, False, act_order=True)
    c, d = random_weight(4, 6, ordered, 1), random_weight(4, 6, ordered, 2)
    with pytest.raises(CheckpointError, match="cannot be merged"):
        assemble(Weight("w", (8, 6), (WeightPart("a"), WeightPart("b")), ordered), Tensors(a=c, b=d))


def test_merged_quantized_weights_are_the_parts_in_order(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gptq(tmp_path / "checkpoint"))
    graph = apply_passes(checkpoint_graph(checkpoint))
    merged = assemble(graph.weights["layers.1.qkv_proj.weight"], checkpoint)
    parts = [checkpoint.weight(f"model.layers.1.self_attn.{p}_proj.weight") for p in "qkv"]
    assert isinstance(merged, QuantizedWeight)
    expected = torch.cat([p.dequantize() for p in parts if isinstance(p, QuantizedWeight)])
    torch.testing.assert_close(merged.dequantize(), expected, atol=0, rtol=0)
