"""Open an engine folder: every check first, in a fixed order, then memory-mapped weights. Imports no torch.

Order: format version -> files and sizes (sha256 with ``verify``) -> CPU features, or compute capability and driver ->
kernel hashes -> every tensor's shape and dtype against the graph -> requested limits against built limits -> memory
estimate. Nothing is mapped or allocated before the last check has passed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from numpy.typing import NDArray

from llmctl.artifact.manifest import MANIFEST_NAME, Manifest, ManifestError, Target, manifest_from_bytes
from llmctl.artifact.memory import MemoryPlan, human_bytes, plan_memory
from llmctl.artifact.plan import parse_target
from llmctl.checkpoint.safetensors_io import SafetensorsFile, TensorEntry, read_header
from llmctl.errors import CheckpointError, EngineLoadError, ModelNotFoundError
from llmctl.graph.graph import Graph
from llmctl.targets.cpu.planes import cpu_planes
from llmctl.targets.cpu.toolchain import library_name, supported_variants
from llmctl.targets.cuda.planes import cuda_planes
from llmctl.targets.cuda.registry import FALLBACK
from llmctl.targets.device import best_arch, cpu_features, cuda_device
from llmctl.targets.planes import Plane, dense_dtypes, expected_planes, flat, resident_bytes


@dataclass(frozen=True)
class WeightPlane:
    """One stored tensor: safetensors dtype, shape, and a read-only array over the file (BF16 as uint16)."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[Any]


