"""Every tensor is used, known to be superfluous, or refused by name: one kind of each, and any odd name at all."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_files import FORMATS, model_config, write_pair
from tiny_checkpoint import HIDDEN, dense_tensors, linear_shapes, write_arrays, write_gptq

from llmctl.checkpoint.accounting import RULES, account, name_some
from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.safetensors_io import SafetensorsFile, TensorSpec, write_safetensors
from llmctl.errors import CheckpointError, UnsupportedModelError

UP = "model.layers.1.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"


def some(*shape: int, dtype: str = "float16") -> np.ndarray:
    return np.ones(shape, dtype)


def stored(folder: Path) -> dict[str, TensorSpec]:
    """A checkpoint's tensors, to be written again."""
    file = SafetensorsFile(folder / "model.safetensors")
    return {name: (entry.dtype, entry.shape, file.plane(name)) for name, entry in file.tensors.items()}


def unused(folder: Path, more: dict[str, np.ndarray], **changes: object) -> dict[str, tuple[str, ...]]:
    """Names by reason, of the tiny checkpoint with more tensors."""
    checkpoint = open_checkpoint(write_arrays(folder, {**dense_tensors(), **more}, **changes))
    return {kind.reason: kind.names for kind in account(checkpoint, checkpoint_graph(checkpoint))}


def refusal(folder: Path, more: dict[str, np.ndarray], **changes: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        unused(folder, more, **changes)
    assert "\n" not in str(caught.value)
    return caught.value


def test_all_are_used(tmp_path: Path) -> None:
    assert unused(tmp_path, {}) == {}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": some(8, dtype="float32")}, "rotary frequencies"),
        ({"model.rotary_emb.original_inv_freq": some(8, dtype="float32")}, "rotary frequencies"),
        ({"model.layers.1.self_attn.attention.bias": some(1, 1, 8, 8, dtype="bool")}, "causal mask"),
        ({"model.layers.1.self_attn.attention.masked_bias": np.array(-1e4, np.float32)}, "causal mask"),
        ({"model.layers.1.self_attn.attention.masked_bias": some(1)}, "causal mask"),
        ({"model.embeddings.position_ids": some(1, 8, dtype="int64")}, "positions counted"),
        ({"model.layers.0.self_attn.k_scale": some(1), "model.layers.0.self_attn.v_scale": some(1)}, "KV cache"),
        ({f"{Q}.bias": np.zeros(HIDDEN, np.float16), f"{UP}.bias": -np.zeros(128, np.float16)}, "all zeros"),
        ({"model.layers.1.input_layernorm.bias": np.zeros(HIDDEN, np.float16)}, "all zeros"),
        ({"mtp.layers.0.mlp.up_proj.weight": some(3, 3), "model.mtp_layers.0.norm.weight": some(3)}, "multi-token"),
    ],
)
def test_superfluous(tmp_path: Path, more: dict[str, np.ndarray], reason: str) -> None:
    found = unused(tmp_path, more)
    (said,) = found
    assert reason in said
    assert found[said] == tuple(sorted(more))


def test_layers_that_predict_further_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = unused(tmp_path / "a", {"model.layers.2.norm.weight": some(3)}, num_nextn_predict_layers=1)
    assert "multi-token prediction" in said
    assert "not used: multi-token prediction" in caplog.text  # notable: a user is told
    error = refusal(tmp_path / "b", {"model.layers.3.norm.weight": some(3)}, num_nextn_predict_layers=1)
    assert "layers beyond num_hidden_layers: 'model.layers.3.norm.weight'" in error.message


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({f"{Q}.bias": some(HIDDEN)}, f"biases that are not zero .*: '{Q}.bias'"),
        ({f"{Q}.bias": np.full(HIDDEN, np.nan, np.float16)}, "biases that are not zero"),
        ({"model.layers.1.self_attn.bias": some(3)}, "biases that are not zero"),  # no mask's shape
        ({"score.weight": some(2, HIDDEN)}, r"a head that is not a language model's: 'score\.weight'"),
        ({"vision_tower.patch.weight": some(2, 2)}, r"not read by this family: 'vision_tower\.patch\.weight'"),
        ({"model.layers.2.mlp.up_proj.weight": some(128, HIDDEN)}, "layers beyond num_hidden_layers"),
        ({"model.layers.2.mlp.up_proj.bias": np.zeros(128, np.float16)}, "layers beyond num_hidden_layers"),
    ],
)
def test_left_over(tmp_path: Path, more: dict[str, np.ndarray], said: str) -> None:
    error = refusal(tmp_path, more)
    assert not isinstance(error, UnsupportedModelError)
    assert error.fix is not None
    with pytest.raises(CheckpointError, match=said):
        raise error


