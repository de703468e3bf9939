"""Settings of ``bench`` as frozen dataclasses: option names with underscores, defaults of the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmctl.config import EngineOptions, QuantizeConfig


@dataclass(frozen=True)
class ReportConfig:
    """What every bench does with its result: gates, comparison with a baseline, files."""

    slo: tuple[str, ...] = ()
    baseline: str | None = None
    max_regression: str = "5%"
    update_baseline: bool = False
    repeats: int | None = None
    confidence: float = 0.95
    exit_zero: bool = False
    label: str | None = None
    metadata: tuple[str, ...] = ()
    save_result: bool = False
    result_dir: str | None = None
    result_filename: str | None = None
    save_detailed: bool = False
    junit: str | None = None
    markdown: str | None = None
    csv: str | None = None
    github_action_benchmark: str | None = None

    @property
    def num_repeats(self) -> int:
        """``repeats``, or by default 3 when a baseline is compared or made (noise must be known) and 1 otherwise."""
        return self.repeats if self.repeats is not None else (3 if self.baseline else 1)


@dataclass(frozen=True)
class BenchServeConfig(ReportConfig):
    """``llmctl bench serve``: load on an OpenAI-compatible URL."""

    base_url: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    backend: str | None = None
    endpoint: str | None = None
    model: str | None = None
    api_key: str | None = None
    header: tuple[str, ...] = ()
    insecure: bool = False
    ready_timeout: float = 0.0
    request_timeout: float = 600.0
    keep_alive: bool = False
    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int = 100
    num_warmups: int = 1
    input_len: str = "128"
    output_len: str | None = None
    tokenizer: str | None = None
    ignore_eos: bool | None = None
    temperature: float = 0.0
    extra_body: str | None = None
    seed: int = 0
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    percentile_metrics: str = "ttft,tpot,itl,e2el"
    metric_percentiles: str = "50,90,99"
    goodput: tuple[str, ...] = ()
    min_goodput: str | None = None
    max_failed_ratio: float = 0.0
    regression_metrics: str = "output_throughput,median_ttft_ms,median_tpot_ms,median_e2el_ms"


@dataclass(frozen=True)
class OfflineConfig(EngineOptions, ReportConfig):
    """What the two offline benches share: an engine, and what is done with the result."""

    input_len: str = "128"
    output_len: str = "128"


@dataclass(frozen=True)
class BenchThroughputConfig(OfflineConfig):
    """``llmctl bench throughput``: requests through the engine in this process."""

    num_prompts: int = 32
    num_warmups: int = 1
    enable_prefix_caching: bool = False
    regression_metrics: str = "tokens_per_second,output_throughput"


@dataclass(frozen=True)
class BenchLatencyConfig(OfflineConfig):
    """``llmctl bench latency``: one batch, again and again, in this process."""

    batch_size: int = 1
    num_iters: int = 10
    num_iters_warmup: int = 2
    metric_percentiles: str = "10,25,50,75,90,99"
    enable_prefix_caching: bool = False
    regression_metrics: str = "avg_latency"


@dataclass(frozen=True)
class CompareConfig:
    """``llmctl quantize compare``: every method at every number of bits, otherwise as ``base`` says.

    ``bits`` None: 4, or those that a budget chooses. ``text``, ``context`` and ``windows`` as in ``EvalConfig``;
    ``target`` is what speeds are measured on.
    """

    base: QuantizeConfig
    methods: tuple[str, ...] = ("rtn", "awq", "gptq")
    bits: tuple[int, ...] | None = None
    text: str = "builtin"
    context: int | None = None
    windows: int | None = None
    target: str = "cpu"
    result_dir: str = "."
