"""``engine.json``: everything about an engine folder, as frozen dataclasses.

The file is canonical: sorted keys, one layout, and a checksum over itself, so that the same engine always has the same
bytes and any change to the file is seen. It holds no time, user or absolute path.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmctl.artifact import engine_source
from llmctl.artifact.strict import from_data, to_data
from llmctl.checkpoint.demo import DEMO_PREFIX
from llmctl.graph.graph import Graph
from llmctl.targets.base import BuildOptions, KernelChoice, KernelFile, TargetName
from llmctl.targets.table import target_of

MANIFEST_NAME = engine_source.MANIFEST_NAME

FORMAT_VERSION = 7


@dataclass(frozen=True)
class SourceModel:
    """The checkpoint: its name without its folder (or the hub id), the sha256 of its content, and the family that it
    was read as where its own is not known."""

    name: str
    fingerprint: str
    as_family: str = ""

    def argument(self, engine: Path) -> tuple[str, str]:
        """As ``source_argument``, with ``--as`` behind it where a build needs that."""
        model, where = source_argument(self.name, engine)
        return model + (f" --as {shlex.quote(self.as_family)}" if self.as_family else ""), where


@dataclass(frozen=True)
class QuantizationRecord:
    """How the weights were quantized; ``method`` is ``none`` for a dense model, the rest as in a ``QuantScheme``."""

    method: str = "none"
    bits: int = 0
    group_size: int = 0
    symmetric: bool = False
    act_order: bool = False
    book: str = ""
    minimum: bool = False
    block_rows: int = 1
    nested: int = 0
    nested_bits: int = 8
    ignored_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of one file of the folder."""

    size: int
    sha256: str


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
    target: TargetName
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
        options = {"target": self.target, **target_of(self.target).rebuild_options(self.options)}
        if not self.target.has_kind_of(str(changes.get("target", self.target))):  # which has other dtypes and passes
            options |= dict.fromkeys(("dtype", "kv_cache_dtype", "activations", "lm_head", "passes"))
        if "dtype" in changes:  # and with it another head
            options["lm_head"] = None
        options |= changes
        words = [
            f"--{name.replace('_', '-')} {word}"
            for name, value in options.items()
            if value is not None
            for word in (value if isinstance(value, tuple) else (value,))
        ]
        model, where = self.source.argument(Path(output))
        return " ".join(["llmctl build --model", model, *words, "--output", shlex.quote(output)]) + where


def source_argument(name: str, engine: Path) -> tuple[str, str]:
    """What ``--model`` is given for the model that an engine was built from, quoted, and what is to be said of it.

    An engine does not record where its model lay, for the same model makes the same engine anywhere: a local one is
    looked for in the current folder and beside the engine. What is not found there is a placeholder, explained.
    """
    if name.startswith(DEMO_PREFIX):
        return shlex.quote(name), ""
    for place in (Path(name), engine.parent / name):
        if place.exists():
            return shlex.quote(str(place)), ""
    if "/" in name:
        return shlex.quote(name), ""
    return "MODEL", f", where MODEL is the path or hub id of '{name}', which it was built from"


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
        target_of(manifest.target)
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
