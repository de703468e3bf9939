"""A GGUF file as a checkpoint: HF names, HF row order, block-quantized matrices as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.demo import card_sampling
from llmctl.checkpoint.gguf_blocks import BLOCK_FORMATS, BlockFormat, SuperBlock
from llmctl.checkpoint.gguf_config import ROPE_FACTORS, hf_name, synthesise_config
from llmctl.checkpoint.gguf_families import ARCHITECTURES, EXPERT, ONE_ROW, row_of
from llmctl.checkpoint.gguf_header import GgufFile, GgufTensor
from llmctl.checkpoint.gguf_tokenizer import synthesise_aux_files
from llmctl.checkpoint.nested import NestedFloats
from llmctl.checkpoint.quant_config import QuantizationInfo
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.safetensors_io import as_tensor
from llmctl.checkpoint.tensor_info import TensorInfo
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.dtypes import COMPUTE_DTYPES, DTYPES
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

_DENSE = tuple(DTYPES[name].safetensors for name in COMPUTE_DTYPES)  # ggml calls them so, too


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: a stored one, or so many octets of it, an expert's."""

    stored: str
    shape: tuple[int, ...]
    octets: slice

    @classmethod
    def of(cls, tensor: GgufTensor, name: str, ours: str) -> Iterator[tuple[str, _Place]]:
        """Each tensor of HF's that a stored one holds, by HF's name."""
        if EXPERT not in ours:
            shape = (1, *tensor.shape) if ours.endswith(f".{ONE_ROW}.weight") else tensor.shape
            yield ours, cls(name, shape, slice(0, tensor.nbytes))
            return
        count, each = tensor.shape[0], tensor.nbytes // max(tensor.shape[0], 1)
        for e in range(count):
            yield ours.replace(EXPERT, str(e)), cls(name, tensor.shape[1:], slice(e * each, (e + 1) * each))


class GgufSource:
    """The tensors of a GGUF file under HF names."""

    def __init__(self, file: GgufFile, row: str, *, widen: bool) -> None:
        """Map names.

        Args:
            row: the file's, of ``ARCHITECTURES``.
            widen: dequantize every block to float32.

        Raises:
            UnsupportedModelError: a tensor the architecture does not have.
            CheckpointError: experts that are not matrices.
        """
        self._file = file
        self._norm_plus_one = ARCHITECTURES[row].norm_plus_one
        self._places: dict[str, _Place] = {}
        for name, tensor in file.tensors.items():
            ours = hf_name(name, row, str(file.path))
            if ours is not None:
                if EXPERT in ours and len(tensor.shape) != 3:
                    raise CheckpointError(f"{file.path}: '{name}': expected matrices, found shape {list(tensor.shape)}")
                self._places.update(_Place.of(tensor, name, ours))
        self._heads: dict[str, int] = {}
        self._widen = widen

    def unpermute(self, heads: int, kv_heads: int) -> None:
        """Read Q and K rows back into HF's order from now on."""
        self._heads = {"q_proj": heads, "k_proj": kv_heads}

    def entries(self) -> Mapping[str, TensorInfo]:
        """Every tensor, from the header."""
        return {name: self._info(place) for name, place in self._places.items()}

    def load(self, name: str) -> Tensor | QuantizedWeight:
        """One tensor: F32, F16 and BF16 as stored (mapped), matrices of ``BLOCK_FORMATS`` as codes, anything else
        dequantized to float32.

        Raises:
            UnsupportedModelError: a block format the ``gguf`` package cannot dequantize.
        """
        place = self._places[name]
        kind, raw = self._kind(place), self._file.raw(place.stored)[place.octets]
        heads = self._heads.get(name.split(".")[-2]) if self._heads else None
        if self._blocks(place) is not None:
            weight = decode(raw, place.shape, kind)
            return weight if not heads else weight.take_rows(unpermute_rows(_indices(place.shape[0]), heads))
        if kind in _DENSE:
            tensor = as_tensor(raw, kind, place.shape)
        else:
            tensor = as_tensor(self._dequantize(place, raw), "F32", place.shape)
        if self._norm_plus_one and name.endswith("norm.weight"):
            tensor = tensor - 1
        return unpermute_rows(tensor, heads) if heads else tensor

    def release(self) -> None:
        """Give back the memory of what was read."""
        self._file.release()

    def _kind(self, place: _Place) -> str:
        """ggml's name of how it is stored."""
        return self._file.tensors[place.stored].qtype.name

    def _blocks(self, place: _Place) -> BlockFormat | None:
        """The format in which a matrix is kept as codes."""
        return None if self._widen or len(place.shape) != 2 else BLOCK_FORMATS.get(self._kind(place))

    def _info(self, place: _Place) -> TensorInfo:
        blocks, nbytes = self._blocks(place), place.octets.stop - place.octets.start
        if blocks is not None:
            return TensorInfo(place.shape, blocks.scales, blocks.scheme, nbytes)
        kind = self._kind(place)
        return TensorInfo(place.shape, kind if kind in _DENSE else "F32", None, nbytes)

    def _dequantize(self, place: _Place, raw: Any) -> Any:
        from gguf.quants import dequantize

        rows, kind = raw.reshape(*place.shape[:-1], -1), self._file.tensors[place.stored].qtype
        try:
            return dequantize(rows, kind)
        except (NotImplementedError, ValueError) as error:
            raise UnsupportedModelError(
                f"{self._file.path}: tensor '{place.stored}': ggml type {kind.name} cannot be dequantized: {error}"
            ) from error


