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
    allow_missing_baseline: bool = False
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

    @property
    def saves(self) -> bool:
        """Whether the JSON result goes to a file."""
        return bool(self.save_result or self.result_filename or self.result_dir)


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
    ready_timeout: float = 60.0
    request_timeout: float = 600.0
    keep_alive: bool = False
    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int = 100
    num_warmups: int = 1
    load_seconds: float | None = None
    input_len: str = "128"
    prefix_len: int = 0
    num_prefixes: int = 1
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

    @property
    def compares(self) -> bool:
        """Whether ``regression_metrics`` are needed."""
        return self.baseline is not None


@dataclass(frozen=True)
class BenchCompareConfig(BenchServeConfig):
    """``llmctl bench compare``: rounds of the same load on A and B, each a URL or what ``llmctl serve`` takes."""

    a: str = ""
    b: str = ""
    a_api_key: str | None = None
    b_api_key: str | None = None
    a_args: str = ""
    b_args: str = ""
    max_rounds: int = 30
    max_duration: float | None = None
    svg: str | None = None
    ready_timeout: float = 600.0
    num_prompts: int = 16
    num_warmups: int = 2
    output_len: str | None = "64"
    max_concurrency: int | None = 4
    max_regression: str = "2.5%"
    confidence: float = 0.99
    regression_metrics: str = "output_throughput,median_tpot_ms,median_e2el_ms"

    @property
    def compares(self) -> bool:
        """Whether ``regression_metrics`` are needed."""
        return True


@dataclass(frozen=True)
class BenchSweepConfig(BenchServeConfig):
    """``llmctl bench sweep``: one load after another, on one server or on ours with options that vary.

    ``request_rates``, ``concurrencies``: numbers after commas, one of the two varies. ``engine``: what our own server
    serves; "": the server at ``base_url``. ``vary``: ``OPTION=VALUE,VALUE`` of ``llmctl serve``. ``quality``: a YAML
    file of ``llmctl eval``'s options.
    """

    request_rates: str | None = None
    concurrencies: str | None = None
    engine: str = ""
    vary: tuple[str, ...] = ()
    ready_timeout: float = 300.0
    find_max: bool = False
    max_duration: float | None = None
    resolution: str = "5%"
    price_per_hour: float | None = None
    quality: str | None = None
    html: str | None = None
    svg: str | None = None


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
    batching: str = "continuous"
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
class BenchProfileConfig(EngineOptions):
    """``llmctl bench profile``: where the steps of an engine spend their time. Numbers after commas are texts.

    ``prefill``, ``contexts`` None: 512, and 512 to 8192 doubling, as far as the engine takes them.
    """

    only: str = "decode,prefill,growth"
    batches: str = "1,8,32"
    context: int = 200
    prefill: int | None = None
    contexts: str | None = None
    steps: int = 50
    from_source: bool = False
    svg: str | None = None


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
