"""Which kernel an op gets, and the reason each candidate gives when it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmctl.errors import CompileError
from llmctl.graph.graph import Buffer, Graph, Op, QuantScheme, Weight, WeightPart
from llmctl.kernels.compile import compile_module
from llmctl.kernels.registry import FALLBACK, OpFacts, choose, choose_all, sources_of

W4 = QuantScheme(4, 64, symmetric=False)


def graph_of(op: Op, weight: Weight) -> Graph:
    buffers = {name: Buffer(name, 128) for name in (*op.inputs, *op.outputs)}
    return Graph("llama", 10, 128, 1, 64, (), buffers, {weight.name: weight}, (op,))


def linear(quant: QuantScheme | None = W4, columns: int = 128, **attrs: str) -> Graph:
    weight = Weight("w", (256, columns), (WeightPart("w"),), quant)
    return graph_of(Op("linear", "lin", ("x",), ("y",), ("w", ""), attrs), weight)


def norm(width: int = 128, kind: str = "add_rms_norm") -> Graph:
    weight = Weight("w", (width,), (WeightPart("w"),))
    return graph_of(Op(kind, "norm", ("x", "r"), ("y", "s"), ("w",), {"eps": 1e-5, "plus_one": False}), weight)


def chosen(graph: Graph, dtype: str = "bfloat16", device: str = "cuda", scales: str = "F16") -> tuple[str, list[str]]:
    choice = choose(OpFacts(graph.ops[0], graph, dtype, {"w.scales": scales}), device)
    return choice.kernel, [refusal.reason for refusal in choice.refused]


def test_a_plain_4_bit_linear_gets_a_kernel() -> None:
    assert chosen(linear())[0] != FALLBACK
    assert chosen(linear(QuantScheme(4, -1, symmetric=True)))[0] != FALLBACK


@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm"])
def test_norms(kind: str) -> None:
    assert chosen(norm(kind=kind)) == ("rms_norm", [])


@pytest.mark.parametrize(
    ("graph", "dtype", "reason"),
    [
        (linear(None), "float16", "the weight is dense"),
        (linear(replace(W4, bits=3)), "float16", "3-bit codes"),
        (linear(replace(W4, act_order=True)), "float16", "activation order"),
        (linear(W4, columns=72), "float16", "72 columns in groups of 64"),
        (linear(), "float32", "activations are float32"),
        (norm(100), "float16", "width 100"),
        (norm(), "float32", "activations are float32"),
    ],
)
def test_refusals_say_why(graph: Graph, dtype: str, reason: str) -> None:
    kernel, reasons = chosen(graph, dtype)
    assert kernel == FALLBACK
    assert reasons
    assert any(reason in text for text in reasons)


def test_scales_of_another_dtype_are_refused() -> None:
    kernel, reasons = chosen(linear(), scales="F32")
    assert kernel == FALLBACK
    assert any("F32" in reason for reason in reasons)


def test_the_reference_target_has_no_kernels() -> None:
    assert chosen(linear(), device="reference") == (FALLBACK, [])


def test_chosen_entry_points_exist_in_the_compiled_module() -> None:
    choices = tuple(
        choice
        for graph in (linear(), norm(), norm(kind="rms_norm"))
        for dtype in ("float16", "bfloat16")
        for choice in choose_all(graph, dtype, {"w.scales": "F16"}, "cuda")
    )
    try:
        module = compile_module(sources_of(choices), "sm_80")
    except CompileError as error:
        pytest.skip(str(error))
    assert all(choice.entries for choice in choices)
    assert {entry for choice in choices for entry in choice.entries} <= {kernel.name for kernel in module.resources}
