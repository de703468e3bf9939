"""What an adapter is once it is read, whatever tool wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

DAMAGED = "fetch or save the adapter again"
"""How to mend an adapter whose files are not as PEFT writes them."""


def adapter_error(folder: Path, problem: str, fix: str | None = None) -> CheckpointError:
    """What is wrong with an adapter, on one line."""
    return CheckpointError(f"adapter {folder}: {problem}", fix=fix)


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix of low rank that is added to a module's weight [out, in]: ``scale * b @ a`` (Hu et al. 2021).

    An embedding's is of its table [vocab, width], so that it is added like any other.

    Attributes:
        module: name in the checkpoint, as ``lora`` ops and ``WeightPart.tensor`` (less ``.weight``) have it; the whole
            of it, of which a graph's op may take some rows.
        a: float32 [rank, in]. b: float32 [out, rank].
        scale: alpha over rank, or over its square root (rsLoRA, Kalajdzievski 2023).
    """

    module: str
    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Columns of ``b``."""
        return int(self.a.shape[0])


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, checked against the model that it is for.

    Attributes:
        path: its folder.
        parts: one a module, by name. ends: those of them that are no linear of a layer: embeddings, the output head.
        magnitudes: module -> float32 [out], the norms that its rows are brought to (DoRA, Liu et al. 2024).
        replaced: tensor -> what stands in its place, in its own dtype and stored orientation: trained biases and
            ``modules_to_save``.
        digest: sha256 (hex) of the files it was read from.
        notes: what a user should know, a line each.
    """

    path: Path
    parts: tuple[LowRank, ...]
    ends: tuple[str, ...] = ()
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest of a module."""
        return max((part.rank for part in self.parts), default=0)

    @property
    def merge_fix(self) -> str:
        """How to have what acts only when it is merged."""
        return f"llmctl merge BASE {self.path} --output DIR"

    def check_unmerged(self) -> None:
        """Refuse an adapter that does more than add low-rank products to what the layers' linears make.

        Raises:
            UnsupportedModelError: naming what, and how to merge it.
        """
        found = {
            "DoRA": tuple(self.magnitudes),
            "trained weights beside LoRA's (modules_to_save or bias)": tuple(self.replaced),
            "LoRA of embeddings or the output head": self.ends,
        }
        for what, names in found.items():
            if names:
                raise UnsupportedModelError(
                    f"adapter {self.path}: {what}, of '{min(names)}' for one, acts only when it is merged",
                    fix=self.merge_fix,
                )
