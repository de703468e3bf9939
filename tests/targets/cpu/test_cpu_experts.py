"""The native kernels of mixtures of experts against the reference functions, on every build that this machine runs.

A token's result is the same bit for bit alone and in any batch, whoever shares its experts; only weights of experts
that were chosen are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from cpu_graphs import VARIANTS, Floats, Native, Sketch, each_variant, run

from llmctl.checkpoint.nested import NestedFloats, of_tensor, usual_values
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.engine.step import SequenceSlice
from llmctl.errors import UnsupportedModelError
from llmctl.graph.graph import QuantScheme
from llmctl.targets.cpu.binding import Lowering
from llmctl.targets.cpu.layout import PackedLinear, scale_rows
from llmctl.targets.cpu.linear_format import LinearFormat
from llmctl.targets.cpu.packing import pack_linear
from llmctl.targets.cpu.toolchain import Variant, find_compiler
from llmctl.targets.reference import kernels

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.xdist_group("cpu_kernels"),
]
EXPERTS, CHOSEN, WIDTH, INNER, TOKENS = 9, 3, 64, 48, 33
ROUTING = {"top_k": CHOSEN, "scores": "softmax", "renormalise": True, "scale": 1.0, "groups": 1, "top_groups": 1}
SCHEMES = {
    "f32": None,
    "bf16": None,
    "w4": QuantScheme(4, 16, symmetric=False),
    "w4_whole": QuantScheme(4, -1, symmetric=True),
    "w8": QuantScheme(8, 16, symmetric=True),
    "w4_min": QuantScheme(4, 16, symmetric=False, minimum=True),
    "w4_min_nested": QuantScheme(4, 8, symmetric=False, minimum=True, nested=2),
    "w4_min_nested_of_6": QuantScheme(4, 4, symmetric=False, minimum=True, nested=4, nested_bits=6),
    "w8_nested": QuantScheme(8, 8, symmetric=True, nested=2),
    "w8_of_6": QuantScheme(6, 16, symmetric=True),
    "w8_min_of_5": QuantScheme(5, 16, symmetric=False, minimum=True),
    "w4_of_3": QuantScheme(3, 16, symmetric=True),
    "book4_nested": QuantScheme(4, 8, symmetric=True, book="nf4", nested=3),
    "e4m3": QuantScheme(8, -1, symmetric=True, book="fp8_e4m3"),
    "e4m3_blocks": QuantScheme(8, 16, symmetric=True, book="fp8_e4m3", block_rows=32),
    "book4": QuantScheme(4, 16, symmetric=True, book="nf4"),
}


def _weight(seed: int, rows: int, columns: int, scheme: QuantScheme | None) -> torch.Tensor | QuantizedWeight:
    rng = np.random.default_rng(seed)
    if scheme is None:
        return torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32) * columns**-0.5).bfloat16()
    codes = torch.from_numpy(rng.integers(0, min(2**scheme.bits, 120), (rows, columns), np.uint8))
    shape = (scheme.row_blocks(rows), scheme.groups(columns))
    scales = torch.from_numpy(rng.uniform(0.5, 1.5, shape).astype(np.float16)) * 0.3 / 2**scheme.bits
    zeros = torch.full(shape, 0 if scheme.book or scheme.minimum else 2 ** (scheme.bits - 1), dtype=torch.uint8)
    if scheme.has_zeros:
        zeros = torch.from_numpy(rng.integers(2, 2**scheme.bits - 2, shape, np.uint8))
    minimums = -scales * 2 ** (scheme.bits - 1) if scheme.minimum else None
    if not scheme.nested:
        return QuantizedWeight(codes, scales.half(), zeros, scheme, None, minimums)
    if scheme.book:
        stored, count = torch.from_numpy(rng.integers(0, 256, shape, np.uint8)), -(-rows * shape[1] // scheme.nested)
        supers = torch.from_numpy(rng.uniform(0.01, 0.02, count).astype(np.float32))
        mapped = of_tensor(stored, supers, torch.full((count,), 0.03), scheme.nested, usual_values())
        return QuantizedWeight(codes, mapped.floats(), zeros, scheme, nested=(mapped,))
    stored = torch.from_numpy(rng.integers(20, 64, shape, np.uint8)) + 2 * scheme.nested_zero // 3
    supers = torch.from_numpy(rng.uniform(0.01, 0.02, (rows, shape[1] // scheme.nested)).astype(np.float16)) / 16
    parts = [NestedFloats(stored, factor * supers, scheme.nested_zero) for factor in (1, -8)[: 1 + scheme.minimum]]
    floats = [part.floats() for part in parts]
    return QuantizedWeight(codes, floats[0], zeros, scheme, None, floats[1] if scheme.minimum else None, tuple(parts))


@dataclass(frozen=True)
class Mixture:
    """Logits [tokens, E] and rows [tokens, H], and the weights of all experts, gate above up, and down."""

    logits: Floats
    x: Floats
    gate_up: torch.Tensor | QuantizedWeight
    down: torch.Tensor | QuantizedWeight
    dtype: str

    def packed(self, weight: torch.Tensor | QuantizedWeight, gated: bool) -> PackedLinear:
        scheme = weight.scheme if isinstance(weight, QuantizedWeight) else None
        dtype = re.sub(r"_whole|_nested|_blocks|_of_\d", "", self.dtype)
        group, book = (scheme.group_size, scheme.book) if scheme else (-1, "")
        shape = (weight.shape[0], weight.shape[1])
        one_zero = scheme is not None and scheme.symmetric and not book
        nested = scheme.nested if scheme else 0
        fmt = LinearFormat(dtype, shape, gated, group, book=book, experts=EXPERTS, one_zero=one_zero, nested=nested)
        if scheme is not None and fmt.integer:
            fmt = replace(fmt, bits=scheme.bits, nested_bits=scheme.nested_bits)
        if scheme is not None and scheme.block_rows > 1:
            fmt = replace(fmt, scale_rows=scale_rows(scheme.block_rows, shape[0], gated, EXPERTS))
            assert fmt.scale_rows == 16
        packed = pack_linear(weight, fmt)
        assert (packed.nested, packed.code_bits) == (nested, fmt.code_bits)
        assert packed.one_zero == one_zero
        return packed

    def sketch(self) -> tuple[Sketch, str]:
        sketch = Sketch()
        x, logits = sketch.rows(self.x), sketch.rows(self.logits)
        experts, shares = sketch.op("route", (logits,), (CHOSEN, CHOSEN), ("",), ROUTING)
        h = self.product(sketch, (x, experts), self.gate_up, INNER, {"epilogue": "silu_mul"})
        made = self.product(sketch, (h, experts), self.down, WIDTH, {})
        return sketch, sketch.op("weighted_sum", (made, shares), (WIDTH,))[0]

    def product(
        self,
        sketch: Sketch,
        inputs: tuple[str, str],
        weight: torch.Tensor | QuantizedWeight,
        out: int,
        attrs: dict[str, str],
    ) -> str:
        name = f"linear{len(sketch.linears)}"
        sketch.linears[name] = self.packed(weight, bool(attrs))
        sketch.shapes[name] = (weight.shape[0], weight.shape[1])
        return sketch.op("grouped_linear", inputs, (CHOSEN * out,), (name,), {"count": EXPERTS, **attrs})[0]

    def expected(self) -> Floats:
        gate_up, down = (
            (w.dequantize() if isinstance(w, QuantizedWeight) else w.float()).view(EXPERTS, -1, w.shape[1]).unbind()
            for w in (self.gate_up, self.down)
        )
        experts, shares = kernels.route(torch.from_numpy(self.logits), None, **ROUTING)  # type: ignore[arg-type]
        h = kernels.grouped_linear(torch.from_numpy(self.x), experts, gate_up, "silu_mul")
        return kernels.weighted_sum(kernels.grouped_linear(h, experts, down), shares).numpy()


@cache
def mixture(dtype: str) -> Mixture:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    logits[:20, 2] += 4  # one expert that more rows meet than fit a few blocks
    x = rng.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    scheme = SCHEMES[dtype]
    gate_up = _weight(2, EXPERTS * 2 * INNER, WIDTH, scheme)
    return Mixture(logits, x, gate_up, _weight(3, EXPERTS * WIDTH, INNER, scheme), dtype)


@each_variant
@pytest.mark.parametrize("dtype", SCHEMES)
def test_experts_compute_what_the_reference_does_alike_in_any_batch(dtype: str, variant: Variant) -> None:
    case = mixture(dtype)
    few, whole = run(*case.sketch(), variant, (5, TOKENS))
    expected = case.expected()
    bound = {"f32": 1e-5, "bf16": 2e-2}.get(dtype, 2e-2 if "w" in dtype else 1e-5)
    assert np.abs(whole - expected).max() < bound * np.abs(expected).max()
    np.testing.assert_array_equal(few, whole[:5])
    native = Native(*case.sketch(), variant, threads=1)
    blocks = range(-(-TOKENS // native.runtime.limits.block_size))
    for at in range(TOKENS):
        np.testing.assert_array_equal(native.step(SequenceSlice("a", [0], at, blocks, False))[0], whole[at])
    native.runtime.close()


@pytest.mark.parametrize(("dtype", "bits"), [("w4", 4), ("w8_of_6", 6)])
def test_weights_of_experts_that_are_not_chosen_are_not_read(dtype: str, bits: int) -> None:
    case = mixture(dtype)
    sketch, output = case.sketch()
    native = Native(sketch, output, VARIANTS[0])
    one = sum(len(packed.data) for packed in sketch.linears.values()) // EXPERTS
    assert one == sum(p.rows * p.columns * bits // 8 for p in sketch.linears.values()) // EXPERTS
    native.first_rows(1)
    assert native.runtime.weight_bytes() == CHOSEN * one
    assert native.runtime.weight_bytes() == 0
    native.first_rows(TOKENS)
    assert native.runtime.weight_bytes() == EXPERTS * one  # once, however many rows meet it
    native.runtime.close()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_routes_are_the_reference_s(scores: str, groups: tuple[int, int]) -> None:
    """Ties among them: of equal scores the first expert wins, of equal groups the first group."""
    rng = np.random.default_rng(4)
    logits = rng.integers(-2, 3, (TOKENS, 12)).astype(np.float32)
    bias = rng.integers(-1, 2, 12).astype(np.float32) / 4
    attrs = {"top_k": 4, "scores": scores, "renormalise": True, "scale": 1.5, "groups": groups[0]}
    attrs |= {"top_groups": groups[1]}
    sketch = Sketch()
    x, one = sketch.rows(logits), sketch.rows(np.ones((TOKENS, 1), np.float32))
    chosen, shares = sketch.op("route", (x,), (4, 4), (sketch.vector(bias),), attrs)
    # Expert e turns a one into the e-th unit vector.
    stack = pack_linear(torch.eye(12).reshape(-1, 1), LinearFormat("f32", (144, 1), False, experts=12))
    sketch.linears["units"], sketch.shapes["units"] = stack, (144, 1)
    units = sketch.op("grouped_linear", (one, chosen), (48,), ("units",), {"count": 12})[0]
    found = run(sketch, sketch.op("weighted_sum", (units, shares), (12,))[0], VARIANTS[0], (TOKENS,))[0]
    experts, wanted = kernels.route(torch.from_numpy(logits), torch.from_numpy(bias), **attrs)  # type: ignore[arg-type]
    expected = torch.zeros(TOKENS, 12).scatter_(1, experts.long(), wanted)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert len({tuple(row) for row in experts.tolist()}) > 9


def test_choices_of_experts_may_be_interleaved() -> None:
    case = mixture("f32")
    other = replace(case, logits=-case.logits)
    sketch = Sketch()
    x, attrs = sketch.rows(case.x), {"epilogue": "silu_mul"}
    logits = [sketch.rows(one.logits) for one in (case, other)]
    routes = [sketch.op("route", (one,), (CHOSEN, CHOSEN), ("",), ROUTING) for one in logits]
    inner = [case.product(sketch, (x, experts), case.gate_up, INNER, attrs) for experts, _ in routes]
    sums = []
    for (experts, shares), h in zip(routes, inner, strict=True):
        made = case.product(sketch, (h, experts), case.down, WIDTH, {})
        sums.append(sketch.op("weighted_sum", (made, shares), (WIDTH,))[0])
    found = run(sketch, sketch.op("add", tuple(sums), (WIDTH,))[0], VARIANTS[0], (TOKENS,))[0]
    np.testing.assert_allclose(found, case.expected() + other.expected(), rtol=1e-4, atol=1e-5)


def test_rows_in_expert_order_are_refused_where_nothing_takes_them() -> None:
    case = mixture("f32")

    def refusal(kind: str) -> str:
        sketch = Sketch()
        x, logits = sketch.rows(case.x), sketch.rows(case.logits)
        experts, _ = sketch.op("route", (logits,), (CHOSEN, CHOSEN), ("",), ROUTING)
        others, shares = sketch.op("route", (logits,), (CHOSEN, CHOSEN), ("",), ROUTING)
        h = case.product(sketch, (x, experts), case.gate_up, INNER, {"epilogue": "silu_mul"})
        if kind == "grouped_linear":
            made = case.product(sketch, (h, others), case.down, WIDTH, {})
        else:
            plain = sketch.rows(np.zeros((1, CHOSEN * INNER), np.float32)) if kind == "mul" else h
            made = sketch.op(kind, (h, plain), (CHOSEN * INNER,))[0]
        parts = sketch.buffers[made].width // CHOSEN
        graph = sketch.graph(sketch.op("weighted_sum", (made, shares), (parts,))[0])
        with pytest.raises(UnsupportedModelError) as caught:
            Lowering(graph, sketch.linears).run()
        return caught.value.message

    assert refusal("add") == "op 'add' has no native CPU kernel: its rows are in expert order"
    assert refusal("mul") == "op 'mul' has no native CPU kernel: some of its rows are in expert order"
    assert "its rows are in the order of other experts" in refusal("grouped_linear")
