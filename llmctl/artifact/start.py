"""An engine folder started: checked, mapped, its runtime opened, requests taken. What ``serve`` and ``bench`` run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmctl.artifact.loader import LoadedEngine, load_engine, read_manifest
from llmctl.artifact.manifest import Manifest
from llmctl.artifact.request import EngineRequest
from llmctl.config import EngineConfig
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.scheduler import SchedulerConfig
from llmctl.engine.step import Runtime
from llmctl.errors import EngineLoadError
from llmctl.targets.table import parse_target, target_of
from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class StartedEngine:
    """A running engine, the tokenizer of its model, and the folder that it came from."""

    engine: LLMEngine
    tokenizer: Tokenizer
    loaded: LoadedEngine


def start_engine(path: Path, config: EngineConfig, *, clock: Callable[[], float] = time.monotonic) -> StartedEngine:
    """Start the engine in a folder.

    Args:
        clock: seconds, for the engine's time stamps.

    Raises:
        LlmctlError: whatever loading refuses.
    """
    if config.target != "auto" and (wanted := parse_target(config.target)).no_runtime is not None:
        wanted.check_runs_here()  # refuses every machine
    _check_has_runtime(path, read_manifest(path))
    loaded = load_engine(path, EngineRequest.of(config), verify=config.verify)
    runtime = open_runtime(loaded, threads=config.threads)
    tokenizer = Tokenizer.from_folder(path)
    scheduler = SchedulerConfig.from_engine_config(config)
    engine = LLMEngine(runtime, scheduler, tokenizer.eos_token_ids, seed=config.seed, clock=clock)
    return StartedEngine(engine, tokenizer, loaded)


def open_runtime(engine: LoadedEngine, *, threads: int | None = None) -> Runtime:
    """The runtime of a loaded engine, sized by its memory plan.

    Args:
        threads: CPU threads; None: the target's default.

    Raises:
        EngineLoadError: this version has no runtime for the engine's target, or it does not load here.
    """
    return engine.target.open_runtime(engine, threads)


def _check_has_runtime(path: Path, manifest: Manifest) -> None:
    missing = target_of(manifest.target).no_runtime
    if missing is not None:
        raise EngineLoadError(
            f"{path}: target {manifest.target}: {missing}",
            fix=manifest.rebuild_command(f"{path}-cpu", target="cpu"),  # beside it: it is whole, and took long to build
        )
