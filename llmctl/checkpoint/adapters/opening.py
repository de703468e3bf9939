"""Adapters as options name them, and the checkpoint that they are merged into."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmctl.checkpoint.adapters.merging import Weighted, merged_checkpoint
from llmctl.checkpoint.adapters.reading import read_adapter
from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.resolve import resolve_model, source_name
from llmctl.errors import UsageError


@dataclass(frozen=True)
class Named:
    """An adapter's folder and weight, as ``DIR`` or ``DIR=WEIGHT`` names them."""

    folder: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str, param: str) -> Named:
        """From an option's or argument's text; a folder whose own name has ``=`` is taken whole.

        Raises:
            UsageError: a weight that is no finite number.
        """
        folder, equals, weight = text.rpartition("=")
        whole = Path(text).expanduser()
        if not equals or whole.is_dir():
            return cls(whole)
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not folder or not math.isfinite(value):
            raise UsageError(f"adapter '{text}': expected DIR or DIR=WEIGHT, a finite number", param=param)
        return cls(Path(folder).expanduser(), value)


@dataclass(frozen=True)
class Merged:
    """A model with its adapters.

    Attributes:
        checkpoint: with them merged, if there are any. base: without. adapters: as given.
        untied: the output head is a tensor of its own now, though the base's is its embeddings.
        notes: what a user should know, a line each.
    """

    checkpoint: Checkpoint
    base: Checkpoint
    adapters: tuple[Weighted, ...] = ()
    untied: bool = False
    notes: tuple[str, ...] = ()


def open_merged(model: str, adapters: Sequence[str], param: str, as_family: str = "") -> Merged:
    """A model, and adapters merged into it; without any, the model as it is.

    Args:
        model: as ``resolve_model`` takes it. adapters: each ``DIR`` or ``DIR=WEIGHT``. param: what gave them.
        as_family: as ``open_checkpoint``.

    Raises:
        LlmctlError: as finding and reading them.
    """
    named = [Named.parse(text, param) for text in adapters]
    base = open_checkpoint(resolve_model(model), widen=True, as_family=as_family)
    if not named:
        return Merged(base, base, notes=tuple(_notes(base, ())))
    graph = checkpoint_graph(base)
    called = source_name(model, base.path)
    read = tuple(Weighted(read_adapter(one.folder, graph, called), one.weight) for one in named)
    checkpoint, untied = merged_checkpoint(base, graph, read)
    return Merged(checkpoint, base, read, untied, tuple(_notes(base, read)))


def _notes(base: Checkpoint, adapters: Sequence[Weighted]) -> Iterator[str]:
    for one in adapters:
        yield from one.adapter.notes
    stored = open_checkpoint(base.path).quantization  # a GGUF file's base is opened widened
    if stored is not None:
        then = "merged" if adapters else "quantized a second time: what the first one lost stays lost"
        yield f"{base.path} is quantized ({stored.method}): dequantized, then {then}"
