"""Write a GGUF file: metadata, tokenizer, Q and K rows in llama.cpp's order, matrices as blocks.

Matrices that are not quantized keep the plan's dtype; vectors and routers are float32, as llama.cpp has them. Experts
of a layer are one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.gguf_config import gguf_name
from llmctl.checkpoint.gguf_encode import PLANE, block_type
from llmctl.checkpoint.gguf_families import ARCHITECTURES, ONE_ROW, ROUTER, ArchFacts
from llmctl.checkpoint.gguf_file import permute_rows
from llmctl.checkpoint.gguf_metadata import check_same_model, model_metadata, rope_tensors, row_of_model
from llmctl.checkpoint.gguf_tokenizer_metadata import tokenizer_metadata
from llmctl.checkpoint.output_format import describe_scheme
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
    row = row_of_model(arch)
    layout = _Layout(plan, ARCHITECTURES[row], {"q_proj": arch.heads, "k_proj": arch.kv_heads})
    parts: dict[str, dict[int | None, str]] = {}
    for name in plan.names():
        stored, expert = gguf_name(name, row, str(source.path))
        parts.setdefault(stored, {})[expert] = name
    entries: dict[str, _Entry] = {}
    for name, divisors in rope_tensors(source.config).items():
        entries[name] = _Entry("F32", divisors.shape, divisors.nbytes, partial(_octets, divisors))
    for stored, of_experts in parts.items():
        if None in of_experts:
            entries[stored] = layout.entry(stored, of_experts[None])
        else:
            entries[stored] = layout.stack(stored, [of_experts[expert] for expert in range(len(of_experts))])
    return entries


@dataclass(frozen=True)
class _Layout:
    """How an architecture's tensors lie in a file; ``heads``: of the modules whose rows may be permuted."""

    plan: OutputPlan
    facts: ArchFacts
    heads: Mapping[str, int]

    def stack(self, stored: str, names: list[str]) -> _Entry:
        """All experts of a layer's projection.

        Raises:
            ValueError: they are not alike.
        """
        made = [self.entry(stored, name) for name in names]
        for name, one in zip(names, made, strict=True):
            if (one.kind, one.shape) != (made[0].kind, made[0].shape):
                raise ValueError(
                    f"the experts of a layer are one tensor in GGUF: '{names[0]}' would be {made[0].kind} "
                    f"{list(made[0].shape)}, '{name}' {one.kind} {list(one.shape)}"
                )
        shape, nbytes = (len(made), *made[0].shape), sum(one.nbytes for one in made)
        return _Entry(made[0].kind, shape, nbytes, lambda: np.concatenate([one.make() for one in made]))

    def entry(self, stored: str, name: str) -> _Entry:
        """One tensor of HF's, by GGUF's name and its own.

        Raises:
            ValueError: as ``OutputPlan.weight``; a vector that is quantized.
        """
        module = name.removesuffix(".weight")
        heads = self.heads.get(name.split(".")[-2]) if self.facts.permuted else None
        weight = self.plan.weight(name)
        if weight is None:
            return self._dense(stored, name, heads)
        if module.endswith(f".{ONE_ROW}"):
            raise ValueError(f"'{module}': GGUF has it as a vector of floats, found {describe_scheme(weight.scheme)}")
        (spec,) = self.plan.settings.row.specs(weight).values()
        make = partial(self._blocks, name, heads)
        return _Entry(block_type(weight.scheme), weight.shape, spec_nbytes((*spec, b"")), make)

    def _blocks(self, name: str, heads: int | None) -> Array:
        import torch

        found = self.plan.weight(name)
        assert found is not None
        if heads:
            found = found.take_rows(permute_rows(torch.arange(found.shape[0]), heads))
        try:
            return _octets(self.plan.settings.row.pack(found)[PLANE])
        except ValueError as error:
            raise ValueError(f"'{name.removesuffix('.weight')}': {error}") from error

    def _dense(self, stored: str, name: str, heads: int | None) -> _Entry:
        dtype, shape, _ = self.plan.dense.spec(name)
        if name.endswith(f".{ONE_ROW}.weight"):
            shape = shape[1:]
        kind = "F32" if len(shape) == 1 or stored.endswith(f".{ROUTER}.weight") else dtype
        plus_one = self.facts.norm_plus_one and name.endswith("norm.weight")

        def make() -> Array:
            found = self.plan.dense.value(name)
            found = found.float() if kind == "F32" else found
            found = found + 1 if plus_one else found
            return _octets(permute_rows(found, heads) if heads else found)

        return _Entry(kind, tuple(shape), spec_nbytes((kind, shape, b"")), make)


def _octets(data: Tensor | Array) -> Array:
    return np.frombuffer(plane_bytes(data), np.uint8)
