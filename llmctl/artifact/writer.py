"""Write a planned engine: weights packed, kernels compiled, manifest last, the folder published atomically."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from llmctl import __version__
from llmctl.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    SourceModel,
    manifest_to_bytes,
)
from llmctl.artifact.plan import BuildPlan, quantization_record
from llmctl.checkpoint.assemble import assemble
from llmctl.checkpoint.folder import published_folder
from llmctl.checkpoint.resolve import cache_dir
from llmctl.checkpoint.safetensors_io import TensorSpec, write_safetensors
from llmctl.targets.address_space import check_torch
from llmctl.targets.base import CompileProgress, KernelFile, Module
from llmctl.targets.machine import usable_cores
from llmctl.targets.planes import PlanesByWeight, total_bytes

Progress = Callable[[str, int, int], None]
"""Called as weights are written: (weight, bytes done, bytes in all)."""

_CACHE_LINE = 64  # bytes; mapped weights are read in whole lines
MAX_SHARD_BYTES = 2**30
"""Size of a weight file. What a target packs of one file is in memory at the same time."""

_MOST_PACKERS = 8  # threads; each holds a weight of the checkpoint beside its planes


def write_engine(
    plan: BuildPlan, output: Path, progress: Progress | None = None, compiling: CompileProgress | None = None
) -> None:
    """Write the planned engine at ``output``, replacing an engine that is there.

    Args:
        progress: told after each weight. compiling: told after each kernel module.

    Raises:
        CompileError: a kernel does not compile, or its module does not load.
        HostMemoryError: no address space for torch, which packs.
    """
    check_torch("building an engine")
    # Compiled first: a kernel that does not compile is found before the weights are written.
    modules = plan.target.compile(plan.choices, cache_dir() / "kernels", compiling)
    with ThreadPoolExecutor(1) as hasher, published_folder(output) as folder:
        kernel_files = _write_kernels(folder, modules)
        plan.target.try_modules([folder / name for name in kernel_files])
        fingerprint = hasher.submit(plan.checkpoint.fingerprint)
        weight_files = _write_weights(plan, folder, progress or _quiet)
        _write_aux(plan, folder)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            llmctl_version=__version__,
            source=SourceModel(plan.name, fingerprint.result(), plan.as_family),
            target=plan.target.name,
            options=plan.options,
            quantization=quantization_record(plan.graph, plan.checkpoint),
            graph=plan.graph,
            kernel_sources=plan.target.source_hashes(plan.choices),
            kernel_files=kernel_files,
            kernels=plan.choices,
            weight_files=weight_files,
            files=_records(folder),
        )
        (folder / MANIFEST_NAME).write_bytes(manifest_to_bytes(manifest))


def _write_kernels(folder: Path, modules: Iterable[Module]) -> dict[str, KernelFile]:
    written: dict[str, KernelFile] = {}
    for module in modules:
        name = f"kernels/{module.path}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(module.code)
        written[name] = module.record
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


def _shards(planes: PlanesByWeight) -> Iterator[list[str]]:
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
    """Turns graph weights into tensors to write: packed at once, or made when their turn comes, as the target says."""

    def __init__(self, plan: BuildPlan, progress: Progress) -> None:
        self.plan = plan
        self.progress = progress
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
        plan, planes = self.plan, self.plan.planes[name]
        read = partial(assemble, plan.graph.weights[name], plan.checkpoint, plan.options.dtype)
        contents = plan.target.pack(name, read, planes, plan.graph, plan.options)
        specs = {}
        for plane in planes:
            content = contents[plane.name]
            if callable(content):
                content = self._reporting(content, name, plane.nbytes)
            specs[plane.name] = (plane.dtype, plane.shape, content)
        return specs

    def _reporting(self, make: Callable[[], Any], name: str, size: int) -> Callable[[], Any]:
        def made() -> Any:
            content = make()
            self._report(name, size)
            return content

        return made

    def _report(self, name: str, size: int) -> None:
        self.done += size
        self.progress(name, self.done, self.total)


def _quiet(_name: str, _done: int, _total: int) -> None:
    pass
