"""An engine folder started: checked, mapped, its runtime opened, requests taken. What ``serve`` and ``bench`` run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from llmctl.artifact.loader import LoadedEngine, load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.config import EngineOptions
from llmctl.engine.adapter_cache import AdapterCache
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import Runtime
from llmctl.targets.address_space import check_torch
from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class StartedEngine:
    """A running engine, the tokenizer of its model, and the folder that it came from."""

    engine: LLMEngine
    tokenizer: Tokenizer
    loaded: LoadedEngine


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
    with ThreadPoolExecutor(1) as reader:  # a tokenizer of 128k entries takes half a second
        reading = reader.submit(Tokenizer.from_folder, path)
        runtime = open_runtime(loaded, threads=config.threads)
        tokenizer = reading.result()
    sizes = loaded.sizes
    scheduler = SchedulerConfig.from_engine_config(config.sized(sizes.max_num_seqs, sizes.max_num_batched_tokens))
    engine = LLMEngine(
        runtime, scheduler, tokenizer.eos_token_ids, seed=config.seed, clock=clock, adapters=_adapters(loaded, runtime)
    )
    return StartedEngine(engine, tokenizer, loaded)


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
