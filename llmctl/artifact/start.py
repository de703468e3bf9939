"""An engine folder started: checked, mapped, its runtime opened, requests taken. What ``serve`` and ``bench`` run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.artifact.loader import LoadedEngine, load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.config import EngineOptions
from llmctl.engine.adapter_cache import AdapterCache
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import Runtime
from llmctl.targets.address_space import check_torch
from llmctl.text.end_tokens import end_token_ids

if TYPE_CHECKING:
    from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class StartedEngine:
    """A running engine, and the folder that it came from."""

    engine: LLMEngine
    loaded: LoadedEngine

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of its model; read when it is first asked for, which takes half a second for 128k entries: no start waits for
        it. In the worker, grammars ask for it right after the start, in a thread beside the first requests.

        Raises:
            CheckpointError: as ``Tokenizer.from_folder``.
        """
        from llmctl.text.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.loaded.path)


def start_engine(path: Path, config: EngineOptions, *, clock: Callable[[], float] = time.monotonic) -> StartedEngine:
    """Start the engine in a folder; options of the run that its target passes over are told on stderr.

    Args:
        clock: seconds, for the engine's time stamps.

    Raises:
        LlmctlError: whatever loading refuses.
    """
    if config.enable_lora:
        check_torch("--enable-lora")
    loaded = load_engine(path, EngineRequest.of(config), verify=config.verify)
    for line in loaded.request.without_effect(loaded.target):
        print(line, file=sys.stderr, flush=True)
    ends = end_token_ids(path)
    runtime = open_runtime(loaded, threads=config.threads)
    sizes = loaded.sizes
    scheduler = SchedulerConfig.from_engine_config(config.sized(sizes.max_num_seqs, sizes.max_num_batched_tokens))
    engine = LLMEngine(runtime, scheduler, ends, seed=config.seed, clock=clock, adapters=_adapters(loaded, runtime))
    return StartedEngine(engine, loaded)


def open_runtime(engine: LoadedEngine, *, threads: int | None = None) -> Runtime:
    """The runtime of a loaded engine, sized by its memory plan.

    Args:
        threads: CPU threads; None: the target's default.

    Raises:
        EngineLoadError, DeviceError: it does not load here after all.
    """
    return engine.target.open_runtime(engine, threads)


def _adapters(loaded: LoadedEngine, runtime: Runtime) -> AdapterCache | None:
    lora = loaded.request.lora
    if lora is None:
        return None
    assert runtime.adapters is not None, "it was sized for them"
    import_module("torch")  # in which adapters are read: while requests run, its import would keep steps waiting
    from llmctl.checkpoint.adapters.reading import read_adapter

    graph, base = loaded.graph, loaded.manifest.source.name
    return AdapterCache(lora, runtime.adapters, lambda folder: read_adapter(folder, graph, base))
