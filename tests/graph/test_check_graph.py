"""check_graph sees each way a graph can be wrong; serial refuses what it does not know."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from family_models import CASES, MORE_CASES, family_model, slow

from llmctl.graph.check import check_graph
from llmctl.graph.graph import Buffer, Graph, Op, QuantScheme, Weight, WeightPart
from llmctl.graph.passes import apply_passes
from llmctl.graph.serial import graph_from_dict, graph_to_dict, scheme_from_dict, scheme_to_dict


def with_op(graph: Graph, name: str, /, **changes: Any) -> Graph:
    assert name in [op.name for op in graph.ops]
    return replace(graph, ops=tuple(op.with_(**changes) if op.name == name else op for op in graph.ops))


def with_attrs(graph: Graph, name: str, **attrs: Any) -> Graph:
    op = next(op for op in graph.ops if op.name == name)
    return with_op(graph, name, attrs={**op.attrs, **attrs})


def moved(graph: Graph, name: str, index: int) -> Graph:
    ops = [op for op in graph.ops if op.name != name]
    ops.insert(index, next(op for op in graph.ops if op.name == name))
    return replace(graph, ops=tuple(op.with_(layer=0) if op.name == name else op for op in ops))


def idle(graph: Graph) -> Graph:
    ops = (
        *graph.ops[:5],
        Op("act", "idle", (graph.ops[0].outputs[0],), ("idle",), (), {"fn": "silu"}, 0),
        *graph.ops[5:],
    )
    return replace(graph, ops=ops, buffers={**graph.buffers, "idle": Buffer("idle", 60)})


def spare_weight(graph: Graph) -> Graph:
    return replace(graph, weights={**graph.weights, "spare": Weight("spare", (1,), (WeightPart("spare"),))})


def quantized_norm(graph: Graph) -> Graph:
    norm = replace(graph.weights["final_norm.weight"], quant=QuantScheme(4, 20, False))
    return replace(graph, weights={**graph.weights, norm.name: norm})


BROKEN: dict[str, tuple[Callable[[Graph], Graph], str]] = {
    "unknown kind": (lambda g: with_op(g, "layers.0.act", kind="swirl"), "unknown kind 'swirl'"),
    "read before write": (lambda g: moved(g, "layers.0.o_proj", 1), "before it is written"),
    "written twice": (lambda g: with_op(g, "layers.0.act", outputs=("layers.0.q_proj",)), "written already"),
    "no such buffer": (lambda g: with_op(g, "layers.0.act", outputs=("nowhere",)), "is no buffer"),
    "no such weight": (lambda g: with_op(g, "layers.0.o_proj", weights=("nowhere", "")), "does not exist"),
    "needed weight absent": (lambda g: with_op(g, "layers.0.o_proj", weights=("", "")), "does not exist"),
    "too few inputs": (
        lambda g: with_op(g, "layers.0.gate_mul", inputs=("layers.0.act",)),
        "expected 2 inputs, found 1",
    ),
    "attribute missing": (lambda g: with_op(g, "layers.0.act", attrs={}), "attributes: expected ['fn'], found []"),
    "attribute too many": (lambda g: with_attrs(g, "layers.0.act", alpha=1), "attributes: expected ['fn']"),
    "activation": (lambda g: with_attrs(g, "layers.0.act", fn="mish"), "fn is known"),
    "linear shape": (
        lambda g: with_op(g, "layers.0.o_proj", weights=("layers.0.down_proj.weight", "")),
        "shape of 'layers.0.down_proj.weight': expected (60, 60), found (60, 84)",
    ),
    "rope type": (lambda g: with_attrs(g, "layers.0.rope", rope_type="warp"), "unknown rope_type"),
    "odd rotary": (lambda g: with_attrs(g, "layers.0.rope", rotary_dim=5), "rotary_dim"),
    "head count": (lambda g: with_attrs(g, "layers.0.rope", heads=4), "width of 'layers.0.q_proj'"),
    "window": (lambda g: with_attrs(g, "layers.0.attention", window=3), "kv_heads, head_dim, window"),
    "cache written twice": (lambda g: with_attrs(g, "layers.1.kv_write", layer=0), "not yet written"),
    "cache unwritten": (lambda g: with_attrs(g, "layers.0.attention", layer=1), "layer 1 is written before"),
    "layer order": (lambda g: with_op(g, "layers.1.act", layer=0), "op layers must rise"),
    "same name": (lambda g: with_op(g, "layers.1.act", name="layers.0.act"), "'layers.0.act' occurs twice"),
    "idle op": (idle, "'idle' is never used"),
    "idle weight": (spare_weight, "'spare' is never used"),
    "quantized vector": (quantized_norm, "only a matrix can be quantized"),
    "ungathered logits": (
        lambda g: with_op(g, "lm_head", inputs=("final_norm",)),
        "'logits' must be written from gathered rows",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_graph_is_refused(how: str) -> None:
    graph = family_model("llama").graph
    check_graph(graph)
    breaks, words = BROKEN[how]
    with pytest.raises(ValueError) as caught:
        check_graph(breaks(graph))
    assert words in str(caught.value)


def test_broken_fused_ops_are_refused() -> None:
    graph = apply_passes(family_model("llama").graph)
    for changed in (
        with_attrs(graph, "layers.0.qkv_proj", splits=(60, 60)),
        with_attrs(graph, "layers.0.qkv_proj", splits=(12, 60, 12)),
        with_attrs(graph, "layers.0.gate_up_proj", epilogue="mish_mul"),
        with_attrs(graph, "layers.0.gate_up_proj", splits=(84,)),
    ):
        with pytest.raises(ValueError):
            check_graph(changed)


def test_scales_of_int8_rows_are_one_wide() -> None:
    graph = family_model("llama").graph
    linears = {op.weights[0] for op in graph.linears()}
    eight = {n: replace(w, quant=QuantScheme(8, -1, True)) for n, w in graph.weights.items() if n in linears}
    graph = apply_passes(replace(graph, weights={**graph.weights, **eight}), ["int8_activations"])
    check_graph(graph)
    scale = Buffer("layers.0.attn_norm.scale", 2)
    with pytest.raises(ValueError, match=r"op 'layers.0.attn_norm': width of the scales: expected 1, found 2"):
        check_graph(replace(graph, buffers={**graph.buffers, scale.name: scale}))


@pytest.mark.parametrize("case", [*CASES, *slow(MORE_CASES)])
def test_json_round_trip(case: str) -> None:
    graph = apply_passes(family_model(case).graph)
    assert graph_from_dict(json.loads(json.dumps(graph_to_dict(graph), sort_keys=True))) == graph


def edit(data: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A deep copy with one place changed; value ``None`` at a mapping's key removes it."""
    data = copy.deepcopy(data)
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("colour",), "red", "graph: unknown key 'colour'"),
        (("ops", 3, "colour"), "red", "graph.ops[3]: unknown key 'colour'"),
        (("weights", 0, "parts", 0, "colour"), 1, "graph.weights[0].parts[0]: unknown key 'colour'"),
        (("kv",), None, "graph: key 'kv' is missing"),
        (("vocab_size",), "131", "graph.vocab_size: expected an integer, found str"),
        (("vocab_size",), True, "graph.vocab_size: expected an integer, found bool"),
        (("ops", 0, "inputs"), [1], "graph.ops[0].inputs: expected a list of strings"),
        (("ops", 0, "attrs", "scale"), {"a": 1}, "graph.ops[0].attrs.scale: expected a scalar"),
        (("weights", 0, "shape"), [1.5], "graph.weights[0].shape: expected a list of integers"),
        (("weights", 0, "parts", 0, "rows"), [1], "rows: expected two integers"),
        (("buffers", "embed"), "wide", "graph.buffers.embed: expected an integer"),
    ],
)
def test_damaged_json_is_refused(path: tuple[Any, ...], value: Any, words: str) -> None:
    data = graph_to_dict(family_model("llama").graph)
    with pytest.raises(ValueError) as caught:
        graph_from_dict(edit(data, path, value))
    assert words in str(caught.value)


def test_scheme_round_trip() -> None:
    scheme = QuantScheme(3, 64, True, act_order=True)
    assert scheme_from_dict(scheme_to_dict(scheme)) == scheme
    with pytest.raises(ValueError, match=r"scheme\.bits: expected an integer"):
        scheme_from_dict({**scheme_to_dict(scheme), "bits": "4"})
