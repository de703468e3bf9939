"""Checkpoint -> engine folder: at a named output, or in the cache on the way to serving or benching a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from llmctl import __version__
from llmctl.artifact.build_lock import build_lock
from llmctl.artifact.loader import check_no_family, is_engine, read_manifest
from llmctl.artifact.manifest import MANIFEST_NAME, canonical_json
from llmctl.artifact.plan import BuildPlan, check_fits, check_length, check_options, plan_build
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.step_progress import step_progress
from llmctl.artifact.writer import Progress, write_engine
from llmctl.checkpoint.demo import DEMO_MODELS
from llmctl.checkpoint.folder import check_parent
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.resolve import cache_dir, is_fetched, resolve_model
from llmctl.config import BuildConfig, EngineOptions
from llmctl.errors import EngineLoadError, ModelNotFoundError, UsageError
from llmctl.extras import missing
from llmctl.targets.address_space import check_torch
from llmctl.targets.base import Target
from llmctl.targets.table import default_target, parse_target, target_of

# What shapes an engine's bytes; a change in any of these files makes cached engines stale.
_SOURCES = (".py", ".cu", ".cuh", ".cpp", ".h")
_BUILDER_ROOMS = ("artifact", "checkpoint", "graph", "targets")


def build_engine(config: BuildConfig, progress: Progress | None = None) -> Path:
    """Build an engine folder at ``config.output``.

    Args:
        progress: told after each weight.

    Returns:
        The folder.

    Raises:
        UsageError: an option that cannot be honoured, or an output that is something else than an engine.
        ModelNotFoundError, CheckpointError, UnsupportedModelError, CompileError: as the parts say.
    """
    write_engine(plan_output(config), Path(config.output), progress)
    return Path(config.output)


def plan_output(config: BuildConfig) -> BuildPlan:
    """The plan of ``build_engine``, everything that can be refused before the work checked; errors as that."""
    check_options(config)
    if not config.output:
        raise UsageError("--output: the folder to write is missing", fix="--output ./engine", param="output")
    check_replaceable(Path(config.output))
    plan = plan_build(config)
    if config.memory_budget is not None:  # without one it may be for another machine
        check_fits(plan, config.model)
    return plan


def ensure_engine(model: str, config: BuildConfig | EngineOptions, progress: Progress | None = None) -> Path:
    """The engine folder for a model: an engine is taken as it is, anything else is built into the cache once.

    Says on stderr what it builds and where, how far it is, and for a target that nobody named, why for that one. Two
    processes that ask for the same engine build it once.

    Args:
        progress: told of weights instead of the terminal.

    Raises:
        As ``build_engine``.
    """
    if is_engine(Path(model)):
        check_no_family(model, config.as_family)
        return Path(model)
    _check_worth_fetching(model)
    if isinstance(config, EngineOptions):
        plan = _plan_to_run(model, config)
    else:
        plan = plan_build(replace(config, model=model, output=""))
    engines = cache_dir() / "engines"
    engines.mkdir(parents=True, exist_ok=True)
    key = _key({
        "source": _fingerprint(plan.checkpoint, engines),
        "as_family": config.as_family,
        "target": str(plan.target.name),
        "options": asdict(plan.options),
        "version": __version__,
        "builder": _builder_hash(),
    })  # fmt: skip
    folder = engines / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', plan.name)}-{key}"
    with build_lock(folder):
        if not _is_complete(folder, plan):
            check_torch(f"{model} is not an engine yet: building one")
            print(f"building {plan.name} for {plan.target.name} into {folder}", file=sys.stderr, flush=True)
            with step_progress() as show:
                write_engine(plan, folder, progress or partial(show, "weights"), partial(show, "kernels"))
    return folder


def check_replaceable(output: Path) -> None:
    """Refuse an output path that holds anything but an llmctl engine or an empty folder.

    Raises:
        UsageError: something else is there.
    """
    check_parent(output)
    if not output.exists() and not output.is_symlink():
        return
    if output.is_dir() and not output.is_symlink():
        if not any(output.iterdir()):
            return
        try:
            manifest = json.loads((output / MANIFEST_NAME).read_bytes())
            checkpoint = (output / "config.json").exists()
            if {"format_version", "llmctl_version", "graph"} <= set(manifest) and not checkpoint:
                return
        except (OSError, ValueError, TypeError, RecursionError):
            pass
    raise UsageError(
        f"--output {output}: exists and is not an llmctl engine; it is left alone",
        fix="name a new folder or an engine to replace",
        param="output",
    )


def engine_target(config: EngineOptions) -> Target:
    """The target that ``config.model`` runs on: an engine's own, or what it will be built for.

    Raises:
        UsageError: ``config.target`` is no target. EngineLoadError: a damaged engine.
    """
    if is_engine(Path(config.model)):
        return target_of(read_manifest(Path(config.model)).target)
    return parse_target(default_target().spelling if config.target == "auto" else config.target)


def _check_worth_fetching(model: str) -> None:
    """Refuse a model that is not on this machine, where it could not be built: before it is fetched.

    Raises:
        MissingPackageError, HostMemoryError: as ``check_torch``.
    """
    if missing("quantize") is None or not is_fetched(model):
        return
    try:
        resolve_model(model, allow_download=False)
    except ModelNotFoundError as error:
        if model not in DEMO_MODELS and "/" not in model:  # most likely mistyped
            raise
        check_torch(f"{error.message}; to fetch it and build an engine of it")


def _plan_to_run(model: str, config: EngineOptions) -> BuildPlan:
    """The plan of an engine that can run as it is to be run.

    The longest context, and a KV cache's dtype where the target leaves it open, are of the run and not of the engine:
    one cached engine serves them all.
    """
    spelling = config.target
    if spelling == "auto":
        chosen = default_target()
        spelling = chosen.spelling
        for line in chosen.said:
            print(line, file=sys.stderr, flush=True)
    target, request = parse_target(spelling), EngineRequest.of(config)
    target.check_runs_here()
    request.check_honoured(target)
    block_size = config.block_size or BuildConfig.block_size
    wanted = BuildConfig(
        model=model, as_family=config.as_family, target=spelling, dtype=config.dtype, block_size=block_size
    )
    plan = plan_build(wanted)
    check_length(config.max_model_len, plan.graph)  # before it is built
    cache = request.kv_cache_dtype
    if cache is not None and cache not in target.kv_cache_dtypes(plan.options):
        plan = plan_build(replace(wanted, kv_cache_dtype=cache))
    return plan


def _is_complete(folder: Path, plan: BuildPlan) -> bool:
    """Whether the cached folder holds the planned engine, and not one built over it by hand."""
    try:
        if not is_engine(folder):
            return False
        manifest = read_manifest(folder)
    except EngineLoadError:
        return False
    return manifest.target == plan.target.name and manifest.options == plan.options


def _fingerprint(checkpoint: Checkpoint, engines: Path) -> str:
    """``checkpoint.fingerprint()``, remembered by the files' paths, sizes and modification times.

    Hashing a checkpoint's content takes seconds a gigabyte, at every start of a server.
    """
    paths = sorted(p for p in ([checkpoint.path] if checkpoint.path.is_file() else checkpoint.path.iterdir()))
    stats = [(str(p.resolve()), s.st_size, s.st_mtime_ns, s.st_ino) for p in paths for s in [p.stat()]]
    memo = engines / f"{_key(stats)}.fingerprint"
    try:
        return memo.read_text(encoding="ascii")
    except OSError:
        pass
    fingerprint = checkpoint.fingerprint()
    temporary = memo.with_name(f".{memo.name}.{os.getpid()}")
    temporary.write_text(fingerprint, encoding="ascii")
    os.replace(temporary, memo)
    return fingerprint


def _builder_hash() -> str:
    root = Path(__file__).parents[1]
    files = sorted(p for room in _BUILDER_ROOMS for p in (root / room).rglob("*") if p.suffix in _SOURCES)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _key(data: object) -> str:
    return hashlib.sha256(canonical_json(json.loads(json.dumps(data)))).hexdigest()[:16]
