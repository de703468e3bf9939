"""A checkpoint's weights, dense and quantized, over whatever stores them; safetensors shards are one such source.

Names are Hugging Face's. A quantized module ``X`` appears as one weight ``X.weight`` of shape [N, K]; its planes are
not listed. Dense tensors appear as they are stored (GPT-2's Conv1D weights are [in, out]). Names are the full causal
model's, whatever the checkpoint was saved from (``tensor_names.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmctl.checkpoint.expert_tensors import ExpertSlice, expert_slices
from llmctl.checkpoint.layout import Layout, check_dtypes, find_modules
from llmctl.checkpoint.quant_config import QuantizationInfo
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.safetensors_io import SafetensorsFile, map_tensor
from llmctl.checkpoint.tensor_info import TensorInfo
from llmctl.checkpoint.tensor_names import full_names
from llmctl.errors import CheckpointError
from llmctl.graph.dtypes import BY_SAFETENSORS, FLOAT_DTYPES

if TYPE_CHECKING:
    from torch import Tensor


class TensorSource(Protocol):
    """Where a checkpoint's stored tensors come from; names are Hugging Face's."""

    def entries(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor, from headers only."""
        ...

    def load(self, name: str) -> Tensor | QuantizedWeight:
        """One tensor, mapped where that is possible; a ``QuantizedWeight`` where ``entries`` gives a scheme."""
        ...

    def release(self) -> None:
        """Give back the memory of what is mapped."""
        ...


class SafetensorsSource:
    """The shards of a Hugging Face folder, tensors of all experts cut into one an expert and projection.

    Attributes:
        outside: tensors that are not of the text model.
    """

    def __init__(self, paths: Iterable[Path], base: str, *, multimodal: bool = False) -> None:
        """Map every shard.

        Args:
            base, multimodal: as ``tensor_names.full_names`` takes them.

        Raises:
            CheckpointError: a damaged shard, a tensor in two shards, or two tensors of one name.
        """
        files: dict[str, SafetensorsFile] = {}
        for path in paths:
            file = SafetensorsFile(path)
            for name in file.tensors:
                if name in files:
                    raise CheckpointError(f"{path}: tensor '{name}' is also in {files[name].path.name}")
                files[name] = file
        names = full_names(files, base, multimodal=multimodal)
        self.outside = names.outside
        self._where: dict[str, tuple[SafetensorsFile, str]] = {}
        self._slices: dict[str, ExpertSlice] = {}
        for name, stored in names.stored.items():
            slices = {piece.name: piece for piece in expert_slices(name, files[stored].entry(stored).shape)}
            for own in slices or (name,):
                if own in self._where:
                    raise CheckpointError(f"{files[stored].path}: '{stored}' holds '{own}', which is stored besides")
                self._where[own] = (files[stored], stored)
            self._slices |= slices

    def entries(self) -> Mapping[str, TensorInfo]:
        """Every tensor."""
        found = {}
        for name, (file, stored) in self._where.items():
            e, piece = file.entry(stored), self._slices.get(name)
            shape, nbytes = e.shape, e.nbytes
            if piece is not None:
                rows = piece.rows[1] - piece.rows[0]
                nbytes = nbytes // (shape[0] * shape[1]) * rows
                shape = (rows, shape[2])
            found[name] = TensorInfo(shape, e.dtype, None, nbytes, stored)
        return found

    def load(self, name: str) -> Tensor:
        """One tensor over the mapping."""
        file, stored = self._where[name]
        whole, piece = map_tensor(file, stored), self._slices.get(name)
        return whole if piece is None else whole[piece.expert, slice(*piece.rows)]

    def release(self) -> None:
        """Of every shard."""
        for file in {id(file): file for file, _ in self._where.values()}.values():
            file.release()


