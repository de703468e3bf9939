"""``adapter_config.json`` of a LoRA adapter: what is read of it, and which settings are refused."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.checkpoint.hf_folder import ADAPTER_CONFIG, read_json
from llmctl.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

ALL_LINEAR = "all-linear"
LARGEST = 3.4e38
"""About the greatest float32."""
_MERGE = "merge it into its base model with peft first (merge_and_unload)"

_METHODS: Mapping[str, str] = {
    "ADALORA": "AdaLoRA",
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "BOFT": "BOFT",
    "CPT": "context-aware prompt tuning",
    "IA3": "IA³",
    "LN_TUNING": "layer norm tuning",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "OFT": "OFT",
    "P_TUNING": "p-tuning",
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
    "TRAINABLE_TOKENS": "trained tokens",
    "VERA": "VeRA",
    "XLORA": "X-LoRA",
}
_PROMPTS = ("ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")

_REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA, which acts from its invocation on",
    "arrow_config": "Arrow, which chooses among adapters by token",
    "ensure_weight_tying": "adapters tied as the weights of embeddings and head are",
    "kasa_config": "KaSA, which cuts the base weights",
    "layer_replication": "a base model with repeated layers",
    "lora_bias": "biases of LoRA's own",
    "megatron_config": "Megatron's layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA of parameters that are no module's weight",
    "trainable_token_indices": "tokens trained one by one",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA, which pools its inputs",
}
_TRAINING = (
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config",
)  # fmt: skip
"""What says how an adapter was trained, and nothing of what it computes."""
# What a weight is turned by is seen in the model, whichever way round it is stored.
_SEEN_ELSEWHERE = ("fan_in_fan_out",)
_READ = (
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules",
    "task_type", "use_dora", "use_rslora",
)  # fmt: skip
_KNOWN = frozenset((*_READ, *_TRAINING, *_SEEN_ELSEWHERE))
_NEUTRAL_STARTS = ("gaussian", "eva", "orthogonal")
_TASKS = (None, "CAUSAL_LM")


@dataclass(frozen=True)
class AdapterSettings:
    """What PEFT's ``LoraConfig`` says that matters once the adapter is trained.

    Attributes:
        base_model: what it was trained on; "" where that is not said.
        rank, alpha: of modules that no pattern names; ranks, alphas: those patterns, the first that fits decides.
        rslora: products are scaled by alpha over the rank's square root.
        dora: rows are brought to trained norms.
        targets: names of modules, a regular expression, or ``all-linear``; None: not said. excluded: likewise, ().
        layers: the decoder layers it is confined to, None: all; layer_names: what lists of layers are called.
        saved: modules that were trained whole. bias: ``none``, ``all`` or ``lora_only``.
    """

    base_model: str
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    layer_names: tuple[str, ...]
    saved: tuple[str, ...]
    bias: str

    def scale(self, alpha: float, rank: int) -> float:
        """What a product of that alpha and rank is multiplied by."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_settings(folder: Path) -> AdapterSettings:
    """Those of an adapter's folder.

    Raises:
        ModelNotFoundError: no adapter there.
        UnsupportedModelError: another method than LoRA, or a setting that is not honoured.
        CheckpointError: a value that makes no sense.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ModelNotFoundError(
            f"{folder}: not a PEFT adapter: no {ADAPTER_CONFIG}", fix="name the folder that PEFT saved"
        )
    found = read_json(path)
    _check_method(path, found)
    reader = _Reader(path, found)
    return AdapterSettings(
        base_model=reader.text("base_model_name_or_path", ""),
        rank=reader.count("r", 8),
        alpha=reader.number("lora_alpha", 8),
        rslora=reader.switch("use_rslora"),
        dora=reader.switch("use_dora"),
        ranks={key: reader.count_of(f"rank_pattern: {key}", v) for key, v in reader.pairs("rank_pattern").items()},
        alphas={key: reader.number_of(f"alpha_pattern: {key}", v) for key, v in reader.pairs("alpha_pattern").items()},
        targets=reader.names_or_pattern("target_modules"),
        excluded=reader.names_or_pattern("exclude_modules") or (),
        layers=reader.layers("layers_to_transform"),
        layer_names=reader.plain_names("layers_pattern"),
        saved=reader.names("modules_to_save"),
        bias=reader.one_of("bias", ("none", "all", "lora_only")),
    )


def _check_method(path: Path, found: Mapping[str, Any]) -> None:
    """Refuse what is not LoRA, a variant of it that computes something else, or a setting nobody here knows."""
    method = str(found.get("peft_type"))
    if method != "LORA":
        name = _METHODS.get(method, method[:40])
        fix = "train a LoRA adapter instead: prompts have no weights to merge" if method in _PROMPTS else _MERGE
        raise UnsupportedModelError(f"{path}: {name} (peft_type {method[:40]}): only LoRA is read", fix=fix)
    task = found.get("task_type")
    if task not in _TASKS:
        raise UnsupportedModelError(f"{path}: task_type {reprlib.repr(task)}: only CAUSAL_LM adapters are read")
    start = found.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in (None, *_NEUTRAL_STARTS):
        raise UnsupportedModelError(
            f"{path}: init_lora_weights {reprlib.repr(start)}: it changes the base model's own weights",
            fix="save it with peft's path_initial_model_for_weight_conversion, which makes plain LoRA of it",
        )
    for key, value in found.items():
        if key in _KNOWN or value in (None, False, "", [], {}):
            continue
        what = _REFUSED.get(key, "a setting that this version does not know")
        raise UnsupportedModelError(f"{path}: {key[:80]}: {what}", fix=_MERGE)


class _Reader:
    """Typed look-ups in the file; a value of another type is refused."""

    def __init__(self, path: Path, found: Mapping[str, Any]) -> None:
        self._path, self._found = path, found

    def text(self, key: str, default: str) -> str:
        value = self._found.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or not value.isprintable():
            raise self._wrong(key, "a text", value)
        return value

    def one_of(self, key: str, values: tuple[str, ...]) -> str:
        value = self.text(key, values[0])
        if value not in values:
            raise self._wrong(key, f"one of {', '.join(values)}", value)
        return value

    def switch(self, key: str) -> bool:
        value = self._found.get(key) or False
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def count(self, key: str, default: int) -> int:
        value = self._found.get(key)
        return self.count_of(key, default if value is None else value)

    def count_of(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value < 2**31:
            raise self._wrong(key, "a whole number from 1", value)
        return value

    def number(self, key: str, default: float) -> float:
        value = self._found.get(key)
        return self.number_of(key, default if value is None else value)

    def number_of(self, key: str, value: Any) -> float:
        # Python reads 1e999 as infinity, and an integer may be beyond every float.
        if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:
            raise self._wrong(key, "a finite number", value)
        return float(value)

    def pairs(self, key: str) -> Mapping[str, Any]:
        value = self._found.get(key) or {}
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self._found.get(key) or []
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
            raise self._wrong(key, "names", value)
        return tuple(items)

    def plain_names(self, key: str) -> tuple[str, ...]:
        names = self.names(key)
        if not all(re.fullmatch(r"[\w.]+", name) for name in names):
            raise self._wrong(key, "plain names", names)
        return names

    def names_or_pattern(self, key: str) -> tuple[str, ...] | str | None:
        value = self._found.get(key)
        if value is None or (isinstance(value, str) and value):
            return value
        return self.names(key)

    def layers(self, key: str) -> tuple[int, ...] | None:
        value = self._found.get(key)
        items = [value] if type(value) is int else value or []
        if not isinstance(items, list) or not all(type(item) is int and item >= 0 for item in items):
            raise self._wrong(key, "numbers of layers", value)
        return tuple(items) or None

    def _wrong(self, key: str, expected: str, found: Any) -> CheckpointError:
        return CheckpointError(f"{self._path}: {key[:80]}: expected {expected}, found {reprlib.repr(found)}")
