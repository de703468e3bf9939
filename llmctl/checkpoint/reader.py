"""A checkpoint's weights (dense, AWQ, GPTQ) over whatever stores them; safetensors shards are one such source.

Names are Hugging Face's. A module ``X`` that has ``X.qweight`` appears as one weight ``X.weight`` of shape [N, K]; its
planes are not listed. Dense tensors appear as they are stored (GPT-2's Conv1D weights are [in, out]). Names are the
full causal model's, whatever the checkpoint was saved from (``tensor_names.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmctl.checkpoint.quant_config import QuantizationInfo, infer_scheme
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.safetensors_io import SafetensorsFile, map_tensor
from llmctl.checkpoint.tensor_names import full_names
from llmctl.errors import CheckpointError
from llmctl.graph.dtypes import BY_SAFETENSORS, FLOAT_DTYPES
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

_PLANES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class TensorInfo:
    """A weight as headers describe it.

    Attributes:
        shape: as ``Checkpoint.weight`` returns it; (N, K) for a quantized weight.
        dtype: safetensors dtype string of the dense tensor that ``weight`` returns, or of the scales.
        quant: how the weight is quantized, None for a dense one.
        nbytes: size in the checkpoint, bytes; of all planes for a quantized weight.
    """

    shape: tuple[int, ...]
    dtype: str
    quant: QuantScheme | None
    nbytes: int


class TensorSource(Protocol):
    """Where a checkpoint's stored tensors come from; names are Hugging Face's."""

    def entries(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor, from headers only."""
        ...

    def load(self, name: str) -> Tensor:
        """One tensor, mapped where that is possible."""
        ...


class SafetensorsSource:
    """The shards of a Hugging Face folder; ``outside``: tensors that are not of the text model."""

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
        self._where = {name: (files[stored], stored) for name, stored in names.stored.items()}

    def entries(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor."""
        found = ((name, file.entry(stored)) for name, (file, stored) in self._where.items())
        return {name: TensorInfo(entry.shape, entry.dtype, None, entry.nbytes) for name, entry in found}

    def load(self, name: str) -> Tensor:
        """One tensor over the mapping."""
        file, stored = self._where[name]
        return map_tensor(file, stored)


class Checkpoint:
    """A checkpoint opened for reading. Made by ``open_checkpoint``.

    Attributes:
        path: the folder or file.
        config: ``config.json`` as a dict, or what stands for it.
        quantization: the checkpoint's quantization settings, None for a dense one.
        outside: names of tensors that belong to the other parts of a multimodal model.
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
        outside: frozenset[str] = frozenset(),
    ) -> None:
        self.path = path
        self.config = config
        self.quantization = quantization
        self.outside = outside
        self._source = source
        self._aux = aux
        self._files = sorted(set(files))
        self._stored = dict(source.entries())
        self._modules = {name.removesuffix(".qweight") for name in self._stored if name.endswith(".qweight")}
        self._described: dict[str, TensorInfo] = {}
        if self._modules and quantization is None:
            raise CheckpointError(f"{path}: '{min(self._modules)}' is quantized, but no quantization_config says how")
        twice = sorted(module for module in self._modules if f"{module}.weight" in self._stored)
        if twice:
            raise CheckpointError(f"{path}: '{twice[0]}' has both a weight and a qweight")

    def names(self) -> list[str]:
        """All weight names, sorted; a quantized module's planes appear as its one ``.weight``."""
        planes = {f"{module}.{suffix}" for module in self._modules for suffix in _PLANES}
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
        assert self.quantization is not None
        scheme = self.describe(name).quant
        assert scheme is not None
        planes = {suffix: self._source.load(f"{module}.{suffix}") for suffix in self._planes(module)}
        try:
            return self._unpack(planes, scheme)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: '{module}': {error}") from error

    @property
    def dtype(self) -> str:
        """The dtype the checkpoint was made for, as config.json names it ("bfloat16", "float16", "float32")."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
        stored = (BY_SAFETENSORS[self._stored[name].dtype].name for name in sorted(self._stored))
        return next((dtype for dtype in stored if dtype in FLOAT_DTYPES), "float32")

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
        for path in self._files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.name}\0{path.stat().st_size}\0{digest}\n".encode())
        return total.hexdigest()

    def _module(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if module != name and module in self._modules else None

    def _planes(self, module: str) -> list[str]:
        return [suffix for suffix in _PLANES if f"{module}.{suffix}" in self._stored]

    def _entry(self, name: str) -> TensorInfo:
        try:
            return self._stored[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor '{name}'") from None

    def _describe_quantized(self, module: str) -> TensorInfo:
        assert self.quantization is not None
        planes = {suffix: self._stored[f"{module}.{suffix}"] for suffix in self._planes(module)}
        try:
            scheme, shape = infer_scheme(self.quantization, {suffix: plane.shape for suffix, plane in planes.items()})
            scheme = replace(scheme, act_order=self._has_act_order(module, scheme, shape[1]))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: '{module}': {error}") from error
        return TensorInfo(shape, planes["scales"].dtype, scheme, sum(plane.nbytes for plane in planes.values()))

    def _has_act_order(self, module: str, scheme: QuantScheme, columns: int) -> bool:
        if f"{module}.g_idx" not in self._stored:
            return False
        from llmctl.checkpoint.gptq import effective_g_idx

        return effective_g_idx(self._source.load(f"{module}.g_idx"), columns, scheme) is not None

    def _unpack(self, planes: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        from llmctl.checkpoint import awq, gptq

        assert self.quantization is not None
        if self.quantization.method == "awq":
            return awq.unpack(planes, scheme.group_size, symmetric=scheme.symmetric)
        return gptq.unpack(planes, scheme, self.quantization.checkpoint_format)
