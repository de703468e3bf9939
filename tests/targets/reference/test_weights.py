"""Engine planes give the weights that they were made of."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_weights import random_weight

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import Graph, QuantScheme, Weight, WeightPart
from llmctl.targets.planes import WeightPlane
from llmctl.targets.reference.weights import EngineWeights


def planes_of(weight: QuantizedWeight, name: str) -> dict[str, WeightPlane]:
    """The engine's storage of a quantized weight, written out from its definition."""
    bits = np.unpackbits(weight.codes.numpy()[:, :, None], axis=2, bitorder="little")
    fields, at = [], 0
    for width in (width for width in (8, 4, 2, 1) if weight.scheme.bits & width):
        row = bits[:, :, at : at + width].reshape(len(bits), -1)
        fields.append(np.packbits(row, axis=1, bitorder="little"))
        at += width
    planes = {"codes": ("U8", np.concatenate(fields, axis=1)), "scales": ("F16", weight.scales.numpy())}
    if not weight.scheme.symmetric:
        planes["zeros"] = ("U8", weight.zeros.numpy())
    if weight.g_idx is not None:
        planes["g_idx"] = ("I32", weight.g_idx.numpy())
    return {f"{name}.{k}": WeightPlane(dtype, array.shape, array) for k, (dtype, array) in planes.items()}


def single(name: str, shape: tuple[int, ...], quant: QuantScheme | None, *parts: WeightPart) -> Graph:
    weight = Weight(name, shape, parts or (WeightPart("t.weight"),), quant)
    return SimpleNamespace(weights={name: weight})  # type: ignore[return-value]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("bits", "columns", "group"),
    [(4, 33, 11), (3, 33, -1), (6, 33, 11), (5, 33, 11), (2, 33, 11), (8, 33, 11), (4, 1, 1)],
)
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
