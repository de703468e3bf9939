"""A graph's weights out of checkpoint tensors: slices, transposes and concatenations, dense or quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import random_weight
from tiny_checkpoint import write_gptq

from llmctl.checkpoint.assemble import assemble, checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.errors import CheckpointError
from llmctl.graph.graph import QuantScheme, Weight, WeightPart
from llmctl.graph.passes import apply_passes


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
    with pytest.raises(CheckpointError, match="cannot be stacked"):
        assemble(Weight("w", (8, 6), (WeightPart("a"), WeightPart("b")), ordered), Tensors(a=c, b=d))


def test_merged_quantized_weights_are_the_parts_in_order(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gptq(tmp_path / "checkpoint"))
    graph = apply_passes(checkpoint_graph(checkpoint))
    merged = assemble(graph.weights["layers.1.qkv_proj.weight"], checkpoint)
    parts = [checkpoint.weight(f"model.layers.1.self_attn.{p}_proj.weight") for p in "qkv"]
    assert isinstance(merged, QuantizedWeight)
    expected = torch.cat([p.dequantize() for p in parts if isinstance(p, QuantizedWeight)])
    torch.testing.assert_close(merged.dequantize(), expected, atol=0, rtol=0)