@dataclass(frozen=True)
class EngineRequest:
    """What the caller wants of an engine: the limits of ``load_engine``."""

    max_model_len: int | None = None
    block_size: int | None = None
    dtype: str | None = None
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    kv_cache_bytes: int | None = None
    budget: int | None = None
    target: str | None = None


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that passed every check. ``weights``: planes by name; ``plan``: its memory, KV blocks included;
    ``request``: the limits it was asked for."""

    path: Path
    manifest: Manifest
    weights: Mapping[str, WeightPlane]
    plan: MemoryPlan
    request: EngineRequest

    @property
    def graph(self) -> Graph:
        """The operator graph."""
        return self.manifest.graph

    @property
    def max_model_len(self) -> int:
        """Longest sequence to serve, tokens."""
        return self.plan.max_model_len


def is_engine(path: Path) -> bool:
    """Whether ``path`` is an engine folder (it may still be a damaged one)."""
    return (path / MANIFEST_NAME).is_file()


def load_engine(
    path: Path,
    *,
    verify: bool = False,
    max_model_len: int | None = None,
    block_size: int | None = None,
    dtype: str | None = None,
    max_num_batched_tokens: int = 512,
    max_num_seqs: int = 64,
    kv_cache_bytes: int | None = None,
    budget: int | None = None,
    target: str | None = None,
) -> LoadedEngine:
    """Open an engine folder. A limit that is None is the one the engine was built with.

    Args:
        verify: check the sha256 of every file, not only its size.
        max_model_len: longest sequence, tokens. block_size: tokens a KV block. dtype: dtype to compute in.
        max_num_batched_tokens, max_num_seqs: tokens and sampled rows of the largest step.
        kv_cache_bytes: KV cache size; None sizes it from the memory available.
        budget: bytes for everything; None takes a share of the memory available.
        target: what it must have been built for, as ``--target`` spells it: ``cpu``, ``cpu:avx2``, ``cuda:sm_90``.

    Raises:
        ModelNotFoundError: ``path`` is not an engine folder.
        EngineLoadError: a check failed; the message says what was expected and found, ``fix`` the command to run.
        UsageError: ``target`` is no target.
    """
    checks = EngineChecks(path, read_manifest(path))
    checks.files(verify)
    checks.target()
    checks.kernels()
    checks.tensors()
    request = EngineRequest(
        max_model_len, block_size, dtype, max_num_batched_tokens, max_num_seqs, kv_cache_bytes, budget, target
    )
    plan = checks.limits(request)
    checks.memory(plan, request.kv_cache_bytes)
    return LoadedEngine(path, checks.manifest, _map_weights(path, checks.manifest), plan, request)


def read_manifest(path: Path) -> Manifest:
    """The manifest of an engine folder, checked in itself only (format version, keys, checksum).

    Raises:
        ModelNotFoundError: no ``engine.json`` there.
        EngineLoadError: damaged or of another format version.
    """
    try:
        raw = (path / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(f"{path}: not an llmctl engine: no {MANIFEST_NAME}") from None
    except OSError as error:
        raise EngineLoadError(f"{path / MANIFEST_NAME}: cannot be read: {error.strerror or error}") from error
    try:
        return manifest_from_bytes(raw)
    except ManifestError as error:
        raise EngineLoadError(f"{path / MANIFEST_NAME}: {error}", fix=_salvaged_command(raw, path)) from error


class EngineChecks:
    """The checks of one engine folder, one method each; every one raises EngineLoadError or passes."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def refuse(self, field: str, expected: object, found: object, **changes: Any) -> NoReturn:
        """Raise: ``field`` was not as expected; ``changes`` are the build options that mend it."""
        fix = self.manifest.rebuild_command(str(self.path), **changes)
        raise EngineLoadError(f"{self.path}: {field}: expected {expected}, found {found}", fix=fix)

    def files(self, verify: bool) -> None:
        """Every recorded file is there, of its recorded size (and content, with ``verify``)."""
        for name, record in self.manifest.files.items():
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

    def target(self) -> None:
        """This machine has the CPU features, or the NVIDIA device and driver, that the engine was built for."""
        target = self.manifest.target
        missing = sorted(set(target.features) - cpu_features())
        if missing:
            self.refuse("target.features", "a CPU with " + ", ".join(target.features), "none of " + ", ".join(missing))
        if target.kind == "cuda":
            self._check_cuda()
        if target.native_cpu and cpu_library(self.path, self.manifest) is None:
            here = ", ".join(library_name(v) for v in supported_variants(cpu_features()))
            self.refuse("target", f"a CPU that runs {', '.join(target.archs)}", f"one that runs {here}", target="cpu")

    def kernels(self) -> None:
        """Every compiled module has its recorded content, and every chosen kernel is in the engine's modules."""
        manifest = self.manifest
        for name in manifest.kernel_files:
            if name not in manifest.files:
                self.refuse(f"kernel_files.{name}", "a recorded size and sha256", "none")
            self._check_hash(name)
        for arch in dict.fromkeys(module.arch for module in manifest.kernel_files.values()):
            modules = [module for module in manifest.kernel_files.values() if module.arch == arch]
            # PTX and the native CPU library list no resources.
            if not all(module.resources for module in modules):
                continue
            present = {resource.name for module in modules for resource in module.resources}
            for choice in manifest.kernels:
                absent = sorted(set(choice.entries) - present)
                if choice.kernel != FALLBACK and absent:
                    self.refuse(f"kernels.{choice.op}", f"kernel {absent[0]} for {arch}", "no such kernel")

    def tensors(self) -> None:
        """The weight files hold exactly the planes that the graph needs, of the right shapes and dtypes."""
        found = self._entries()
        graph, target, options = self.manifest.graph, self.manifest.target, self.manifest.options
        if target.native_cpu:
            planes = cpu_planes(graph, options)
        else:
            planes = expected_planes(graph, dense_dtypes(target.kind, options.dtype))
        expected = flat(cuda_planes(graph, planes) if target.kind == "cuda" else planes)
        for name, plane in expected.items():
            wanted = f"{' or '.join(plane.dtypes)} {list(plane.shape)}"
            if name not in found:
                self.refuse(f"tensor '{name}'", wanted, "no such tensor")
            if found[name].shape != plane.shape or found[name].dtype not in plane.dtypes:
                self.refuse(f"tensor '{name}'", wanted, f"{found[name].dtype} {list(found[name].shape)}")
        extra = sorted(set(found) - set(expected))
        if extra:
            self.refuse("tensors", f"the {len(expected)} that the graph names", f"'{extra[0]}' as well")

    def limits(self, request: EngineRequest) -> MemoryPlan:
        """The requested limits are within the built ones; returns the memory plan for them."""
        built = self.manifest.options
        if request.max_model_len is not None and request.max_model_len > built.max_model_len:
            self.refuse(
                "max_model_len", f"at most {built.max_model_len}", request.max_model_len,
                max_model_len=request.max_model_len,
            )  # fmt: skip
        if request.max_model_len is not None and request.max_model_len < 1:
            self.refuse("max_model_len", "at least 1", request.max_model_len)
        if request.block_size not in (None, built.block_size):
            self.refuse("block_size", built.block_size, request.block_size, block_size=request.block_size)
        if request.dtype not in (None, "auto", built.dtype):
            self.refuse("dtype", built.dtype, request.dtype, dtype=request.dtype)
        if request.target not in (None, "auto") and not _covers(self.manifest.target, request.target):
            self.refuse("target", self.manifest.target, request.target, target=request.target)
        stored = [Plane(name, entry.shape, (entry.dtype,)) for name, entry in self._entries().items()]
        return plan_memory(
            self.manifest.graph,
            weights_bytes=resident_bytes(self.manifest.graph, self.manifest.target, built.dtype, stored),
            dtype=built.dtype,
            target_kind=self.manifest.target.kind,
            kv_cache_dtype=built.kv_cache_dtype,
            block_size=built.block_size,
            max_model_len=request.max_model_len or built.max_model_len,
            max_num_batched_tokens=request.max_num_batched_tokens,
            max_num_seqs=request.max_num_seqs,
            budget=request.budget,
            kv_cache_bytes=request.kv_cache_bytes,
        )

    def memory(self, plan: MemoryPlan, kv_cache_bytes: int | None = None) -> None:
        """One sequence of the longest length fits in memory, and in a KV cache whose size was asked for."""
        if plan.fits:
            return
        if kv_cache_bytes is not None:
            self._refuse_cache_size(plan, kv_cache_bytes)
        length = plan.largest_max_model_len
        fix = plan.advice()
        if length > 0:
            fix += ": " + self.manifest.rebuild_command(str(self.path), max_model_len=length)
        raise EngineLoadError(f"{self.path}: {plan.shortfall()}", fix=fix)

    def _refuse_cache_size(self, plan: MemoryPlan, size: int) -> None:
        """Raise if the size asked for is at fault: too small for one sequence, or more than there is room for."""
        room = max(0, plan.budget - plan.weights - plan.activations)
        least = -(-plan.max_model_len // plan.block_size) * plan.block_size * plan.kv_per_token
        if size < least:
            shorter = f", or --max-model-len {plan.kv_tokens}" if plan.kv_tokens else ""
            fix = f"--kv-cache-memory {-(-least // 2**20)}MiB{shorter}"
            wanted = f"at least {human_bytes(least)} for one sequence of {plan.max_model_len} tokens"
        elif size > room:
            fix, wanted = f"--kv-cache-memory {room // 2**20}MiB or less", f"at most {human_bytes(room)} that are free"
        else:
            return
        raise EngineLoadError(f"--kv-cache-memory: expected {wanted}, found {human_bytes(size)}", fix=fix)

    def _check_hash(self, name: str) -> None:
        with (self.path / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        expected = self.manifest.files[name].sha256
        if found != expected:
            self.refuse(name, f"sha256 {expected[:16]}…", f"{found[:16]}…")

    def _check_cuda(self) -> None:
        device = cuda_device()
        if device is None:
            self.refuse(
                f"target {self.manifest.target}", "an NVIDIA device and driver", "none on this machine",
                target="cpu", dtype=None,
            )  # fmt: skip
        archs = tuple(module.arch for module in self.manifest.kernel_files.values())
        if not archs:
            return
        best = best_arch(archs, device.capability)
        if best is None:
            self.refuse("target.archs", f"a device of {', '.join(archs)}", device.arch, target=f"cuda:{device.arch}")
        module = next(m for m in self.manifest.kernel_files.values() if m.arch == best)
        needed = _version_number(module.compiler)
        # A cubin runs under any driver of its CUDA major version; PTX needs a driver as new as its compiler.
        enough = device.driver >= needed if best.startswith("compute_") else device.driver[0] >= needed[0]
        if not enough:
            self.refuse(
                "driver", f"CUDA {needed[0]}.{needed[1]} or newer", f"CUDA {device.driver[0]}.{device.driver[1]}"
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
    kind, _, archs = wanted.partition(":")
    # A cpu variant goes by its short name as well: avx2 for x86_64-avx2.
    names = {name for arch in built.archs for name in (arch, arch.rpartition("-")[2])}
    return kind == built.kind and set(archs.split(",") if archs else ()) <= names


def cpu_library(path: Path, manifest: Manifest) -> Path | None:
    """The fastest of the engine's native libraries that this CPU runs; None when there is none."""
    for variant in supported_variants(cpu_features()):
        if library_name(variant) in manifest.target.archs:
            return path / "kernels" / f"{library_name(variant)}.so"
    return None


def _map_weights(path: Path, manifest: Manifest) -> dict[str, WeightPlane]:
    weights: dict[str, WeightPlane] = {}
    for name in manifest.weight_files:
        file = SafetensorsFile(path / name)
        for tensor, entry in file.tensors.items():
            weights[tensor] = WeightPlane(entry.dtype, entry.shape, file.plane(tensor))
    return weights


def _version_number(compiler: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", compiler)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _salvaged_command(raw: bytes, path: Path) -> str:
    """The rebuild command, from what can still be read of a damaged manifest."""
    model, target = "MODEL", "cpu"
    try:
        data = json.loads(raw)
        model = str(data["source"]["name"])
        archs = ",".join(str(arch) for arch in data["target"]["archs"])
        target = str(data["target"]["kind"]) + (f":{archs}" if archs else "")
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return f"llmctl build --model {model} --target {target} --output {path}"
