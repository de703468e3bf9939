"""Open an engine folder: every check first, in a fixed order, then memory-mapped weights. Imports no torch.

Order: format version -> files and sizes (sha256 with ``verify``) -> CPU features, or compute capability and driver, ABI
-> kernel sources and hashes -> every tensor's shape and dtype against the graph -> requested limits against built
limits -> memory estimate. Nothing is mapped or allocated before the last check has passed.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from llmctl import __version__
from llmctl.artifact.fit import advice
from llmctl.artifact.manifest import MANIFEST_NAME, Manifest, ManifestError, manifest_from_bytes, source_argument
from llmctl.artifact.memory import MemoryPlan, Sizing, human_bytes
from llmctl.artifact.request import EngineRequest
from llmctl.checkpoint.safetensors_io import SafetensorsFile, TensorEntry, read_header
from llmctl.config import GPU_MEMORY_UTILIZATION, BuildConfig
from llmctl.errors import (
    CheckpointError,
    CompileError,
    EngineLoadError,
    EngineOptionError,
    ModelNotFoundError,
    UsageError,
)
from llmctl.graph.graph import Graph
from llmctl.targets.base import FALLBACK, BuildOptions, KernelChoice, RuntimeSizes, Target
from llmctl.targets.planes import Plane, WeightPlane, flat
from llmctl.targets.table import parse_target, target_of


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that passed every check; a ``targets.base.RuntimeEngine``.

    Attributes:
        weights: planes by name. plan: its memory, KV blocks included. request: the limits it was asked for.
    """

    path: Path
    manifest: Manifest
    weights: Mapping[str, WeightPlane]
    plan: MemoryPlan
    request: EngineRequest

    @property
    def target(self) -> Target:
        """The target it was built for."""
        return target_of(self.manifest.target)

    @property
    def graph(self) -> Graph:
        """The operator graph."""
        return self.manifest.graph

    @property
    def options(self) -> BuildOptions:
        """What it was built for, with the KV cache of the run."""
        return run_options(self.manifest.options, self.request)

    @property
    def sizes(self) -> RuntimeSizes:
        """What its runtime is sized for."""
        plan, request, limits = self.plan, self.request, self.request.step_limits(self.target)
        share = request.gpu_memory_utilization
        return RuntimeSizes(
            plan.num_blocks,
            plan.block_size,
            plan.max_model_len,
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
            bool(request.enforce_eager),
            GPU_MEMORY_UTILIZATION if share is None else share,
            request.lora,
            plan.kv.groups,
        )

    @property
    def sizing(self) -> Sizing:
        """What its memory plan was made of."""
        planes = tuple(Plane(name, plane.shape, (plane.dtype,)) for name, plane in self.weights.items())
        return Sizing(self.graph, self.options, self.target, self.request, planes)


def run_options(built: BuildOptions, request: EngineRequest) -> BuildOptions:
    """What an engine runs with: as built, but for what the kernels leave open until then."""
    asked = request.kv_cache_dtype
    return built if asked is None else replace(built, kv_cache_dtype=asked)


def is_engine(path: Path) -> bool:
    """Whether ``path`` is an engine folder (it may still be a damaged one)."""
    return (path / MANIFEST_NAME).is_file()


def check_no_family(engine: str, as_family: str) -> None:
    """Refuse ``--as`` where there is only an engine, whose graph is settled.

    Raises:
        UsageError: a family is given.
    """
    if as_family:
        raise UsageError(f"--as {as_family}: {engine} is an engine", fix="leave --as out", param="as_family")


def load_engine(
    path: Path, request: EngineRequest = EngineRequest(), *, verify: bool = False, kernels: bool = True
) -> LoadedEngine:
    """Open an engine folder.

    Args:
        request: the limits of the run. verify: check the sha256 of every file, not only its size.
        kernels: hold the engine's modules against machine and version; False for who brings modules of his own.

    Raises:
        ModelNotFoundError: ``path`` is not an engine folder.
        EngineLoadError: a check failed; the message says what was expected and found, ``fix`` the command to run.
        UsageError: ``request.target`` is no target or does not run here, or the engine's target does not have an option
            of the run.
    """
    checks = EngineChecks(path, read_manifest(path))
    checks.files(verify)
    if kernels:
        checks.machine()
        checks.kernels()
    checks.tensors()
    plan = checks.memory(checks.limits(request))
    return LoadedEngine(path, checks.manifest, _map_weights(path, checks.manifest), plan, request)


