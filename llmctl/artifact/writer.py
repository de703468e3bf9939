"""Write a planned engine: weights packed, kernels compiled, manifest last, the folder published atomically."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl import __version__
from llmctl.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileRecord,
    KernelFile,
    Manifest,
    SourceModel,
    manifest_to_bytes,
)
from llmctl.artifact.plan import BuildPlan, quantization_record
from llmctl.checkpoint.assemble import assemble
from llmctl.checkpoint.folder import published_folder
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.resolve import cache_dir
from llmctl.checkpoint.safetensors_io import TensorSpec, write_safetensors
from llmctl.targets.cpu.planes import pack_planes as pack_cpu_planes
from llmctl.targets.cpu.toolchain import INSTALL_HINT, VARIANTS, compile_library, library_name
from llmctl.targets.cpu.toolchain import SOURCE as CPU_SOURCE
from llmctl.targets.cpu.toolchain import SOURCE_DIR as CPU_SOURCE_DIR
from llmctl.targets.cuda.compile import PTX_FALLBACK, compile_modules, source_hash
from llmctl.targets.cuda.planes import cuda_formats
from llmctl.targets.cuda.planes import pack_planes as pack_cuda_planes
from llmctl.targets.cuda.registry import sources_of
from llmctl.targets.device import usable_cores
from llmctl.targets.planes import DTYPE_BYTES, SAFETENSORS_DTYPE, Plane, total_bytes

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, int, int], None]
"""Called as weights are written: (weight, bytes done, bytes in all)."""

_CACHE_LINE = 64  # bytes; mapped weights are read in whole lines
MAX_SHARD_BYTES = 2**30
"""Size of a weight file. The packed planes of one file are in memory at the same time: those of all its weights for the
native CPU kernels, of the quantized ones for other targets."""

_MOST_PACKERS = 8  # threads; each holds a weight of the checkpoint beside its planes


def write_engine(plan: BuildPlan, output: Path, progress: Progress | None = None) -> None:
    """Write the planned engine at ``output``, replacing an engine that is there."""
    # Compiled first: a kernel that does not compile is found before the weights are written.
    kernels = _cpu_kernels(plan) if plan.target.kind == "cpu" else _cuda_kernels(plan)
    with ThreadPoolExecutor(1) as hasher, published_folder(output) as folder:
        fingerprint = hasher.submit(plan.checkpoint.fingerprint)
        weight_files = _write_weights(plan, folder, progress or _quiet)
        _write_aux(plan, folder)
        kernel_files = _write_kernels(folder, kernels)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            llmctl_version=__version__,
            source=SourceModel(plan.name, fingerprint.result()),
            target=plan.target,
            options=plan.options,
            quantization=quantization_record(plan.graph, plan.checkpoint),
            graph=plan.graph,
            kernel_sources=_kernel_sources(plan),
            kernel_files=kernel_files,
            kernels=plan.choices,
            weight_files=weight_files,
            files=_records(folder),
        )
        (folder / MANIFEST_NAME).write_bytes(manifest_to_bytes(manifest))


def _cuda_kernels(plan: BuildPlan) -> list[tuple[str, bytes, KernelFile]]:
    """Per source file one cubin for each architecture, and PTX for the oldest: (file name, content, record)."""
    archs = (*plan.target.archs, PTX_FALLBACK) if plan.target.archs else ()
    modules = compile_modules(sources_of(plan.choices), archs, cache=cache_dir() / "kernels")
    return [(m.filename, m.code, KernelFile(m.arch, m.compiler, m.flags, (m.source,), m.resources)) for m in modules]


def _cpu_kernels(plan: BuildPlan) -> list[tuple[str, bytes, KernelFile]]:
    """One shared library per variant."""
    if not plan.target.archs:
        print(
            f"warning: no C++ compiler found: the engine will run on torch, many times slower; {INSTALL_HINT}",
            file=sys.stderr,
        )
    variants = [v for v in VARIANTS if library_name(v) in plan.target.archs]
    cache = cache_dir() / "kernels"
    with ThreadPoolExecutor() as pool:
        libraries = pool.map(lambda variant: compile_library(variant, cache=cache), variants)
    return [
        (lib.filename, lib.code, KernelFile(library_name(lib.variant), lib.compiler, lib.flags, (CPU_SOURCE,), ()))
        for lib in libraries
    ]


def _kernel_sources(plan: BuildPlan) -> dict[str, str]:
    if plan.target.native_cpu:
        return {CPU_SOURCE: source_hash(CPU_SOURCE, CPU_SOURCE_DIR)}
    return {name: source_hash(name) for name in sources_of(plan.choices)}


def _write_kernels(folder: Path, kernels: Iterable[tuple[str, bytes, KernelFile]]) -> dict[str, KernelFile]:
    written: dict[str, KernelFile] = {}
    for filename, code, record in kernels:
        name = f"kernels/{filename}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(code)
        written[name] = record
    return written


def _write_aux(plan: BuildPlan, folder: Path) -> None:
    for name, content in sorted(plan.checkpoint.aux_files().items()):
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


def _records(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file in the folder."""
    records: dict[str, FileRecord] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records[path.relative_to(folder).as_posix()] = FileRecord(path.stat().st_size, digest)
    return records


