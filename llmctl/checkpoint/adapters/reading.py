"""Read a PEFT adapter for a model, and account for every tensor and setting of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.checkpoint.accounting import name_some
from llmctl.checkpoint.adapters.adapter import Adapter, LowRank
from llmctl.checkpoint.adapters.base_tensors import BaseTensors, base_tensors
from llmctl.checkpoint.adapters.settings import AdapterSettings, read_settings
from llmctl.checkpoint.adapters.stored import sort_tensors
from llmctl.checkpoint.adapters.targets import Targets, is_saved
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
_LARGEST = 3.4e38  # of float32


def read_adapter(folder: Path, graph: Graph, base: str = "") -> Adapter:
    """The adapter in a folder (``adapter_config.json``, ``adapter_model.safetensors``), for a model.

    Args:
        graph: of the model, before or after its passes.
        base: what the model is called; an adapter that names another is noted. "": nothing is compared.

    Raises:
        ModelNotFoundError: no adapter there.
        CheckpointError: damaged, or not for this model: shapes, missing or superfluous tensors, values that are not
            finite.
        UnsupportedModelError: another method than LoRA, a setting that is not read.
    """
    settings = read_settings(folder)
    file = SafetensorsFile(_weights_path(folder))
    reader = _Reader(folder, settings, file, base_tensors(graph))
    parts = reader.parts()
    return Adapter(
        path=folder,
        base_model=settings.base_model,
        parts=tuple(parts),
        ends=tuple(part.module for part in parts if reader.is_end(part.module)),
        magnitudes=reader.magnitudes(),
        replaced=reader.replaced(),
        digest=_digest(folder),
        notes=tuple(_notes(folder, settings, base)),
    )


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
    raise CheckpointError(f"{folder}: no {WEIGHTS}", fix="fetch or save the adapter again")


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
    """One adapter against one model. Everything structural is checked when it is made."""

    def __init__(self, folder: Path, settings: AdapterSettings, file: SafetensorsFile, base: BaseTensors) -> None:
        self._folder, self._settings, self._file, self._base = folder, settings, file, base
        self._targets = Targets(folder, settings)
        self._stored = sort_tensors(folder, file.tensors, base.prefix)
        self._matrices = base.matrices()
        self._check_modules()
        self._check_whole()

    def parts(self) -> list[LowRank]:
        """The products, by module."""
        return [self._part(module) for module in sorted(self._stored.low_rank)]

    def is_end(self, module: str) -> bool:
        """Whether a module is embeddings or the output head."""
        return module == self._base.head or module in self._base.tables

    def magnitudes(self) -> dict[str, Tensor]:
        """DoRA's norms."""
        found = {}
        for module, pieces in self._stored.low_rank.items():
            if "magnitude_vector" in pieces:
                # Versions before 0.9 stored those of a linear as a column.
                norms = self._tensor(pieces["magnitude_vector"]).reshape(-1)
                rows, columns = self._matrices[module]
                self._check_shape(pieces["magnitude_vector"], norms, (columns if self._is_table(module) else rows,))
                found[module] = norms
        return found

    def replaced(self) -> dict[str, Tensor]:
        """Tensors that stand in place of the model's."""
        found = {}
        for name, stored in self._stored.whole.items():
            tensor = self._tensor(stored, widened=False)
            self._check_shape(stored, tensor, self._base.stored_shape(name))
            found[name] = tensor
        return found

    # what is in the file

    def _check_modules(self) -> None:
        """The modules that have tensors are those that the settings name, with all that belongs to each."""
        found, dora = self._stored.low_rank, self._settings.dora
        wanted = {"A", "B", *(("magnitude_vector",) if dora else ())}
        odd = [module for module in found if module not in self._matrices]
        if odd:
            raise self._error(f"LoRA of modules that this model does not have: {name_some(odd)}", self._not_this)
        for module, pieces in found.items():
            if set(pieces) != wanted:
                missing = "lora_" + min(wanted - set(pieces) or set(pieces) - wanted)
                problem = "is missing" if wanted - set(pieces) else "is there, though use_dora is not set"
                raise self._error(f"'{module}': {missing} {problem}", "fetch or save the adapter again")
            if (module in self._stored.tables) != (module in self._base.tables):
                kind = "an embedding" if module in self._base.tables else "no embedding"
                raise self._error(f"'{module}' is {kind} in this model", self._not_this)
        spelt = self._stored.spelling()
        named = {
            module
            for module in self._matrices
            if self._targets.names(
                spelt(module), linear=module not in self._base.tables, head=module == self._base.head
            )
        }
        if self._settings.targets is not None and named != set(found):
            if missing_modules := named - set(found):
                raise self._error(
                    f"target_modules name modules without tensors: {name_some(missing_modules)}",
                    "fetch or save the adapter again",
                )
            raise self._error(f"tensors of modules that target_modules do not name: {name_some(set(found) - named)}")

    def _check_whole(self) -> None:
        """Whole tensors are those of ``modules_to_save``, trained biases, and embeddings that were saved along."""
        settings, whole = self._settings, self._stored.whole
        saved = {name for name in self._base.shapes if is_saved(name.rpartition(".")[0], settings.saved)}
        embeddings = {f"{module}.weight" for module in (*self._base.tables, self._base.head)}
        biases = {name for name in self._base.shapes if name.endswith(".bias")} if settings.bias != "none" else set()
        odd = whole.keys() - saved - embeddings - biases
        if odd:
            known = all(name in self._base.shapes for name in odd)
            what = "no setting speaks of" if known else "this model does not have"
            raise self._error(f"tensors that {what}: {name_some(odd)}", None if known else self._not_this)
        missing = saved - whole.keys()
        if missing:
            raise self._error(f"modules_to_save: no tensors of {name_some(missing)}", "fetch or save the adapter again")
        for entry in settings.saved:
            if not any(is_saved(name.rpartition(".")[0], (entry,)) for name in self._base.shapes):
                raise self._error(f"modules_to_save: '{entry}' is no module of this model", self._not_this)

    # tensors

    def _part(self, module: str) -> LowRank:
        pieces = self._stored.low_rank[module]
        called = self._stored.called[module]
        rank, alpha = self._targets.rank(called), self._targets.alpha(called)
        rows, columns = self._matrices[module]
        a, b = (self._tensor(pieces[piece]) for piece in ("A", "B"))
        if self._is_table(module):  # [rank, vocab] and [width, rank]: the table is their product turned
            self._check_shape(pieces["A"], a, (rank, rows))
            self._check_shape(pieces["B"], b, (columns, rank))
            a, b = b.T.contiguous(), a.T.contiguous()
        else:
            self._check_shape(pieces["A"], a, (rank, columns))
            self._check_shape(pieces["B"], b, (rows, rank))
        scale = self._settings.scale(alpha, rank)
        largest = float(a.abs().max()) * float(b.abs().max()) * rank
        if abs(scale) * largest > _LARGEST:
            raise self._error(f"'{module}': alpha {alpha:g} makes values beyond float32 of its products")
        return LowRank(module, a, b, scale)

    def _is_table(self, module: str) -> bool:
        return module in self._base.tables

    def _tensor(self, stored: str, *, widened: bool = True) -> Tensor:
        """A tensor's values in memory of its own, in float32 or as stored: the file may be replaced meanwhile."""
        import torch

        dtype = BY_SAFETENSORS[self._file.entry(stored).dtype].name
        if dtype not in FLOAT_DTYPES:
            raise self._error(f"tensor '{stored}': expected floats, found {dtype}")
        tensor = map_tensor(self._file, stored).to(torch.float32 if widened else getattr(torch, dtype), copy=True)
        try:
            check_finite(stored, tensor)
        except CheckpointError as error:
            raise self._error(error.message.removeprefix("checkpoint: "), "train or fetch the adapter again") from error
        return tensor

    def _check_shape(self, stored: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != expected:
            raise self._error(
                f"tensor '{stored}': expected shape {list(expected)}, found {list(tensor.shape)}", self._not_this
            )

    _not_this = "check that the adapter was trained on this model"

    def _error(self, problem: str, fix: str | None = None) -> CheckpointError:
        return CheckpointError(f"adapter {self._folder}: {problem}", fix=fix)
