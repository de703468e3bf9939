"""Write a GGUF file: metadata, tokenizer, Q and K rows in llama.cpp's order, matrices as blocks.

Matrices that are not quantized keep the plan's dtype; vectors are float32, as llama.cpp has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.gguf_config import ROPE_FREQS, gguf_name
from llmctl.checkpoint.gguf_encode import PLANE, block_type
from llmctl.checkpoint.gguf_families import ARCHITECTURES
from llmctl.checkpoint.gguf_file import permute_rows
from llmctl.checkpoint.gguf_metadata import architecture, check_same_model, model_metadata, rope_factors
from llmctl.checkpoint.gguf_tokenizer_metadata import tokenizer_metadata
from llmctl.checkpoint.output_plan import OutputPlan
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.safetensors_io import plane_bytes, spec_nbytes
from llmctl.graph.hf_config import read_arch

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]


@dataclass(frozen=True)
class _Entry:
    """One tensor: ggml's name of its type, its logical shape, its bytes, and what makes them."""

    kind: str
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], Array]


def file_metadata(source: Checkpoint) -> dict[str, Any]:
    """Everything a file says beside its tensors.

    Raises:
        UsageError: a model or tokenizer that GGUF is not written for.
    """
    model, where = model_metadata(source.config), str(source.path)
    check_same_model(source.config, model, {name: source.describe(name).shape for name in source.names()}, where)
    rows = source.describe("model.embed_tokens.weight").shape[0]
    return {**model, **tokenizer_metadata(source.aux_files(), rows, where)}


def write_gguf(path: Path, source: Checkpoint, plan: OutputPlan) -> None:
    """Write ``path``, a new file, one tensor in memory at a time.

    Raises:
        UsageError: as ``file_metadata``.
        ValueError: a weight that no block type holds.
        CheckpointError: as ``OutputPlan.dense``.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    metadata = file_metadata(source)
    entries = _entries(source, plan)
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer's own
            _add(writer, key, value)
    for name, entry in entries.items():
        kind = GGMLQuantizationType[entry.kind]
        # Of bytes the writer wants to know how many a row has.
        shape = (*entry.shape[:-1], entry.nbytes * entry.shape[-1] // int(np.prod(entry.shape)))
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), entry.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries.values():
            writer.write_tensor_data(entry.make())
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    kinds: Mapping[type, Any] = {
        **{bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32},
        **{str: writer.add_string, list: writer.add_array},
    }
    kinds[type(value)](key, value)


def _entries(source: Checkpoint, plan: OutputPlan) -> dict[str, _Entry]:
    arch = read_arch(source.config)
    name_there = architecture(arch)
    heads = {"q_proj": arch.heads, "k_proj": arch.kv_heads} if ARCHITECTURES[name_there].permuted else {}
    entries: dict[str, _Entry] = {}
    factors = rope_factors(source.config)
    if factors is not None:
        entries[ROPE_FREQS] = _Entry("F32", factors.shape, factors.nbytes, lambda: _octets(factors))
    for name in plan.names():
        count = heads.get(name.split(".")[-2])
        entries[gguf_name(name, name_there, str(source.path))] = _entry(plan, name, count)
    return entries


def _entry(plan: OutputPlan, name: str, heads: int | None) -> _Entry:
    import torch

    weight = plan.weight(name)
    if weight is not None:
        (spec,) = plan.settings.row.specs(weight).values()

        def blocks() -> Array:
            found = plan.weight(name)
            assert found is not None
            if heads:
                found = found.take_rows(permute_rows(torch.arange(found.shape[0]), heads))
            try:
                return _octets(plan.settings.row.pack(found)[PLANE])
            except ValueError as error:
                raise ValueError(f"'{name.removesuffix('.weight')}': {error}") from error

        return _Entry(block_type(weight.scheme), weight.shape, spec_nbytes((*spec, b"")), blocks)
    dtype, shape, _ = plan.dense.spec(name)
    kind = "F32" if len(shape) == 1 else dtype

    def dense() -> Array:
        found = plan.dense.value(name)
        found = found.float() if kind == "F32" else found
        return _octets(permute_rows(found, heads) if heads else found)

    return _Entry(kind, tuple(shape), spec_nbytes((kind, shape, b"")), dense)


def _octets(data: Tensor | Array) -> Array:
    return np.frombuffer(plane_bytes(data), np.uint8)