def decode(raw: NDArray[np.uint8], shape: tuple[int, ...], name: str) -> QuantizedWeight:
    """A matrix [N, K] of stored blocks of a type of ``BLOCK_FORMATS``, as codes."""
    import torch
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    codes, *floats = BLOCK_FORMATS[name].decode(raw.reshape(-1, size))
    scheme, rows = BLOCK_FORMATS[name].scheme, shape[0]
    nested = tuple(_nested(part, rows, scheme) for part in floats if isinstance(part, SuperBlock))
    plain = [torch.from_numpy(part).reshape(rows, -1) for part in floats if isinstance(part, np.ndarray)]
    scales, *minimums = [part.floats() for part in nested] or plain
    middle = 0 if scheme.minimum else 1 << (scheme.bits - 1)
    return QuantizedWeight(
        torch.from_numpy(codes).reshape(shape),
        scales,
        torch.full(scales.shape, middle, dtype=torch.uint8),
        scheme,
        minimums=minimums[0] if minimums else None,
        nested=nested or None,
    )


def _nested(part: SuperBlock, rows: int, scheme: QuantScheme) -> NestedFloats:
    import torch

    codes, supers = (torch.from_numpy(array).reshape(rows, -1) for array in (part.codes, part.super_scale))
    return NestedFloats(codes, supers, scheme.nested_zero)


def _indices(count: int) -> Tensor:
    import torch

    return torch.arange(count)


def unpermute_rows(tensor: Tensor, heads: int) -> Tensor:
    """Undo convert_hf_to_gguf.py's ``permute``: within each head, GGUF row 2i+j is HF row j*head_dim/2 + i.

    llama.cpp rotates neighbouring pairs (2i, 2i+1) where HF rotates (i, i + head_dim/2).
    """
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def permute_rows(tensor: Tensor, heads: int) -> Tensor:
    """What ``unpermute_rows`` undoes."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def open_gguf(path: Path, *, widen: bool = False) -> Checkpoint:
    """Open a GGUF file; only its header is read.

    Args:
        widen: give every tensor as floats, as a checkpoint that is not quantized.

    Raises:
        CheckpointError: damaged or truncated, or metadata missing.
        UnsupportedModelError: architecture or tensor types this version cannot read.
    """
    file = GgufFile(path)
    row = row_of(file.metadata, str(path))
    facts = ARCHITECTURES[row]
    source = GgufSource(file, row, widen=widen)
    shapes = {name: entry.shape for name, entry in source.entries().items()}
    config = synthesise_config(file.metadata, shapes, _dtype(file), _rope_factors(file), str(path))
    if facts.permuted and config["head_dim"] % 2:
        raise CheckpointError(f"{path}: expected an even width of heads, found {config['head_dim']}")
    if facts.permuted:
        source.unpermute(config["num_attention_heads"], config["num_key_value_heads"])
    aux = partial(synthesise_aux_files, file.metadata, str(path), card_sampling(path))
    return Checkpoint(path, config, source, aux=aux, files=[path], quantization=_quantization(source))


def _quantization(source: GgufSource) -> QuantizationInfo | None:
    """Settings that say what most matrices have; None for a file without blocks."""
    schemes = [entry.quant for entry in source.entries().values() if entry.quant is not None]
    return QuantizationInfo("gguf", max(dict.fromkeys(schemes), key=schemes.count)) if schemes else None


def _dtype(file: GgufFile) -> str:
    matrices = [tensor.qtype.name for tensor in file.tensors.values() if len(tensor.shape) > 1]
    if matrices and all(name == "F32" for name in matrices):
        return "float32"
    # Block formats scale by float16 numbers; bfloat16 would round their products away.
    return "bfloat16" if "BF16" in matrices else "float16"


def _rope_factors(file: GgufFile) -> dict[str, NDArray[np.float32]]:
    found = [name for name in ROPE_FACTORS if name in file.tensors]
    for name in found:
        if file.tensors[name].qtype.name != "F32":
            raise CheckpointError(f"{file.path}: {name}: expected float32 numbers")
    return {name: file.raw(name).view(np.float32) for name in found}
