"""Reading an adapter: what is refused, in which words, and what is noted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import RANK, Tensors, products, settings, write
from tiny_checkpoint import HIDDEN, VOCAB, write_dense

from llmctl.checkpoint.adapters.adapter import Adapter
from llmctl.checkpoint.adapters.reading import FILES, read_adapter
from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.errors import CheckpointError, LlmctlError, ModelNotFoundError, UnsupportedModelError
from llmctl.graph.graph import Graph
from llmctl.graph.passes import apply_passes


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return checkpoint_graph(open_checkpoint(write_dense(tmp_path_factory.mktemp("base"))))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def test_what_is_read(graph: Graph, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", settings(), products("q_proj"))
    adapter = read_adapter(folder, graph, "somewhere/Tiny")
    assert [part.module for part in adapter.parts] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    first = adapter.parts[0]
    assert (adapter.rank, first.scale, first.a.shape, first.b.shape) == (RANK, 2.0, (RANK, HIDDEN), (HIDDEN, RANK))
    assert adapter.notes == ()
    assert read_adapter(folder, graph, "org/other").notes == (
        f"adapter {folder}: trained on 'org/tiny', used with 'org/other'; shapes agree",
    )
    adapter.check_unmerged()


def test_the_digest_is_of_both_files(graph: Graph, tmp_path: Path) -> None:
    def digest(config: dict[str, Any], tensors: Tensors) -> str:
        return read_adapter(write(tmp_path / "a", config, tensors), graph).digest

    changed = products("q_proj")
    changed[f"{FIRST}.lora_A.weight"][0, 0] += 1
    digests = [digest(settings(), products("q_proj")), digest(settings(), changed)]
    digests.append(digest(settings(lora_alpha=9), products("q_proj")))
    assert len(set(digests)) == 3
    assert digest(settings(), products("q_proj")) == digests[0]


def test_tensors_stay_when_the_file_is_cut_short(graph: Graph, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", settings(), products("q_proj"))
    adapter = read_adapter(folder, graph)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert float(adapter.parts[0].a.abs().sum()) > 0


@pytest.mark.parametrize("changes", [{"lora_alpha": 9}, {}])
def test_files_that_are_written_meanwhile(
    changes: dict[str, Any], graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old weights under the digest of new ones would be given the new ones' keys and values."""
    folder = write(tmp_path / "a", settings(), products("q_proj"))
    tensors = products("q_proj")
    tensors[f"{FIRST}.lora_A.weight"][0, 0] += 0 if changes else 1

    def read_late(*_: Any) -> tuple[()]:
        write(tmp_path / "new", settings(**changes), tensors)
        for name in FILES:
            (tmp_path / "new" / name).replace(folder / name)
        return ()

    monkeypatch.setattr("llmctl.checkpoint.adapters.reading._notes", read_late)
    with pytest.raises(CheckpointError, match="its files changed while they were read"):
        read_adapter(folder, graph)


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_(name: str, value: np.ndarray) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def change_all(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change_all


A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "wrong rank": (
        with_(A, np.zeros((3, HIDDEN), np.float32)), rf"'{A}': expected shape \[4, 64\], found \[3, 64\]",
    ),
    "wrong width": (with_(B, np.zeros((HIDDEN + 1, RANK), np.float32)), r"expected shape \[64, 4\], found \[65, 4\]"),
    "vector": (with_(A, np.zeros(HIDDEN, np.float32)), r"expected shape \[4, 64\], found \[64\]"),
    "empty": (with_(A, np.zeros((0, HIDDEN), np.float32)), r"found \[0, 64\]"),
    "NaN": (with_(A, np.full((RANK, HIDDEN), np.nan, np.float32)), "256 of 256 values are not finite"),
    "infinite": (with_(B, np.full((HIDDEN, RANK), np.inf, np.float16)), "256 of 256 values are not finite"),
    "too large": (with_(A, np.full((RANK, HIDDEN), 1e39, np.float64)), "not finite"),
    "integers": (with_(A, np.zeros((RANK, HIDDEN), np.int8)), "expected floats, found int8"),
    "half a pair": (without(B), r"'model.layers.0.self_attn.q_proj': lora_B is missing"),
    "a module less": (renamed("1.self_attn.q_proj", "1.self_attn.k_proj"), "name modules without tensors"),
    "no such module": (renamed("layers.1.", "layers.7."), "modules that this model does not have: 'model.layers.7"),
    "another model's": (renamed("self_attn.q_proj", "attention.wq"), "modules that this model does not have"),
    "embedding's": (renamed("lora_A.weight", "lora_embedding_A"), "'model.layers.0.self_attn.q_proj' is no embedding"),
    "norms without DoRA": (
        with_(f"{FIRST}.lora_magnitude_vector", np.ones(HIDDEN, np.float32)), "lora_magnitude_vector is there, though",
    ),
    "not PEFT's name": (with_("q_proj.lora_A.weight", np.zeros(1, np.float32)), "expected a name that starts with"),
    "path as a name": (
        with_("base_model.model.../../../etc/passwd", np.zeros(1, np.float32)), "this model does not have",
    ),
    "a whole tensor": (
        with_("base_model.model.model.norm.weight", np.ones(HIDDEN, np.float32)), "no setting speaks of: 'model.norm",
    ),
    "unknown piece": (with_(f"{FIRST}.lora_C.weight", np.ones(2, np.float32)), "this model does not have: 'model"),
    "twice": (
        lambda tensors: tensors.update(
            {f"base_model.model.model.embed_tokens.{name}": np.ones((VOCAB, HIDDEN), np.float16)
             for name in ("weight", "base_layer.weight")}
        ),
        r"tensors '.*' and '.*' are one to the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_refused(name: str, graph: Graph, tmp_path: Path) -> None:
    spoil, message = TENSORS[name]
    tensors = products("q_proj")
    spoil(tensors)
    write(tmp_path / "a", settings(), tensors)
    for form in (graph, apply_passes(graph)):
        with pytest.raises(CheckpointError, match=message) as found:
            read_adapter(tmp_path / "a", form)
        assert len(str(found.value).splitlines()) == 1


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "VERA": ({"peft_type": "VERA"}, r"VeRA \(peft_type VERA\): only LoRA is read \(merge it"),
    "IA3": ({"peft_type": "IA3"}, r"IA³ \(peft_type IA3\)"),
    "LOHA": ({"peft_type": "LOHA"}, "LoHa"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "prompt tuning .*prompts have no weights to merge"),
    "unknown method": ({"peft_type": "NEW"}, r"NEW \(peft_type NEW\)"),
    "no method": ({"peft_type": None}, "only LoRA"),
    "classifier": ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS': only CAUSAL_LM"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's own weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "changes the base model's own weights"),
    "qalora": ({"use_qalora": True}, "use_qalora: QA-LoRA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias: biases of LoRA's own"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: tokens trained one by one"),
    "parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters: LoRA of parameters"),
    "replicated": ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
    "activated": ({"alora_invocation_tokens": [3]}, "activated LoRA"),
    "tied": ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    "unknown setting": ({"use_newest": True}, "use_newest: a setting that this version does not know"),
    "rank": ({"r": 0}, "r: expected a whole number from 1, found 0"),
    "rank as text": ({"r": "8"}, "r: expected a whole number"),
    "alpha": ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number"),
    "no number": ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number"),
    "huge alpha": ({"lora_alpha": 3e38}, "alpha 3e\\+38 makes values beyond float32"),
    "alpha of one": ({"alpha_pattern": {"q_proj": 1e300}}, "alpha_pattern: q_proj: expected a finite number"),
    "patterns": ({"rank_pattern": ["q_proj"]}, "rank_pattern: expected an object"),
    "another rank": ({"rank_pattern": {"q_proj": 8}}, r"expected shape \[8, 64\], found \[4, 64\]"),
    "no pattern": ({"target_modules": "(q_proj"}, "is no regular expression"),
    "no pattern inside another": ({"rank_pattern": {"(?x)q_proj # all": 4}}, "is no regular expression: missing"),
    "large pattern": ({"target_modules": "((a{500}){500}){500}"}, "expected patterns of at most"),
    "targets": ({"target_modules": {"q_proj": 1}}, "target_modules: expected names"),
    "other targets": (
        {"target_modules": ["v_proj"]},
        "name modules without tensors: 'model.layers.0.self_attn.v_proj'",
    ),
    "fewer targets": ({"layers_to_transform": [0]}, "tensors of modules that target_modules do not name"),
    "excluded": ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "target_modules do not name"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save: no tensors of 'lm_head.weight'"),
    "saved at length": ({"modules_to_save": ["x" * 10**5]}, "modules_to_save: 'x{80}' is no module of this model"),
    "odd key": ({"a\n\x1b[1m": 1}, r": a \\x1b\[1m: a setting that this version does not know"),
    "saved nowhere": ({"modules_to_save": ["score"]}, "modules_to_save: 'score' is no module of this model"),
    "bias": ({"bias": "some"}, "bias: expected one of none, all, lora_only"),
    "DoRA": ({"use_dora": True}, "lora_magnitude_vector is missing"),
    "base": ({"base_model_name_or_path": "a\nb"}, "expected a text"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_refused(name: str, graph: Graph, tmp_path: Path) -> None:
    changes, message = SETTINGS[name]
    write(tmp_path / "a", settings(**changes), products("q_proj"))
    with pytest.raises(LlmctlError, match=message) as found:
        read_adapter(tmp_path / "a", graph)
    assert len(str(found.value).splitlines()) == 1


def test_a_pattern_that_takes_for_ever(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmctl.checkpoint.name_patterns.SECONDS", 0.01)
    write(tmp_path / "a", settings(target_modules="((a?.{1,999}){1,999}){1,999}[!?]"), products("q_proj"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: .* takes more than 0\.01 s to match"):
        read_adapter(tmp_path / "a", graph)


@pytest.mark.parametrize("pattern", ["(?x) .* q_proj # all", r"(?i).*\.Q_PROJ", "model.*|q_proj|model.*q_proj"])
def test_a_pattern_is_matched_as_it_stands(pattern: str, graph: Graph, tmp_path: Path) -> None:
    write(tmp_path / "a", settings(target_modules=pattern, exclude_modules="(?x)q_proj # not"), products("q_proj"))
    if pattern.startswith("model"):
        with pytest.raises(CheckpointError, match="name modules without tensors"):
            read_adapter(tmp_path / "a", graph)
    else:
        assert len(read_adapter(tmp_path / "a", graph).parts) == 2


def test_an_adapter_of_nothing(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensors"):
        read_adapter(write(tmp_path / "a", settings(target_modules=[]), {}), graph)


def test_settings_of_training_say_nothing(graph: Graph, tmp_path: Path) -> None:
    trained = settings(lora_dropout=0.1, eva_config={"rho": 2.0}, init_lora_weights="eva", megatron_config=None,
                       fan_in_fan_out=True, use_qalora=False, newest=None)  # fmt: skip
    assert read_adapter(write(tmp_path / "a", trained, products("q_proj")), graph).rank == RANK


def test_pickle_and_nothing(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"not a PEFT adapter: no adapter_config\.json"):
        read_adapter(tmp_path, graph)
    folder = write(tmp_path / "a", settings(), products("q_proj"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle weights"):
        read_adapter(folder, graph)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        read_adapter(folder, graph)


@pytest.mark.parametrize(
    ("start", "targets"),
    [
        ("model.language_model.", r"model\.language_model\..*\.q_proj"),
        ("language_model.model.", r"language_model\..*\.q_proj"),
        ("", r"layers\.\d+\.self_attn\.q_proj"),
    ],
)
def test_other_spellings_of_the_same_model(start: str, targets: str, graph: Graph, tmp_path: Path) -> None:
    """Of a multimodal model, and of the base model without its head."""
    tensors = products("q_proj")
    renamed("base_model.model.model.", f"base_model.model.{start}")(tensors)
    adapter = read_adapter(write(tmp_path / "a", settings(target_modules=targets), tensors), graph)
    assert [part.module for part in adapter.parts] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_a_tower_of_pictures_is_refused(graph: Graph, tmp_path: Path) -> None:
    tensors = products("q_proj")
    renamed("base_model.model.model.", "base_model.model.model.language_model.")(tensors)
    tensors["base_model.model.model.vision_tower.q_proj.lora_A.weight"] = np.zeros((RANK, 8), np.float32)
    write(tmp_path / "a", settings(), tensors)
    with pytest.raises(CheckpointError, match=r"this model does not have: 'model\.vision_tower\.q_proj'"):
        read_adapter(tmp_path / "a", graph)


def whole(graph: Graph, folder: Path, **changes: Any) -> Adapter:
    head = {"base_model.model.lm_head.weight": np.ones((VOCAB, HIDDEN), np.float16)}
    return read_adapter(write(folder, settings(**changes), products("q_proj") | head), graph)


def test_what_acts_only_when_merged_is_refused_unmerged(graph: Graph, tmp_path: Path) -> None:
    saved = whole(graph, tmp_path / "a", modules_to_save=["lm_head"])
    assert {name: str(t.dtype) for name, t in saved.replaced.items()} == {"lm_head.weight": "torch.float16"}
    message = re.escape("trained weights beside LoRA's (modules_to_save or bias), of 'lm_head.weight' for one")
    with pytest.raises(UnsupportedModelError, match=f"{message}.*llmctl merge BASE"):
        saved.check_unmerged()
