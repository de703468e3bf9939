"""``engine.json``: everything about an engine folder, as frozen dataclasses.

The file is canonical: sorted keys, one layout, and a checksum over itself, so that the same engine always has the same
bytes and any change to the file is seen. It holds no time, user or absolute path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmctl.artifact.strict import from_data, to_data
from llmctl.graph.graph import Graph
from llmctl.graph.passes import CUDA_PASSES, DEFAULT_PASSES
from llmctl.targets.cuda.compile import KernelResources
from llmctl.targets.cuda.registry import KernelChoice

FORMAT_VERSION = 1
MANIFEST_NAME = "engine.json"


@dataclass(frozen=True)
class SourceModel:
    """The checkpoint: its name without its folder (or the hub id), and the sha256 of its content."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class QuantizationRecord:
    """How the weights were quantized; ``method`` is ``none`` for a dense model."""

    method: str = "none"
    bits: int = 0
    group_size: int = 0
    symmetric: bool = False
    act_order: bool = False
    ignored_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildOptions:
    """What the engine was built for.

    Attributes:
        dtype: dtype the model computes in. max_model_len: longest sequence, tokens.
        block_size: tokens a KV block. kv_cache_dtype: dtype of the KV cache.
        passes: graph passes, in order. graph_sizes: batch sizes captured as device graphs.
        lm_head: how the native CPU kernels store a dense output head: dense, int8 or int4.
    """

    dtype: str
    max_model_len: int
    block_size: int
    kv_cache_dtype: str
    passes: tuple[str, ...]
    graph_sizes: tuple[int, ...] = ()
    lm_head: str = "dense"


@dataclass(frozen=True)
class Target:
    """``kind`` reference, cpu or cuda; ``archs``: sm_90 and the like, or the native kernels' variants of a cpu target
    (none: it runs on the reference runtime); ``features`` a CPU must have (avx2)."""

    kind: str
    archs: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    @property
    def native_cpu(self) -> bool:
        """Whether weights are packed for the native CPU kernels."""
        return self.kind == "cpu" and bool(self.archs)

    @property
    def default_passes(self) -> tuple[str, ...]:
        """The graph passes of a build that names none."""
        return CUDA_PASSES if self.kind == "cuda" else DEFAULT_PASSES

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(self.archs)}" if self.archs else self.kind


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of one file of the folder."""

    size: int
    sha256: str


@dataclass(frozen=True)
class KernelFile:
    """One compiled module: what made it, for which architecture, and what each of its kernels uses."""

    arch: str
    compiler: str
    flags: tuple[str, ...]
    sources: tuple[str, ...]
    resources: tuple[KernelResources, ...]


@dataclass(frozen=True)
class Manifest:
    """An engine.

    Attributes:
        kernel_sources: kernel source file -> sha256 of it and all it includes.
        kernel_files: path in the folder -> module.
        kernels: what executes each op, in execution order.
        weight_files: weight files, in shard order.
        files: every file of the folder but ``engine.json``, by relative path.
        checksum: sha256 of this manifest's canonical form with an empty checksum.
    """

    format_version: int
    llmctl_version: str
    source: SourceModel
    target: Target
    options: BuildOptions
    quantization: QuantizationRecord
    graph: Graph
    kernel_sources: Mapping[str, str]
    kernel_files: Mapping[str, KernelFile]
    kernels: tuple[KernelChoice, ...]
    weight_files: tuple[str, ...]
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    checksum: str = ""

    def rebuild_command(self, output: str, **changes: Any) -> str:
        """The ``llmctl build`` that makes this engine again at ``output``, with options replaced by ``changes``."""
        built = self.options
        int8 = built.passes[-1:] == ("int8_activations",)
        passes = built.passes[:-1] if int8 else built.passes
        options: dict[str, Any] = {
            "target": self.target,
            "dtype": built.dtype,
            "max_model_len": built.max_model_len,
            "block_size": built.block_size,
            "kv_cache_dtype": None if built.kv_cache_dtype == built.dtype else built.kv_cache_dtype,
            "activations": "int8" if int8 else None,
            "lm_head": built.lm_head if self.target.native_cpu and "dtype" not in changes else None,
            "passes": None if passes == self.target.default_passes else passes or ("none",),
        }
        kind = str(changes.get("target", self.target)).partition(":")[0]
        if kind != self.target.kind:  # which has other dtypes and passes
            options |= dict.fromkeys(("dtype", "kv_cache_dtype", "activations", "lm_head", "passes"))
        options |= changes
        words = [
            f"--{name.replace('_', '-')} {word}"
            for name, value in options.items()
            if value is not None
            for word in (value if isinstance(value, tuple) else (value,))
        ]
        return " ".join(["llmctl build --model", self.source.name, *words, "--output", output])


def canonical_json(data: Any) -> bytes:
    """The one JSON spelling of ``data``: sorted keys, ASCII, one-space indent, a final newline."""
    return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """``engine.json``, its checksum filled in."""
    return _sealed(manifest)[0]


def manifest_from_bytes(raw: bytes) -> Manifest:
    """The manifest that ``manifest_to_bytes`` wrote.

    Raises:
        ManifestError: another format version, not JSON, an unknown or missing key, or changed since it was written.
    """
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"not valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ManifestError(f"expected an object, found {type(data).__name__}")
    version = data.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ManifestError(f"format_version: expected {FORMAT_VERSION}, found {json.dumps(version)}")
    try:
        manifest = from_data(Manifest, data)
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(str(error)) from error
    canonical, expected = _sealed(manifest)
    if manifest.checksum != expected:
        raise ManifestError(
            f"checksum: expected {expected[:16]}…, found {manifest.checksum[:16]}…; the file was changed"
        )
    if raw != canonical:
        raise ManifestError("its bytes are not what llmctl writes; the file was changed")
    return manifest


class ManifestError(ValueError):
    """What is wrong with an ``engine.json``, in one line."""


def _sealed(manifest: Manifest) -> tuple[bytes, str]:
    """The file's bytes and the checksum in them."""
    blank = canonical_json(to_data(replace(manifest, checksum="")))
    checksum = hashlib.sha256(blank).hexdigest()
    # One space of indent is the top level's alone, so that this is no other key's line.
    return blank.replace(b'\n "checksum": "",\n', f'\n "checksum": "{checksum}",\n'.encode(), 1), checksum