FOREIGN = {
    "an adapter": {f"{Q}.lora_A.weight": some(4, HIDDEN), f"{Q}.lora_B.weight": some(HIDDEN, 4)},
    "bitsandbytes": {f"{Q}.weight.absmax": some(4), f"{Q}.weight.quant_map": some(16)},
    "MLX": {f"{Q}.scales": some(HIDDEN, 1), f"{Q}.biases": some(HIDDEN, 1)},
    "ExLlamaV2": {f"{Q}.q_weight": some(8, HIDDEN, dtype="int32"), f"{Q}.q_groups": some(4, dtype="int16")},
    "AQLM": {f"{Q}.codes": some(8, 8, 1, dtype="int8"), f"{Q}.codebooks": some(1, 8, 1, 8)},
    "HQQ": {f"{Q}.W_q": some(8, 8, dtype="uint8")},
    "MXFP4": {"model.layers.0.mlp.down_proj_blocks": some(4, 4, dtype="uint8")},
    "ExLlamaV3": {f"{Q}.trellis": some(4, 4, 64, dtype="int16"), f"{Q}.suh": some(HIDDEN)},
    "a way that is not read": {f"{Q}.weight_scale": some(HIDDEN, 1), f"{Q}.input_scale": some(1)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_are_named_before_their_weights_are_missed(tmp_path: Path, kind: str) -> None:
    tensors = {**dense_tensors(), **FOREIGN[kind]}
    del tensors[f"{UP}.weight"]  # the Graph would say that this is missing
    tensors[f"{Q}.weight"] = some(HIDDEN, HIDDEN // 8, dtype="uint32")  # and that this has another shape
    checkpoint = open_checkpoint(write_arrays(tmp_path, tensors))
    with pytest.raises(UnsupportedModelError, match=kind) as caught:
        checkpoint_graph(checkpoint)
    assert all(f"'{name}'" in caught.value.message for name in FOREIGN[kind])
    assert caught.value.fix is not None


@pytest.mark.parametrize("dtype", ["int8", "uint8", "F8_E4M3"])
@pytest.mark.parametrize(
    ("scales", "place"), [(True, None), (False, None), (False, "config.json"), (False, "hf_quant_config.json")]
)
def test_integers_and_eighths_without_a_scheme(tmp_path: Path, dtype: str, scales: bool, place: str | None) -> None:
    """With scales that nothing explains, or with settings that miss their scales."""
    changes = {"quantization_config": {"quant_method": "fp8"}} if place == "config.json" else {}
    folder = write_arrays(tmp_path, dense_tensors(), **changes)
    specs = stored(folder)
    for name, shape in linear_shapes().items():
        code = {"int8": "I8", "uint8": "U8"}.get(dtype, dtype)
        specs[f"{name}.weight"] = (code, shape, some(*shape, dtype="uint8"))
        if scales:
            specs[f"{name}.weight_scale"] = ("F32", (shape[0], 1), some(shape[0], 1, dtype="float32"))
    write_safetensors(folder / "model.safetensors", specs)
    if place == "hf_quant_config.json":
        (folder / place).write_text('{"quantization": {"quant_algo": "FP8"}}')
    said = rf"its settings: .*/{place}\)" if place else "no quantization_config says how"
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        checkpoint_graph(open_checkpoint(folder))
    assert "'model.layers.0.mlp.down_proj.weight" in caught.value.message
    assert "and 11 more" in caught.value.message


def test_a_head_that_equals_the_tied_embeddings(tmp_path: Path) -> None:
    same = {"lm_head.weight": dense_tensors()["model.embed_tokens.weight"]}
    (said,) = unused(tmp_path, same, tie_word_embeddings=True)
    assert "tied" in said


def test_planes_of_a_format_that_is_read_are_used(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gptq(tmp_path, act_order=True))
    assert account(checkpoint, checkpoint_graph(checkpoint)) == ()


@pytest.mark.parametrize("name", ["ct-w4-g32-asym", "ct-w8a8-static", "ct-fp8-channel", "fp8-blocks", "modelopt-fp8"])
def test_planes_of_every_layout_are_used(tmp_path: Path, name: str) -> None:
    """All but the scales of activations, which some have."""
    folder, _, _ = write_pair(tmp_path, FORMATS[name])
    scales = tuple(sorted(tensor for tensor in stored(folder) if tensor.endswith(".input_scale")))
    checkpoint = open_checkpoint(folder)
    found = {kind.reason: kind.names for kind in account(checkpoint, checkpoint_graph(checkpoint))}
    assert found == ({"scales of activations, which an engine scales by what it sees": scales} if scales else {})


@pytest.mark.parametrize("name", ["weight_zero_point", "weight_packed", "weight_g_idx", "weight_scale_inv"])
def test_a_plane_without_the_others(tmp_path: Path, name: str) -> None:
    folder, _, _ = write_pair(tmp_path, FORMATS["ct-w8a8"])
    specs = stored(folder)
    del specs[f"{UP}.weight_scale"]
    del specs[f"{UP}.weight"]
    write_safetensors(folder / "model.safetensors", {**specs, f"{UP}.{name}": ("I32", (1,), some(1, dtype="int32"))})
    with pytest.raises(UnsupportedModelError, match=rf"'{UP}\.{name}' .*its settings: .*/config\.json\)"):
        checkpoint_graph(open_checkpoint(folder))


def test_quantized_parts_that_are_not_of_the_text_model(tmp_path: Path) -> None:
    """Their planes are named, and not taken together, though the config's ignore list has them."""
    folder, _, _ = write_pair(tmp_path, FORMATS["ct-w4-g128"])
    tower = {"weight_packed": "I32", "weight_scale": "F32"}
    specs = {f"language_model.{name}": spec for name, spec in stored(folder).items()}
    specs |= {f"vision_tower.{n}": (code, (1, 1), some(1, 1, dtype="int32")) for n, code in tower.items()}
    write_safetensors(folder / "model.safetensors", specs)
    settings = {**FORMATS["ct-w4-g128"].config, "ignore": ["vision_tower"]}
    config = {"model_type": "llava", "text_config": model_config(), "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    (kind,) = account(checkpoint, checkpoint_graph(checkpoint))
    assert kind.names == ("vision_tower.weight_packed", "vision_tower.weight_scale")
    assert kind.notable


def test_quantized_layers_beyond_the_last(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gptq(tmp_path))
    checkpoint.config["num_hidden_layers"] = 1
    with pytest.raises(CheckpointError, match=r"beyond num_hidden_layers: 'model\.layers\.1\..* and 6 more"):
        checkpoint_graph(checkpoint)


@pytest.mark.parametrize(
    ("write", "plane"),
    [(write_gptq, "qweight"), (lambda folder: write_pair(folder, FORMATS["ct-w4-g128"])[0], "weight_packed")],
)
def test_a_weight_stored_twice(tmp_path: Path, write: Callable[[Path], Path], plane: str) -> None:
    folder = write(tmp_path)
    specs = {**stored(folder), f"{UP}.weight": ("F16", (128, HIDDEN), some(128, HIDDEN))}
    write_safetensors(folder / "model.safetensors", specs)
    with pytest.raises(CheckpointError, match=f"'{UP}' has both a weight and a {plane}"):
        open_checkpoint(folder)


def test_some_names() -> None:
    assert name_some(["b", "a"]) == "'a', 'b'"
    assert name_some("dcba") == "'a', 'b', 'c' and 1 more"


@settings(max_examples=60, deadline=None)
@given(name=st.from_regex(r"\A(model\.layers\.[0-3]\.)?[a-z_]{1,12}(\.[a-z_]{1,12}){0,2}\Z"))
def test_no_tensor_is_passed_over(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """A name that nobody thought of is in the graph, in the list, or in the refusal."""
    folder = write_arrays(tmp_path_factory.mktemp("c"), {**dense_tensors(), name: some(3)})
    checkpoint = open_checkpoint(folder)
    try:
        graph = checkpoint_graph(checkpoint)
        said = str(account(checkpoint, graph))
    except CheckpointError as error:
        said = str(error)
    assert f"'{name}'" in said


def test_every_rule_is_documented() -> None:
    """On its own page, or, what ``methods.py`` knows, on that of the formats."""
    docs = Path(__file__).parents[2] / "docs"
    text = "".join((docs / page).read_text() for page in ("checkpoints.md", "formats.md"))
    assert [rule.reason for rule in RULES if f"| {rule.reason} |" not in text] == []
