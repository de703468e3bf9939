"""Requests through an LLMEngine in this process, with a timestamp for every token and the work of every step."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from llmctl.artifact.builder import ensure_engine
from llmctl.artifact.loader import LoadedEngine, read_manifest
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import StartedEngine, start_engine
from llmctl.bench.metrics import RequestRecord
from llmctl.bench.workloads import WorkItem
from llmctl.config import EngineOptions
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import FinishReason, Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import UsageError
from llmctl.targets.machine import usable_cores
from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class BenchedEngine(StartedEngine):
    """An engine that is ready to run.

    Attributes:
        threads: processor threads that compute; None where a device of its own does. open_seconds: from its folder on
            disk to here, building not counted.
    """

    threads: int | None
    open_seconds: float

    def describe(self) -> dict[str, object]:
        """What ran, for the result."""
        manifest = self.loaded.manifest
        return {
            "path": str(self.loaded.path),
            "model": manifest.source.name,
            "family": manifest.graph.family,
            "target": str(manifest.target),
            "dtype": manifest.options.dtype,
            "quantization": manifest.quantization.method,
            "bits": manifest.quantization.bits,
            "max_model_len": self.engine.limits.max_model_len,
            "num_blocks": self.engine.limits.num_blocks,
            "block_size": self.engine.limits.block_size,
            "weight_bytes": self.loaded.plan.weights,
            "kv_cache_dtype": self.loaded.options.kv_cache_dtype,
            "kv_cache_bytes": replace(self.loaded.plan, num_blocks=self.engine.limits.num_blocks).kv_bytes,
            "gpu_memory_utilization": self._honoured("gpu_memory_utilization"),
            "enforce_eager": self._honoured("enforce_eager"),
            "open_seconds": self.open_seconds,
        }

    def _honoured(self, name: str) -> object:
        """An option of the run; None where the target does not have it."""
        return getattr(self.loaded.sizes, name) if name in self.loaded.target.run_options else None


def prepare_engine(config: EngineOptions, longest: int = 0, requests: int = 0) -> BenchedEngine:
    """The engine that ``config.model`` names, built into the cache first if it is not an engine folder.

    Args:
        longest: tokens of the longest request that will come, prompt and output.
        requests: how many will come at once; the engine's queue has room for them.

    Raises:
        UsageError: the engine takes no sequence of ``longest`` tokens (found before it is loaded).
        LlmctlError: whatever resolving, building or loading refuses.
    """
    EngineRequest.of(config)  # refused before anything is built
    path: Path = ensure_engine(config.model, config)
    limit = read_manifest(path).options.max_model_len
    if longest > (found := min(limit, config.max_model_len or limit)):
        fix = "shorter --input-len or --output-len" + (", or more --max-model-len" if found < limit else "")
        raise UsageError(
            f"--input-len, --output-len: requests of up to {longest} tokens, prompt and output; "
            f"{'the engine takes' if found == limit else '--max-model-len is'} {found}",
            fix=fix,
            param="input_len",
        )
    config = replace(config, max_num_queued_reqs=max(requests, config.max_num_queued_reqs))
    start = time.perf_counter()
    started = start_engine(path, config, clock=time.perf_counter)
    seconds = time.perf_counter() - start
    return BenchedEngine(started.engine, started.loaded, _threads(config, started.loaded), seconds)


def _threads(config: EngineOptions, loaded: LoadedEngine) -> int | None:
    """Threads that compute: those asked for, else torch's when it is the one computing, else all usable cores."""
    if "threads" not in loaded.target.run_options:
        return None
    if config.threads is not None:
        return config.threads
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else usable_cores()


