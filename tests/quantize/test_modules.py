import pytest
from random_models import CONFIGS

from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph
from llmctl.quantize.modules import select_modules


def graph_of(family: str, **changes: object) -> Graph:
    return build_graph({**CONFIGS[family], "vocab_size": 97, **changes})


def test_all_but_the_head() -> None:
    selection = select_modules(graph_of("llama"), ["lm_head"])
    assert len(selection.modules) == 14
    assert selection.ignored == ("lm_head",)
    first = selection.modules[0]
    assert (first.name, first.layer, first.shape) == ("model.layers.0.self_attn.q_proj", 0, (64, 64))


@pytest.mark.parametrize(
    ("pattern", "left"),
    [("mlp", 8), ("layers.0", 7), ("model.layers.1.mlp.down_proj", 13), ("*.layers.?.self_attn.*", 6), ("q_proj", 12)],
)
def test_patterns(pattern: str, left: int) -> None:
    assert len(select_modules(graph_of("llama"), ["lm_head", pattern]).modules) == left


def test_a_fused_tensor_is_one_module() -> None:
    selection = select_modules(graph_of("gpt2"), ["lm_head"])
    fused = selection.modules[0]
    assert fused.name == "transformer.h.0.attn.c_attn"
    assert fused.shape == (192, 64)
    assert fused.weights == ("layers.0.q_proj.weight", "layers.0.k_proj.weight", "layers.0.v_proj.weight")


def test_rows_that_take_turns_stay_dense() -> None:
    graph = graph_of("gpt_neox")
    with pytest.raises(UnsupportedModelError, match=r"query_key_value' cannot .* \(add --ignore query_key_value\)"):
        select_modules(graph, ["lm_head"])
    modules = select_modules(graph, ["lm_head", "query_key_value"]).modules
    assert {module.name.rpartition(".")[2] for module in modules} == {"dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_an_untied_head_can_be_quantized_and_a_tied_one_cannot() -> None:
    assert select_modules(graph_of("llama"), []).modules[-1].name == "lm_head"
    with pytest.raises(UsageError, match="embeddings"):
        select_modules(graph_of("qwen2"), [])
    assert len(select_modules(graph_of("qwen2"), ["lm_head"]).modules) == 14


def test_patterns_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="lm_haed"):
        select_modules(graph_of("llama"), ["lm_haed"])
    with pytest.raises(UsageError, match="no linear to quantize"):
        select_modules(graph_of("llama"), ["lm_head", "layers"])
