import pytest
import torch
from family_models import MORE_CASES, family_model, slow
from random_models import CONFIGS, FAMILIES, logits_of, random_tensors, random_tokens

from llmctl.checkpoint.assemble import assemble
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph, Op
from llmctl.quantize.folding import find_fold, fold_scales
from llmctl.targets.reference.weights import CheckpointWeights


class Source:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def weight(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def graph_of(family: str, **changes: object) -> Graph:
    return build_graph({**CONFIGS[family], "vocab_size": 97, **changes})


def weights_of(graph: Graph) -> dict[str, torch.Tensor]:
    source = Source(random_tensors(graph))
    return {name: assemble(weight, source) for name, weight in graph.weights.items()}


def fold_points(graph: Graph) -> dict[str, object]:
    buffers = dict.fromkeys(op.inputs[0] for op in graph.linears() if op.layer == 0)
    return {b: point for b in buffers if (point := find_fold(graph, b)) is not None}


EXPECTED = {
    "llama": {"attn_norm": "attn_norm", "attention": "v_proj", "mlp_norm": "mlp_norm", "gate_mul": "up_proj"},
    "phi": {"attn_norm": "attn_norm", "attention": "v_proj"},
    "gpt2": {"attn_norm": "attn_norm", "attention": "v_proj", "mlp_norm": "mlp_norm"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fold_points_are_found_by_dataflow(family: str) -> None:
    found = {b.rpartition(".")[2]: p.source.name.rpartition(".")[2] for b, p in fold_points(graph_of(family)).items()}
    assert found == EXPECTED.get(family, EXPECTED["llama"])


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_leaves_the_logits_as_they_are(family: str) -> None:
    graph = graph_of(family)
    check_folding(graph, weights_of(graph))


@pytest.mark.parametrize("case", ["nemotron", *slow(case for case in MORE_CASES if case != "nemotron")])
def test_folding_into_norms_of_other_kinds(case: str) -> None:
    """1 + w, norms behind a branch or of q and k, a squared activation, one norm for attention and MLP, soft caps."""
    model = family_model(case)
    check_folding(model.graph, dict(CheckpointWeights(model.graph, model.checkpoint)))


def check_folding(graph: Graph, weights: dict[str, torch.Tensor]) -> None:
    tokens = random_tokens(2, 24, 97)
    before = logits_of(graph, weights, tokens)
    generator = torch.Generator().manual_seed(1)
    folded = dict(weights)
    for buffer, point in fold_points(graph).items():
        scales = torch.exp(torch.randn(graph.buffers[buffer].width, generator=generator))
        if point.columns is not None:
            scales = scales[point.column_index()]
        changed = fold_scales(point, scales, folded)
        assert point.source.weights[0] in changed
    after = logits_of(graph, folded, tokens)
    assert torch.allclose(after, before, atol=1e-4 * before.abs().max())
    changed_by = [(folded[name] - weights[name]).abs().max().item() for name in graph.weights if "layers.0" in name]
    assert max(changed_by) > 0.1


def test_relu_lets_scales_through_and_gelu_does_not() -> None:
    graph = graph_of("phi", hidden_act="relu")
    assert find_fold(graph, "layers.0.act").source.name == "layers.0.up_proj"
    weights = weights_of(graph)
    tokens = random_tokens(1, 16, 97)
    before = logits_of(graph, weights, tokens)
    point = find_fold(graph, "layers.0.act")
    fold_scales(point, torch.linspace(0.5, 4, graph.buffers["layers.0.act"].width), weights)
    assert torch.allclose(logits_of(graph, weights, tokens), before, atol=1e-4 * before.abs().max())
    assert find_fold(graph_of("phi"), "layers.0.act") is None


def test_grouped_queries_share_the_scales_of_their_kv_head() -> None:
    point = find_fold(graph_of("llama"), "layers.0.attention")
    heads = torch.tensor(point.columns).reshape(4, 16)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], heads[3])
    assert heads.unique().numel() == 32


def test_gemmas_norms_fold_with_their_one() -> None:
    graph = graph_of("llama")
    ops = tuple(op.with_(attrs={**op.attrs, "plus_one": True}) if op.kind == "rms_norm" else op for op in graph.ops)
    gemma = Graph(**{**graph.__dict__, "ops": ops})
    weights = weights_of(gemma)
    tokens = random_tokens(1, 16, 97)
    before = logits_of(gemma, weights, tokens)
    fold_scales(find_fold(gemma, "layers.0.attn_norm"), torch.linspace(0.5, 4, 64), weights)
    assert torch.allclose(logits_of(gemma, weights, tokens), before, atol=1e-4 * before.abs().max())


def test_no_fold_where_something_else_sees_the_buffer() -> None:
    graph = graph_of("llama")
    extra = Op("act", "layers.0.extra", ("layers.0.attn_norm",), ("extra",), (), {"fn": "relu"}, 0)
    seen = Graph(**{**graph.__dict__, "ops": (*graph.ops, extra)})
    assert find_fold(seen, "layers.0.attn_norm") is None
    assert find_fold(seen, "layers.0.mlp_norm") is not None
    shared = tuple(
        op.with_(weights=("layers.0.attn_norm.weight",)) if op.name == "layers.1.attn_norm" else op for op in graph.ops
    )
    assert find_fold(Graph(**{**graph.__dict__, "ops": shared}), "layers.0.attn_norm") is None
