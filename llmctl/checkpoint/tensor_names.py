"""What a Hugging Face folder's stored tensors are called in the full causal model, whatever they were saved from.

Three spellings are brought to one: the full model's, the headless base model's (``layers.0…``, ``h.0…``), and that of a
text model inside a multimodal one (``language_model.model.layers.0…``, ``model.language_model.layers.0…``,
``model.text_model.layers.0…``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmctl.errors import CheckpointError

_HEADS = ("lm_head.", "embed_out.", "score.", "classifier.")
_TEXT_TOWER = re.compile(r"(model\.)?(?:language_model|text_model)\.(?=.)")


@dataclass(frozen=True)
class TensorNames:
    """Names of a checkpoint's tensors.

    Attributes:
        stored: name in the full causal model -> name in the file.
        outside: those of ``stored`` that belong to the other parts of a multimodal model.
    """

    stored: Mapping[str, str]
    outside: frozenset[str] = frozenset()


def full_names(stored: Iterable[str], base: str, *, multimodal: bool) -> TensorNames:
    """The names in the full causal model.

    Args:
        base: the base model's attribute in it (``model``, ``transformer``, ``gpt_neox``); put before the names of a
            checkpoint none of whose tensors has it.
        multimodal: config.json has a ``text_config``, so that a text tower's prefix is to be looked for.

    Raises:
        CheckpointError: two tensors get one name.
    """
    inner = {name: name for name in stored}
    outside: frozenset[str] = frozenset()
    if multimodal and any(_TEXT_TOWER.match(name) for name in inner):
        outside = frozenset(n for n in inner if not _TEXT_TOWER.match(n) and not n.startswith("lm_head."))
        inner = {name: _TEXT_TOWER.sub(r"\1", name, count=1) for name in inner if name not in outside}
    if base and not any(name.startswith(f"{base}.") for name in inner.values()):
        inner = {n: name if name.startswith(_HEADS) else f"{base}.{name}" for n, name in inner.items()}
    found: dict[str, str] = {}
    for name, full in [*inner.items(), *((name, name) for name in outside)]:
        if full in found:
            raise CheckpointError(f"checkpoint: tensors '{found[full]}' and '{name}' are both '{full}'")
        found[full] = name
    return TensorNames(found, outside)