def read_manifest(path: Path) -> Manifest:
    """The manifest of an engine folder, checked in itself only (format version, keys, checksum).

    Raises:
        ModelNotFoundError: no ``engine.json`` there.
        EngineLoadError: damaged, of another format version, or in a folder that is a checkpoint as well.
    """
    try:
        raw = (path / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(f"{path}: not an llmctl engine: no {MANIFEST_NAME}") from None
    except OSError as error:
        raise EngineLoadError(f"{path / MANIFEST_NAME}: cannot be read: {error.strerror or error}") from error
    if (path / "config.json").exists():  # whoever opens a checkpoint does not expect to run native code
        raise EngineLoadError(
            f"{path}: expected an engine or a checkpoint, found both: {MANIFEST_NAME} and config.json",
            fix="keep the two in folders of their own; an engine is native code: open only what you or your team built",
        )
    try:
        return manifest_from_bytes(raw)
    except ManifestError as error:
        raise EngineLoadError(f"{path / MANIFEST_NAME}: {error}", fix=_salvaged_command(raw, path)) from error


class EngineChecks:
    """The checks of one engine folder, one method each; every one raises EngineLoadError or passes."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.target = target_of(manifest.target)

    def refuse(self, field: str, expected: object, found: object, **changes: Any) -> NoReturn:
        """Raise: ``field`` was not as expected; ``changes`` are the build options that mend it."""
        self._refuse(EngineLoadError, field, expected, found, changes)

    def refuse_option(self, field: str, expected: object, found: object, **changes: Any) -> NoReturn:
        """The same of what was asked for."""
        self._refuse(EngineOptionError, field, expected, found, changes)

    def _refuse(
        self, kind: type[EngineLoadError], field: str, expected: object, found: object, changes: dict[str, Any]
    ) -> NoReturn:
        fix = self.manifest.rebuild_command(str(self.path), **changes)
        raise kind(f"{self.path}: {field}: expected {expected}, found {found}", fix=fix)

    def files(self, verify: bool) -> None:
        """Every file that is used is recorded; every recorded one is there, of its size (with ``verify``, content)."""
        manifest = self.manifest
        for name, record in manifest.files.items():
            file = self.path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                self.refuse(f"files.{name}", "a path inside the engine folder", "one outside it")
            if not file.is_file():
                self.refuse(name, f"a file of {record.size} bytes", "no file")
            size = file.stat().st_size
            if size != record.size:
                self.refuse(name, f"{record.size} bytes", f"{size} bytes")
            if verify:
                self._check_hash(name)
        for field, used in (("weight_files", manifest.weight_files), ("kernel_files", manifest.kernel_files)):
            for name in used:
                if name not in manifest.files:
                    self.refuse(f"{field}.{name}", "a recorded size and sha256", "none")

    def machine(self) -> None:
        """This machine has what the engine was built for, and its modules are such as this version runs."""
        self.target.check_machine(self.manifest.kernel_files, self.refuse)

    def kernels(self) -> None:
        """Every compiled module comes from this version's sources and has its recorded content, and every chosen kernel
        is in the engine's modules."""
        manifest = self.manifest
        self._check_sources()
        for name in manifest.kernel_files:
            self._check_hash(name)
        chosen = {choice.op for choice in manifest.kernels}
        for op in manifest.graph.ops:
            if op.name not in chosen:
                self.refuse(f"kernels.{op.name}", "what executes it", "none")
        self._check_entries(manifest.kernels)

    def _check_entries(self, choices: Iterable[KernelChoice]) -> None:
        """The modules have every entry point of these kernels."""
        manifest = self.manifest
        for arch in dict.fromkeys(module.arch for module in manifest.kernel_files.values()):
            modules = [module for module in manifest.kernel_files.values() if module.arch == arch]
            # PTX and native libraries list no resources.
            if not all(module.resources for module in modules):
                continue
            present = {resource.name for module in modules for resource in module.resources}
            for choice in choices:
                absent = sorted(set(choice.entries) - present)
                if choice.kernel != FALLBACK and absent:
                    self.refuse(f"kernels.{choice.op}", f"kernel {absent[0]} for {arch}", "no such kernel")

    def tensors(self) -> None:
        """The weight files hold exactly the planes that the graph needs, of the right shapes and dtypes."""
        found = self._entries()
        expected = flat(self.target.planes(self.manifest.graph, self.manifest.options))
        for name, plane in expected.items():
            wanted = f"{' or '.join(plane.dtypes)} {list(plane.shape)}"
            if name not in found:
                self.refuse(f"tensor '{name}'", wanted, "no such tensor")
            if found[name].shape != plane.shape or found[name].dtype not in plane.dtypes:
                self.refuse(f"tensor '{name}'", wanted, f"{found[name].dtype} {list(found[name].shape)}")
        extra = sorted(set(found) - set(expected))
        if extra:
            self.refuse("tensors", f"the {len(expected)} that the graph names", f"'{extra[0]}' as well")

    def limits(self, request: EngineRequest) -> Sizing:
        """The requested limits are within the built ones; returns what a memory plan for them is made of."""
        built = self.manifest.options
        request.check_honoured(self.target)
        if request.max_model_len is not None and request.max_model_len > built.max_model_len:
            longest = self.manifest.graph.max_position
            if request.max_model_len > longest:
                message = f"expected at most {longest}, the model's own limit, found {request.max_model_len}"
                raise EngineOptionError(f"--max-model-len: {message}", fix=f"--max-model-len {built.max_model_len}")
            self.refuse_option(
                "max_model_len", f"at most {built.max_model_len}", request.max_model_len,
                max_model_len=request.max_model_len,
            )  # fmt: skip
        if request.max_model_len is not None and request.max_model_len < 1:
            self.refuse_option("max_model_len", "at least 1", request.max_model_len)
        if request.block_size not in (None, built.block_size):
            self.refuse_option("block_size", built.block_size, request.block_size, block_size=request.block_size)
        if request.dtype not in (None, built.dtype):
            wanted = BuildConfig(dtype=request.dtype, block_size=built.block_size)
            self.target.options(wanted, self.manifest.graph, built.dtype)  # refuses what no build of this target has
            self.refuse_option("dtype", built.dtype, request.dtype, dtype=request.dtype)
        if request.target is not None and not _covers(self.target, request.target):
            parse_target(request.target).check_runs_here()  # or the rebuilt engine would be refused as well
            self.refuse_option("target", self.target.name, request.target, target=request.target)
        self._check_cache_dtype(request)
        stored = tuple(Plane(name, entry.shape, (entry.dtype,)) for name, entry in self._entries().items())
        return Sizing(self.manifest.graph, run_options(built, request), self.target, request, stored)

    def memory(self, sizing: Sizing) -> MemoryPlan:
        """One sequence of the longest length fits in memory, and in a KV cache whose size was asked for."""
        plan = sizing.plan()
        if not plan.fits:
            if sizing.request.kv_cache_bytes is not None:
                self._refuse_cache_size(plan, sizing.request.kv_cache_bytes)
            fix = advice(sizing, self.manifest.source.argument(self.path)[0])
            raise EngineLoadError(f"{self.path}: {plan.shortfall()}", fix=fix)
        return plan

    def _check_cache_dtype(self, request: EngineRequest) -> None:
        """The KV cache may be made of what was asked for: the modules have the kernels for it."""
        built, graph, asked = self.manifest.options, self.manifest.graph, request.kv_cache_dtype
        if asked is None or asked == built.kv_cache_dtype:
            return
        if asked not in self.target.kv_cache_dtypes(built):
            wanted = BuildConfig(dtype=built.dtype, block_size=built.block_size, kv_cache_dtype=asked)
            self.target.options(wanted, graph, built.dtype)  # a dtype that no build of this target has is its to refuse
            self.refuse_option("kv_cache_dtype", built.kv_cache_dtype, asked, kv_cache_dtype=asked)
        self._check_entries(self.target.choose_kernels(graph, run_options(built, request)))

    def _refuse_cache_size(self, plan: MemoryPlan, size: int) -> None:
        """Raise if the size asked for is at fault: too small for one sequence, or more than there is room for."""
        room, least = plan.room, plan.kv_bytes_of_one
        if size < least:
            shorter = f", or --max-model-len {plan.largest_max_model_len}" if plan.largest_max_model_len else ""
            fix = f"--kv-cache-memory {-(-least // 2**20)}MiB{shorter}"
            wanted = f"at least {human_bytes(least)} for one sequence of {plan.max_model_len} tokens"
        elif size > room:
            fix, wanted = f"--kv-cache-memory {room // 2**20}MiB or less", f"at most {human_bytes(room)} that are free"
        else:
            return
        raise EngineOptionError(f"--kv-cache-memory: expected {wanted}, found {human_bytes(size)}", fix=fix)

    def _check_hash(self, name: str) -> None:
        with (self.path / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        expected = self.manifest.files[name].sha256
        if found != expected:
            self.refuse(name, f"sha256 {expected[:16]}…", f"{found[:16]}…")

    def _check_sources(self) -> None:
        """What host code and kernels agree on, both have from one version: launch arguments, layouts, numbers."""
        built = self.manifest.kernel_sources
        try:
            ours = self.target.source_hashes(self.manifest.kernels)
        except CompileError as error:  # it names a source that this version no longer has
            self.refuse("kernel_sources", f"sources of llmctl {__version__}", error.message)
        for name in sorted({*ours, *built}):
            if ours.get(name) != built.get(name):
                expected, found = (hashes[name][:16] + "…" if name in hashes else "none" for hashes in (ours, built))
                self.refuse(
                    f"kernel_sources.{name}",
                    f"the source of llmctl {__version__}, sha256 {expected}",
                    f"that of llmctl {self.manifest.llmctl_version}, {found}",
                )

    def _entries(self) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        for name in self.manifest.weight_files:
            try:
                header = read_header(self.path / name)
            except CheckpointError as error:
                fix = self.manifest.rebuild_command(str(self.path))
                raise EngineLoadError(error.message, fix=fix) from error
            twice = sorted(set(entries) & set(header.tensors))
            if twice:
                self.refuse(name, "every tensor once", f"'{twice[0]}' a second time")
            entries.update(header.tensors)
        return entries


def _covers(built: Target, wanted: str) -> bool:
    """Whether an engine for ``built`` is one for ``wanted``: of its kind, with every architecture that it names.

    Raises:
        UsageError: ``wanted`` is no target.
    """
    parse_target(wanted)
    archs = wanted.partition(":")[2]
    return built.name.has_kind_of(wanted) and built.covers(archs.split(",") if archs else ())


def _map_weights(path: Path, manifest: Manifest) -> dict[str, WeightPlane]:
    weights: dict[str, WeightPlane] = {}
    for name in manifest.weight_files:
        file = SafetensorsFile(path / name)
        for tensor, entry in file.tensors.items():
            weights[tensor] = WeightPlane(entry.dtype, entry.shape, file.plane(tensor))
    return weights


def _salvaged_command(raw: bytes, path: Path) -> str:
    """The rebuild command, from what can still be read of a damaged manifest."""
    model, where, target = "MODEL", ", where MODEL is the one that it was built from", "cpu"
    try:
        data = json.loads(raw)
        model, where = source_argument(str(data["source"]["name"]), path)
        archs = ",".join(str(arch) for arch in data["target"]["archs"])
        target = str(data["target"]["kind"]) + (f":{archs}" if archs else "")
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return f"llmctl build --model {model} --target {shlex.quote(target)} --output {shlex.quote(str(path))}{where}"
