"""The native CPU kernels that treat rows by themselves, on every build of the kernels that this machine runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cpu_graphs import Floats, Native, Sketch, each_variant, identity, quantization_is_right, run

from llmctl.engine.step import SequenceSlice
from llmctl.targets.cpu.layout import pack_dense, pack_int
from llmctl.targets.cpu.toolchain import Variant, find_compiler
from llmctl.targets.reference import kernels as reference
from llmctl.targets.rope import cos_sin_table

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.xdist_group("cpu_kernels"),
]
ROWS = 19
WIDTHS = (1, 15, 16, 17, 60, 576)


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(found: Floats, expected: torch.Tensor | Floats, bound: float = 3e-6) -> bool:
    """Within ``bound`` of the largest value."""
    wanted = np.asarray(expected, np.float64)
    return bool(np.abs(found - wanted).max() <= bound * max(1.0, np.abs(wanted).max()))


def run_one(sketch: Sketch, output: str, variant: Variant) -> Floats:
    return run(sketch, output, variant, (ROWS,))[0]


@each_variant
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("width", [17, 64])
def test_embed_is_exact(variant: Variant, dtype: str, width: int) -> None:
    """Every kind of float16: zeros, subnormals, the largest; scale applied in float32."""
    values = normal(width, width) * np.logspace(-8, 4, width, dtype=np.float32)
    values[0] = 0
    tensor = (
        torch.from_numpy(values)
        .clamp(-65504, 65504)
        .to({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype])
    )
    stored = tensor.numpy() if dtype == "f32" else tensor.view(torch.int16).numpy().view(np.uint16)
    sketch = Sketch()
    sketch.max_position = width
    native = Native(sketch, sketch.embed(stored, dtype, scale=1.5), variant)
    ids = list(range(width - 1, -1, -1))
    found = native.step(SequenceSlice("a", ids, 0, range(4), False))
    native.runtime.close()
    assert np.array_equal(found, tensor.float().numpy()[ids] * np.float32(1.5))


@each_variant
@pytest.mark.parametrize("width", WIDTHS)
def test_elementwise_is_exact(variant: Variant, width: int) -> None:
    a, b = normal(ROWS, width), normal(ROWS, width, seed=1)
    for kind, expected in (("add", a + b), ("mul", a * b)):
        sketch = Sketch()
        out = sketch.op(kind, (sketch.rows(a), sketch.rows(b)), (width,))[0]
        assert np.array_equal(run_one(sketch, out, variant), expected)


@each_variant
@pytest.mark.parametrize("fn", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("width", [1, 17, 96])
def test_activation(variant: Variant, fn: str, width: int) -> None:
    """From deep saturation through zero: relative to the value, so that small results count too."""
    x = np.linspace(-100, 100, ROWS * width, dtype=np.float32).reshape(ROWS, width)
    x[ROWS // 2 :] /= 50
    sketch = Sketch()
    found = run_one(sketch, sketch.op("act", (sketch.rows(x),), (width,), attrs={"fn": fn})[0], variant)
    expected = reference.act(torch.from_numpy(x).double(), fn).numpy()
    assert (np.abs(found - expected) <= 4e-6 * np.abs(expected) + 4e-7).all()


@each_variant
@pytest.mark.parametrize("fn", ["silu", "gelu", "gelu_tanh"])
def test_gated_epilogue(variant: Variant, fn: str) -> None:
    rows = np.random.default_rng(0).integers(-9, 10, (2 * 33, 64))
    x = np.random.default_rng(1).integers(-9, 10, (ROWS, 64)) / 64
    sketch = Sketch()
    packed = pack_dense(rows.astype(np.float32), "f32", gated=True)
    out = sketch.linear(sketch.rows(x.astype(np.float32)), packed, 66, epilogue=f"{fn}_mul")[0]
    gate, up = np.split(x @ rows.T, 2, axis=1)
    expected = reference.act(torch.from_numpy(gate), fn).numpy() * up
    assert close(run_one(sketch, out, variant), expected)


@each_variant
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(variant: Variant, width: int, plus_one: bool) -> None:
    x, residual, w = normal(ROWS, width), normal(ROWS, width, seed=1), normal(width, seed=2)
    attrs = {"eps": 1e-3, "plus_one": plus_one}
    sketch = Sketch()
    out = sketch.op("rms_norm", (sketch.rows(x),), (width,), (sketch.vector(w),), attrs)[0]
    expected = reference.rms_norm(torch.from_numpy(x), torch.from_numpy(w), 1e-3, plus_one)
    assert close(run_one(sketch, out, variant), expected)
    for which in (0, 1):
        sketch = Sketch()
        inputs = (sketch.rows(x), sketch.rows(residual))
        out = sketch.op("add_rms_norm", inputs, (width, width), (sketch.vector(w),), attrs)[which]
        both = reference.add_rms_norm(*map(torch.from_numpy, (x, residual, w)), 1e-3, plus_one)
        assert close(run_one(sketch, out, variant), both[which])


@each_variant
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(variant: Variant, width: int, biased: bool) -> None:
    """Far from zero mean, where a one-pass variance would lose its digits."""
    x, residual = normal(ROWS, width) + 100, normal(ROWS, width, seed=1)
    w, b = normal(width, seed=2), normal(width, seed=3)
    bias = torch.from_numpy(b) if biased else None
    for kind, which in (("layer_norm", 0), ("add_layer_norm", 0), ("add_layer_norm", 1)):
        sketch = Sketch()
        inputs = tuple(sketch.rows(v) for v in ((x,) if kind == "layer_norm" else (x, residual)))
        weights = (sketch.vector(w), sketch.vector(b) if biased else "")
        out = sketch.op(kind, inputs, (width,) * len(inputs), weights, {"eps": 1e-5})[which]
        total = torch.from_numpy(x if kind == "layer_norm" else x + residual).double()
        expected = total if which else reference.layer_norm(total, torch.from_numpy(w), bias, 1e-5)
        assert close(run_one(sketch, out, variant), expected, 1e-4 if which == 0 else 1e-6)


@each_variant
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (5, 12), (3, 18), (2, 256)])
def test_head_rms_norm(variant: Variant, heads: int, dim: int) -> None:
    x, w = normal(ROWS, heads * dim), normal(dim, seed=1)
    sketch = Sketch()
    attrs = {"eps": 1e-5, "heads": heads, "head_dim": dim}
    out = sketch.op("head_rms_norm", (sketch.rows(x),), (heads * dim,), (sketch.vector(w),), attrs)[0]
    expected = reference.head_rms_norm(torch.from_numpy(x), torch.from_numpy(w), 1e-5, dim)
    assert close(run_one(sketch, out, variant), expected)


@each_variant
@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 32), (12, 12), (14, 6), (256, 128)])
def test_rope(variant: Variant, style: str, dim: int, rotary: int) -> None:
    heads, kv_heads = 3, 1
    q, k = normal(ROWS, heads * dim), normal(ROWS, kv_heads * dim, seed=1)
    attrs = {
        "heads": heads, "kv_heads": kv_heads, "head_dim": dim, "rotary_dim": rotary, "theta": 100.0, "style": style,
        "rope_type": "default",
    }  # fmt: skip
    cos, sin = (torch.from_numpy(t) for t in cos_sin_table(attrs, ROWS))
    factors = reference.rope_factors(cos, sin, style)
    for which, x in enumerate((q, k)):
        sketch = Sketch()
        inputs = (sketch.rows(q), sketch.rows(k), "positions")
        out = sketch.op("rope", inputs, (heads * dim, kv_heads * dim), (), attrs)[which]
        assert close(run_one(sketch, out, variant), reference.rope(torch.from_numpy(x), factors, dim, style), 1e-6)


@each_variant
@pytest.mark.parametrize(("width", "group"), [(64, 32), (192, 64), (256, 128), (60, 20), (33, -1), (100, -1)])
def test_quantize(variant: Variant, width: int, group: int) -> None:
    x = normal(ROWS, width) * np.logspace(-3, 3, ROWS, dtype=np.float32)[:, None]
    packed = identity(width, 8, group)
    sketch = Sketch()
    out = sketch.linear(sketch.rows(x), packed, width)[0]
    for count, found in zip((1, 3, ROWS), run(sketch, out, variant, (1, 3, ROWS)), strict=True):
        assert quantization_is_right(found, x[:count], packed.act_group)


@each_variant
@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"])
def test_norm_that_quantizes(variant: Variant, kind: str) -> None:
    """A norm may write the linear's int8 operand itself: the same codes as of its float output."""
    width, count = 96, 2 if kind.startswith("add") else 1
    inputs = [normal(ROWS, width, seed=i) for i in range(count)]
    weights = [normal(width, seed=5)] + [normal(width, seed=6)] * kind.endswith("layer_norm")
    attrs: dict[str, Any] = {"eps": 1e-5} | ({} if kind.endswith("layer_norm") else {"plus_one": False})
    packed = identity(width, 4, 32)
    outputs = []
    for quantized in (False, True):
        sketch = Sketch()
        operands = tuple(sketch.rows(x) for x in inputs)
        normed = sketch.op(kind, operands, (width,) * count, tuple(map(sketch.vector, weights)), attrs)[0]
        outputs.append(run_one(sketch, sketch.linear(normed, packed, width)[0] if quantized else normed, variant))
    assert quantization_is_right(outputs[1], outputs[0], packed.act_group)