def peak_rss_bytes() -> int:
    """The most memory this process has held resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class StepWork:
    """Steps of a run, in two kinds: those that computed (parts of) prompts, and those that only decoded.

    ``prompt_tokens`` are the tokens beyond one per sampled row of the steps that computed prompts.
    """

    prompt_steps: int = 0
    prompt_seconds: float = 0.0
    prompt_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    def add(self, computed: int, sampled: int, seconds: float) -> None:
        """One step that computed so many tokens and sampled so many."""
        if computed > sampled:
            self.prompt_steps += 1
            self.prompt_seconds += seconds
            self.prompt_tokens += computed
        else:
            self.decode_steps += 1
            self.decode_seconds += seconds
            self.decode_tokens += sampled

    def merge(self, other: StepWork) -> None:
        """The steps of another run as well."""
        for field in fields(StepWork):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class EngineRun:
    """What one batch of requests gave; ``duration`` in seconds from the first request added to the last one's end.

    ``interrupted``: a Ctrl-C cut it short, and ``records`` are those that had ended; the engine stands as it was left.
    """

    records: list[RequestRecord]
    duration: float
    steps: StepWork
    interrupted: bool = False


def cut_short() -> EngineRun:
    """A run that a Ctrl-C ended before its first step."""
    return EngineRun([], 0.0, StepWork(), interrupted=True)


def run_items(
    engine: LLMEngine,
    tokenizer: Tokenizer,
    items: Sequence[WorkItem],
    on_done: Callable[[RequestRecord], None] | None = None,
) -> EngineRun:
    """All items at once, greedy, end-of-sequence ignored; tokens are timestamped at the end of the step that made them.

    Raises:
        RequestError, CapacityError: an item that can never run.
    """
    try:
        prompts = [tokenizer.encode(item.prompt) for item in items]
    except KeyboardInterrupt:
        return cut_short()
    records = {
        str(i): RequestRecord(i, len(ids), item.output_tokens)
        for i, (ids, item) in enumerate(zip(prompts, items, strict=True))
    }
    requests = [
        Request(str(i), ids, SamplingParams(temperature=0.0, max_tokens=item.output_tokens, ignore_eos=True))
        for i, (ids, item) in enumerate(zip(prompts, items, strict=True))
    ]
    steps = StepWork()
    interrupted = False
    start = now = time.perf_counter()
    for record in records.values():
        record.scheduled = record.start = start
    try:
        engine.add_requests(requests)
        while engine.has_unfinished():
            before = now
            outputs = engine.step()
            now = time.perf_counter()
            sampled = 0
            for output in outputs:
                record = records[output.request_id]
                sampled += len(output.new_token_ids)
                record.chunk_times += [now] * len(output.new_token_ids)
                if output.finish_reason is not None:
                    _finish(record, output.finish_reason, now)
                    if on_done is not None:
                        on_done(record)
            steps.add(engine.stats().last_step_tokens, sampled, now - before)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if not interrupted:  # in the middle of a step nothing more may be asked of the engine
            engine.abort(records)
    ended = [record for record in records.values() if record.end or not interrupted]
    return EngineRun(ended, now - start, steps, interrupted)


def run_batches(
    engine: LLMEngine,
    tokenizer: Tokenizer,
    items: Sequence[WorkItem],
    size: int,
    on_done: Callable[[RequestRecord], None] | None = None,
) -> EngineRun:
    """As ``run_items``, but in static batches: so many items in order, and the next when the last of them has ended.

    A request that has ended computes nothing while its batch goes on; a server that pads would be slower. All count
    from the start, as those of ``run_items`` do.

    Raises:
        RequestError, CapacityError: an item that can never run.
    """
    runs: list[EngineRun] = []
    for i in range(0, len(items), size):
        runs.append(run_items(engine, tokenizer, items[i : i + size], on_done))
        if runs[-1].interrupted:
            break
    records = [record for run in runs for record in run.records]
    start = records[0].start if records else 0.0
    for index, record in enumerate(records):
        record.index, record.scheduled, record.start = index, start, start
    steps = StepWork()
    for run in runs:
        steps.merge(run.steps)
    return EngineRun(records, sum(run.duration for run in runs), steps, runs[-1].interrupted)


def _finish(record: RequestRecord, reason: FinishReason, now: float) -> None:
    record.end = now
    record.finish_reason = str(reason)
    record.prompt_tokens = record.planned_input
    record.completion_tokens = len(record.chunk_times)
    if reason == FinishReason.ABORT:
        record.error_kind, record.error = "aborted", "the engine aborted the request"
    elif not record.chunk_times:
        record.error_kind, record.error = "empty", "no token came"
