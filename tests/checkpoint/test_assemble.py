"""A graph's weights out of checkpoint tensors: slices, transposes and concatenations, dense or quantized."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import logits_of
from random_weights import random_weight
from tiny_checkpoint import dense_tensors, write_arrays, write_gptq

from llmctl.checkpoint.assemble import assemble, checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.errors import CheckpointError
from llmctl.graph.graph import QuantScheme, Weight, WeightPart
from llmctl.graph.passes import apply_passes
from llmctl.targets.reference.weights import CheckpointWeights


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


VALUES = st.sampled_from([0.0, 1.0, -2.5, 6e4, math.inf, -math.inf, math.nan])


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(VALUES, min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_what_is_not_finite_is_refused_by_name(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    odd = sum(not math.isfinite(value) for value in values)
    weight = Weight("w", tuple(tensor.shape), (WeightPart("a.weight"),))
    if not odd:
        assert torch.equal(assemble(weight, Tensors(**{"a.weight": tensor})), tensor)
        return
    with pytest.raises(CheckpointError, match=f"'a.weight': {odd} of {len(values)} values are not finite"):
        assemble(weight, Tensors(**{"a.weight": tensor}))


def test_only_the_rows_that_are_taken_count() -> None:
    tensor = torch.ones(4, 2)
    tensor[3, 1] = math.inf
    assemble(Weight("w", (3, 2), (WeightPart("a", rows=(0, 3)),)), Tensors(a=tensor))
    with pytest.raises(CheckpointError, match="'a': 1 of 2 values are not finite"):
        assemble(Weight("w", (1, 2), (WeightPart("a", rows=(3, 4)),)), Tensors(a=tensor))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_scales_that_are_not_finite(value: float) -> None:
    scheme = QuantScheme(4, 3, False)
    weight = random_weight(4, 6, scheme, 1)
    weight.scales[2, 1] = value
    with pytest.raises(CheckpointError, match=r"'a\.scales': 1 of 8 values are not finite"):
        assemble(Weight("w", (4, 6), (WeightPart("a.weight"),), scheme), Tensors(**{"a.weight": weight}))


def test_minimums_that_are_not_finite() -> None:
    scheme = QuantScheme(4, 3, False, minimum=True)
    codes, scales = torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4, 2)
    minimums = torch.tensor([[0.0, -1.0], [math.nan, 0.0], [0.0, 0.0], [0.0, 0.0]])
    zeros = torch.zeros(4, 2, dtype=torch.uint8)
    weight = QuantizedWeight(codes, scales, zeros, scheme, minimums=minimums)
    with pytest.raises(CheckpointError, match=r"'a\.minimums': 1 of 8 values are not finite"):
        assemble(Weight("w", (4, 6), (WeightPart("a.weight"),), scheme), Tensors(**{"a.weight": weight}))


def test_values_beyond_float16() -> None:
    weight, source = Weight("w", (2,), (WeightPart("a"),)), Tensors(a=torch.tensor([1.0, -7e4]))
    assemble(weight, source, "bfloat16")
    with pytest.raises(CheckpointError, match=r"'a': a value of 70000 is too large for float16 .*--dtype bfloat16"):
        assemble(weight, source, "float16")
    assemble(weight, Tensors(a=torch.tensor([1.0, -65504.0])), "float16")


@pytest.mark.parametrize("method", ["gptq", None])
def test_a_head_of_its_own_beside_tied_embeddings(tmp_path: Path, method: str | None) -> None:
    """What transformers does with such a checkpoint, dense; a quantized head can be no copy of the embeddings."""
    if method == "gptq":
        folder = write_gptq(tmp_path, head=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    else:
        folder = write_arrays(tmp_path, dense_tensors(), tie_word_embeddings=True, dtype="float32")
    checkpoint = open_checkpoint(folder)
    graph = checkpoint_graph(checkpoint)
    assert graph.ops[-1].weights == ("lm_head.weight", "")
    assert (graph.weights["lm_head.weight"].quant is not None) == (method == "gptq")
    if method is None:
        from transformers import AutoModelForCausalLM

        found = logits_of(graph, CheckpointWeights(graph, checkpoint), [[5, 60, 33]])
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            expected = theirs(torch.tensor([[5, 60, 33]])).logits[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_head_that_equals_tied_embeddings_is_tied(tmp_path: Path, dtype: type) -> None:
    """In another dtype, too."""
    tensors = dense_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(dtype)
    graph = checkpoint_graph(open_checkpoint(write_arrays(tmp_path / "a", tensors, tie_word_embeddings=True)))
    assert graph.ops[-1].weights == ("embed.weight", "")
    tensors["lm_head.weight"][3, 3] += 1
    graph = checkpoint_graph(open_checkpoint(write_arrays(tmp_path / "b", tensors, tie_word_embeddings=True)))
    assert graph.ops[-1].weights == ("lm_head.weight", "")