@each_variant
def test_a_chain_of_quantized_linears(variant: Variant) -> None:
    """norm -> gated linear -> linear -> residual, as a model chains them, within the rounding of its activations."""
    rng = np.random.default_rng(0)
    width, mlp, group = 64, 96, 32
    x = normal(ROWS, width)

    def weight(n: int, k: int, gated: bool) -> tuple[Any, np.ndarray]:
        codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(4, 12, (n, k // group))
        scales = rng.uniform(0.01, 0.02, zeros.shape).astype(np.float16)
        packed = pack_int(codes.astype(np.uint8), scales, zeros.astype(np.uint8), bits=4, group=group, gated=gated)
        wide = (codes - zeros.repeat(group, 1)) * scales.astype(np.float64).repeat(group, 1)
        return packed, wide

    up, up_wide = weight(2 * mlp, width, True)
    down, down_wide = weight(width, mlp, False)
    sketch = Sketch()
    source = sketch.rows(x)
    attrs = {"eps": 1e-5, "plus_one": False}
    normed = sketch.op("rms_norm", (source,), (width,), (sketch.vector(np.ones(width)),), attrs)[0]
    hidden = sketch.linear(normed, up, 2 * mlp, epilogue="silu_mul")[0]
    out = sketch.op("add", (sketch.linear(hidden, down, width)[0], source), (width,))[0]
    found = run_one(sketch, out, variant)
    meant = reference.rms_norm(torch.from_numpy(x).double(), torch.ones(width), 1e-5).numpy()
    gate, value = np.split(meant @ up_wide.T, 2, axis=1)
    expected = (gate / (1 + np.exp(-gate)) * value) @ down_wide.T + x
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected - x).max()
    assert np.abs(found - expected).max() > 1e-6  # or nothing was quantised
