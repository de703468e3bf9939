"""The tensors of an adapter's file sorted by what they are, named as a checkpoint names its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmctl.checkpoint.adapters.adapter import DAMAGED, adapter_error
from llmctl.checkpoint.tensor_names import full_names

MAGNITUDES = "magnitude_vector"
_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B)|(magnitude_vector)(?:\.weight)?)")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")


@dataclass(frozen=True)
class StoredTensors:
    """What a file holds.

    Attributes:
        low_rank: module -> piece (``A``, ``B``, ``magnitude_vector``) -> its name in the file.
        tables: modules whose pieces are an embedding's.
        whole: tensor of the model -> its name in the file.
        called: module -> what the model that the adapter was trained on calls it.
    """

    low_rank: Mapping[str, Mapping[str, str]]
    tables: frozenset[str]
    whole: Mapping[str, str]
    called: Mapping[str, str]

    def spelling(self) -> Callable[[str], str]:
        """What that model calls any module: names differ in how they start, all alike."""
        for module, called in self.called.items():
            ours, theirs = module.split("."), called.split(".")
            while ours and theirs and ours[-1] == theirs[-1]:
                ours.pop()
                theirs.pop()
            if ours != theirs:
                start, other = (".".join([*parts, ""]) for parts in (ours, theirs))
                return lambda name: other + name.removeprefix(start) if name.startswith(start) else name
        return lambda name: name


def sort_tensors(folder: Path, stored: Iterable[str], base: str) -> StoredTensors:
    """Sort a file's names.

    Args:
        folder: the adapter's, for messages. base: as ``tensor_names.full_names`` takes it.

    Raises:
        CheckpointError: none, a name that PEFT does not write, or two of one tensor.
    """
    names: dict[str, str] = {}
    for name in stored:
        if not name.startswith(_PREFIX):
            raise adapter_error(folder, f"tensor '{name}': expected a name that starts with {_PREFIX}")
        names[name.removeprefix(_PREFIX)] = name
    if not names:
        raise adapter_error(folder, "no tensors", DAMAGED)
    low_rank: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    tables: set[str] = set()
    called: dict[str, str] = {}
    for full, inner in full_names(names, base, multimodal=True).stored.items():
        found = _LOW_RANK.fullmatch(full)
        if found is None:
            group, key = whole, _WRAPPED.sub("", full)
        else:
            group, key = low_rank.setdefault(found[1], {}), found[2] or found[3] or found[4]
            called[found[1]] = inner[: len(inner) - len(full) + len(found[1])]
            if found[3]:
                tables.add(found[1])
        if key in group:
            raise adapter_error(folder, f"tensors '{group[key]}' and '{names[inner]}' are one to the model")
        group[key] = names[inner]
    return StoredTensors(low_rank, frozenset(tables), whole, called)