class Checkpoint:
    """A checkpoint opened for reading. Made by ``open_checkpoint``.

    Attributes:
        path: the folder or file.
        config: ``config.json`` as a dict, or what stands for it.
        quantization: the checkpoint's quantization settings, None for a dense one.
        outside: names of tensors that belong to the other parts of a multimodal model.
        files: all that it is read from.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        source: TensorSource,
        *,
        aux: Callable[[], Mapping[str, Path | bytes]],
        files: Iterable[Path],
        quantization: QuantizationInfo | None = None,
        layout: Layout | None = None,
        outside: frozenset[str] = frozenset(),
    ) -> None:
        self.path = path
        self.config = config
        self.quantization = quantization
        self.outside = outside
        self._source = source
        self._aux = aux
        self.files = tuple(sorted(set(files)))
        self._stored = dict(source.entries())
        self._layout = layout
        self._described: dict[str, TensorInfo] = {}
        inside = {name: entry for name, entry in self._stored.items() if name not in outside}
        try:
            self._modules = layout.modules(inside) if layout else find_modules(inside, "qweight", ())
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if self._modules and layout is None:
            raise CheckpointError(f"{path}: '{min(self._modules)}' is quantized, but no quantization_config says how")
        twice = sorted(m for m, planes in self._modules.items() if "weight" not in planes and f"{m}.weight" in inside)
        if twice:
            raise CheckpointError(f"{path}: '{twice[0]}' has both a weight and a {self._modules[twice[0]][0]}")

    def over(self, source: TensorSource, config: dict[str, Any], files: Iterable[Path] = ()) -> Checkpoint:
        """This checkpoint with other tensors and config, read from ``files`` besides.

        Which of them are quantized is for ``source`` to say.
        """
        return Checkpoint(self.path, config, source, aux=self._aux, files=[*self.files, *files], outside=self.outside)

    def names(self) -> list[str]:
        """All weight names, sorted; a quantized module's planes appear as its one ``.weight``."""
        planes = {f"{module}.{suffix}" for module, suffixes in self._modules.items() for suffix in suffixes}
        dense = (name for name in self._stored if name not in planes)
        return sorted([*dense, *(f"{module}.weight" for module in self._modules)])

    def has(self, name: str) -> bool:
        """Whether ``weight(name)`` would find something."""
        return self._module(name) is not None or name in self._stored

    def describe(self, name: str) -> TensorInfo:
        """Shape, dtype, quantization and size of a weight, from headers (and GPTQ's small ``g_idx`` tables) alone.

        Raises:
            CheckpointError: no such weight, or planes that contradict one another.
        """
        if name not in self._described:
            module = self._module(name)
            self._described[name] = self._entry(name) if module is None else self._describe_quantized(module)
        return self._described[name]

    def weight(self, name: str) -> Tensor | QuantizedWeight:
        """A weight: a dense tensor (mapped where possible; treat it as read-only) or a ``QuantizedWeight`` [N, K].

        Raises:
            CheckpointError: no such weight, or a damaged one.
        """
        module = self._module(name)
        if module is None:
            self._entry(name)
            return self._source.load(name)
        scheme = self.describe(name).quant
        assert self._layout is not None
        assert scheme is not None
        planes = {suffix: self._plane(module, suffix) for suffix in self._modules[module]}
        try:
            return self._layout.unpack(module, planes, scheme)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: '{module}': {error}") from error

    def release(self) -> None:
        """Give back the memory of mapped files, which counts as this process's from when they are read on.

        Tensors over them stay valid, and are read from the files again.
        """
        self._source.release()

    @property
    def dtype(self) -> str:
        """The dtype the checkpoint was made for, as config.json names it ("bfloat16", "float16", "float32")."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
        stored = (BY_SAFETENSORS[self._stored[name].dtype].name for name in sorted(self._stored))
        return next((dtype for dtype in stored if dtype in FLOAT_DTYPES), "float32")

    @property
    def config_with_dtype(self) -> dict[str, Any]:
        """``config`` naming ``dtype``: for a checkpoint made of this one with tensors in another."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        return self.config if named else {**self.config, "dtype": self.dtype}

    @property
    def nbytes(self) -> int:
        """Size of all stored tensors, bytes."""
        return sum(entry.nbytes for entry in self._stored.values())

    def aux_files(self) -> dict[str, Path | bytes]:
        """Files to carry over to anything made from this checkpoint: tokenizer, chat template, generation config.

        Raises:
            CheckpointError: a tokenizer that cannot be expressed as tokenizer.json.
        """
        return dict(self._aux())

    def fingerprint(self) -> str:
        """sha256 (hex) over the names, sizes and contents of every file that belongs to the checkpoint."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        total = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.name}\0{path.stat().st_size}\0{digest}\n".encode())
        return total.hexdigest()

    def _module(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if module != name and module in self._modules else None

    def _plane(self, module: str, suffix: str) -> Tensor:
        found = self._source.load(f"{module}.{suffix}")
        assert not isinstance(found, QuantizedWeight)
        return found

    def _entry(self, name: str) -> TensorInfo:
        try:
            return self._stored[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor '{name}'") from None

    def _describe_quantized(self, module: str) -> TensorInfo:
        assert self._layout is not None
        planes = {suffix: self._stored[f"{module}.{suffix}"] for suffix in self._modules[module]}
        try:
            check_dtypes(planes)
            return self._layout.describe(module, planes, lambda suffix: self._plane(module, suffix))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: '{module}': {error}") from error
