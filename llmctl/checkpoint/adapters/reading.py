"""Read a PEFT adapter for a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.checkpoint.adapters.accounting import OTHER_MODEL, account
from llmctl.checkpoint.adapters.adapter import DAMAGED, Adapter, LowRank, adapter_error
from llmctl.checkpoint.adapters.base_tensors import BaseTensors, base_tensors
from llmctl.checkpoint.adapters.settings import LARGEST, AdapterSettings, read_settings
from llmctl.checkpoint.adapters.stored import MAGNITUDES, sort_tensors
from llmctl.checkpoint.adapters.targets import Targets
from llmctl.checkpoint.assemble import check_finite
from llmctl.checkpoint.hf_folder import ADAPTER_CONFIG
from llmctl.checkpoint.safetensors_io import SafetensorsFile, map_tensor
from llmctl.errors import CheckpointError
from llmctl.graph.dtypes import BY_SAFETENSORS, FLOAT_DTYPES
from llmctl.graph.graph import Graph

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
FILES = (ADAPTER_CONFIG, WEIGHTS)


def read_adapter(folder: Path, graph: Graph, base: str = "") -> Adapter:
    """The adapter in a folder (``adapter_config.json``, ``adapter_model.safetensors``), for a model.

    Args:
        graph: of the model, before or after its passes.
        base: what the model is called; an adapter that names another is noted. "": nothing is compared.

    Raises:
        ModelNotFoundError: no adapter there.
        CheckpointError: damaged, or not for this model: shapes, missing or superfluous tensors, values that are not
            finite; written to meanwhile.
        UnsupportedModelError: another method than LoRA, a setting that is not read.
    """
    settings = read_settings(folder)
    weights = _weights_path(folder)
    digest = _digest(folder)
    model = base_tensors(graph)
    reader = _Reader(folder, settings, SafetensorsFile(weights), model)
    parts = reader.parts()
    adapter = Adapter(
        path=folder,
        parts=tuple(parts),
        ends=tuple(part.module for part in parts if part.module == model.head or part.module in model.tables),
        magnitudes=reader.magnitudes(),
        replaced=reader.replaced(),
        digest=digest,
        notes=tuple(_notes(folder, settings, base)),
    )
    if _digest(folder) != digest:  # by which keys and values are found again: it must be of what was read
        raise adapter_error(folder, "its files changed while they were read", "read it again once it is written")
    return adapter


def _weights_path(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    pickle = folder / "adapter_model.bin"
    if pickle.is_file():
        raise CheckpointError(
            f"{pickle}: pickle weights, which can run code when read",
            fix="load and save it again with peft: save_pretrained writes safetensors",
        )
    raise CheckpointError(f"{folder}: no {WEIGHTS}", fix=DAMAGED)


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _notes(folder: Path, settings: AdapterSettings, base: str) -> Iterable[str]:
    """That it names another base model than that at hand; paths and hubs differ for one model, its name does not."""
    theirs, ours = (name.rstrip("/").rpartition("/")[2] for name in (settings.base_model, base))
    if ours and theirs and ours.lower() != theirs.lower():
        yield f"adapter {folder}: trained on '{settings.base_model}', used with '{base}'; shapes agree"


class _Reader:
    """The tensors of one adapter for one model; names are checked when it is made.

    Raises:
        CheckpointError: as ``account``.
    """

    def __init__(self, folder: Path, settings: AdapterSettings, file: SafetensorsFile, base: BaseTensors) -> None:
        self._folder, self._settings, self._file, self._base = folder, settings, file, base
        self._targets = Targets(folder, settings)
        self._stored = sort_tensors(folder, file.tensors, base.prefix)
        account(folder, settings, self._targets, self._stored, base)

    def parts(self) -> list[LowRank]:
        """The products, by module."""
        return [self._part(module) for module in sorted(self._stored.low_rank)]

    def magnitudes(self) -> dict[str, Tensor]:
        """DoRA's norms: of rows, of an embedding's columns."""
        return {
            module: self._tensor(pieces[MAGNITUDES], (self._shape(module)[module in self._base.tables],))
            for module, pieces in self._stored.low_rank.items()
            if MAGNITUDES in pieces
        }

    def replaced(self) -> dict[str, Tensor]:
        """Tensors that stand in place of the model's."""
        return {
            name: self._tensor(stored, self._base.stored_shape(name), widened=False)
            for name, stored in self._stored.whole.items()
        }

    def _part(self, module: str) -> LowRank:
        pieces, called = self._stored.low_rank[module], self._stored.called[module]
        rank, alpha = self._targets.rank(called), self._targets.alpha(called)
        rows, columns = self._shape(module)
        if module in self._base.tables:  # PEFT's product is the table turned
            b = self._tensor(pieces["A"], (rank, rows)).T.contiguous()
            a = self._tensor(pieces["B"], (columns, rank)).T.contiguous()
        else:
            a, b = self._tensor(pieces["A"], (rank, columns)), self._tensor(pieces["B"], (rows, rank))
        scale = self._settings.scale(alpha, rank)
        if abs(scale) * float(a.abs().max()) * float(b.abs().max()) * rank > LARGEST:
            raise adapter_error(
                self._folder, f"'{module}': alpha {alpha:g} makes values beyond float32 of its products"
            )
        return LowRank(module, a, b, scale)

    def _shape(self, module: str) -> tuple[int, ...]:
        return self._base.shapes[f"{module}.weight"]

    def _tensor(self, stored: str, expected: tuple[int, ...], *, widened: bool = True) -> Tensor:
        """A tensor's values in memory of its own, in float32 or as stored: the file may be replaced meanwhile."""
        import torch

        entry = self._file.entry(stored)
        if entry.shape != expected:
            problem = f"tensor '{stored}': expected shape {list(expected)}, found {list(entry.shape)}"
            raise adapter_error(self._folder, problem, OTHER_MODEL)
        dtype = BY_SAFETENSORS[entry.dtype].name
        if dtype not in FLOAT_DTYPES:
            raise adapter_error(self._folder, f"tensor '{stored}': expected floats, found {dtype}")
        tensor = map_tensor(self._file, stored).to(torch.float32 if widened else getattr(torch, dtype), copy=True)
        try:
            check_finite(stored, tensor)
        except CheckpointError as error:
            problem = error.message.removeprefix("checkpoint: ")
            raise adapter_error(self._folder, problem, "train or fetch the adapter again") from error
        return tensor