def _write_weights(plan: BuildPlan, folder: Path, progress: Progress) -> tuple[str, ...]:
    shards = list(_shards(plan.planes))
    names = tuple(f"weights-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1))
    writer = _WeightWriter(plan, progress)
    for name, weights in zip(names, shards, strict=True):
        write_safetensors(folder / name, writer.tensors(weights), align=_CACHE_LINE)
    return names


def _shards(planes: Mapping[str, tuple[Plane, ...]]) -> Iterator[list[str]]:
    """Weight names in graph order, cut into files of at most ``MAX_SHARD_BYTES`` (or one weight)."""
    shard: list[str] = []
    filled = 0
    for weight, parts in planes.items():
        size = total_bytes(parts)
        if shard and filled + size > MAX_SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(weight)
        filled += size
    if shard:
        yield shard


class _WeightWriter:
    """Turns graph weights into tensors to write: packed at once, but for dense weights of other targets than the native
    CPU kernels, each of which is read when its turn comes."""

    def __init__(self, plan: BuildPlan, progress: Progress) -> None:
        self.plan = plan
        self.progress = progress
        self.formats = cuda_formats(plan.graph) if plan.target.kind == "cuda" else {}
        self.total = plan.weights_bytes
        self.done = 0

    def tensors(self, names: Sequence[str]) -> dict[str, TensorSpec]:
        """What to write for some weights; all that is packed is in memory together when it returns."""
        found: dict[str, TensorSpec] = {}
        # Packing is numpy's and torch's work, which other threads need not wait for.
        with ThreadPoolExecutor(min(_MOST_PACKERS, usable_cores())) as pool:
            for name, specs in zip(names, pool.map(self._specs, names), strict=True):
                found |= specs
                if not any(callable(content) for *_, content in specs.values()):
                    self._report(name, total_bytes(self.plan.planes[name]))
        return found

    def _specs(self, name: str) -> dict[str, TensorSpec]:
        planes = self.plan.planes[name]
        if self.plan.target.native_cpu:
            arrays = pack_cpu_planes(self._assemble(name), name, self.plan.graph, self.plan.options)
            return {p.name: (p.dtype, p.shape, arrays[p.name]) for p in planes}
        if self.plan.graph.weights[name].quant is None:
            plane = planes[0]
            return {plane.name: (plane.dtype, plane.shape, lambda: self._dense(name, plane))}
        if name in self.formats:
            arrays = pack_cuda_planes(self._assemble(name), self.formats[name])
        else:
            arrays = pack_planes(self._assemble(name), {p.name.rpartition(".")[2]: p.dtype for p in planes})
        return {p.name: (p.dtype, p.shape, arrays[p.name.rpartition(".")[2]]) for p in planes}

    def _dense(self, name: str, plane: Plane) -> Tensor:
        import torch

        tensor = self._assemble(name)
        assert isinstance(tensor, torch.Tensor)
        dtype = next(d for d in DTYPE_BYTES if SAFETENSORS_DTYPE[d] == plane.dtype)
        self._report(name, plane.nbytes)
        return tensor.to(getattr(torch, dtype))

    def _assemble(self, name: str) -> Any:
        return assemble(self.plan.graph.weights[name], self.plan.checkpoint)

    def _report(self, name: str, size: int) -> None:
        self.done += size
        self.progress(name, self.done, self.total)


def pack_planes(weight: QuantizedWeight, dtypes: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """A quantized weight's planes as they are stored (see ``targets.planes``), by suffix.

    Args:
        dtypes: suffix -> safetensors dtype of the planes wanted.
    """
    codes = weight.codes.contiguous().numpy()
    planes: dict[str, NDArray[Any]] = {
        "codes": codes if weight.scheme.bits == 8 else pack_nibbles(codes),
        "scales": weight.scales.contiguous().numpy().astype(np.float16 if dtypes["scales"] == "F16" else np.float32),
        "zeros": weight.zeros.contiguous().numpy(),
    }
    if weight.g_idx is not None:
        planes["g_idx"] = weight.g_idx.contiguous().numpy()
    return {suffix: planes[suffix] for suffix in dtypes}


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes 0..15 [N, K] -> two a byte [N, ceil(K/2)], the low nibble the even column."""
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return np.bitwise_or(codes[:, 0::2], np.left_shift(codes[:, 1::2], 4), dtype=np.uint8)


def _quiet(_name: str, _done: int, _total: int) -> None:
    pass
