"""What ``bench serve`` is to do, checked: everything that can be refused before a server is asked anything."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.bench import gate, metrics
from llmctl.bench.arrivals import arrival_times
from llmctl.bench.baseline import load_baseline
from llmctl.bench.config import BenchServeConfig
from llmctl.bench.endpoint import Endpoint, make_endpoint
from llmctl.bench.outcome import Judge, ReadBaseline
from llmctl.bench.workloads import (
    DATASETS,
    LengthRange,
    SharedPrefixes,
    TokenCounter,
    WorkItem,
    file_items,
    random_items,
    sharegpt_items,
)
from llmctl.errors import UsageError

_DEFAULT_OUTPUT = "128"


@dataclass(frozen=True)
class Plan:
    """Checked options: everything that can be refused before a server is asked anything."""

    config: BenchServeConfig
    endpoint: Endpoint
    judge: Judge
    options: metrics.MetricOptions
    inputs: LengthRange
    outputs: LengthRange | None
    extra_body: dict[str, Any]
    ignore_eos: bool

    @property
    def backend(self) -> str:
        """vLLM's name of the API in use."""
        return self.config.backend or ("openai-chat" if self.endpoint.chat else "openai")


def make_plan(config: BenchServeConfig, read: ReadBaseline = load_baseline) -> Plan:
    """Check the options.

    Args:
        read: reads the baseline.

    Raises:
        UsageError: on the first that cannot be honoured.
    """
    _check_numbers(config)
    goodput = gate.parse_goodput(config.goodput)
    extra = [gate.parse_min_goodput(config.min_goodput)] if config.min_goodput is not None else []
    judge = Judge.make(config, config.regression_metrics, metrics.is_known_metric, metrics.known_metrics(), extra, read)
    if not goodput and any("goodput" in slo.metric for slo in judge.slos):
        raise UsageError(
            "--min-goodput: needs --goodput to say which requests are good", fix="such as --goodput ttft:200"
        )
    for repeat in range(config.num_repeats):
        check_arrivals(config, repeat)
    plan = Plan(
        config=config,
        endpoint=make_endpoint(
            config.base_url or f"http://{config.host}:{config.port}",
            config.endpoint,
            config.backend,
            config.api_key,
            config.header,
            not config.insecure,
        ),
        judge=judge,
        options=_metric_options(config, judge, goodput),
        inputs=LengthRange.parse(config.input_len, "input_len"),
        outputs=_output_lengths(config),
        extra_body=_parse_object(config.extra_body),
        ignore_eos=config.ignore_eos if config.ignore_eos is not None else config.dataset_name == "random",
    )
    if config.dataset_path is not None:
        make_items(plan, 0, counter=None)  # a data set that cannot be used is found before the server is waited for
    return plan


def check_arrivals(config: BenchServeConfig, repeat: int) -> None:
    """Whether a request arrives at all in one load.

    Raises:
        UsageError: none within ``--load-seconds``, or a rate or burstiness that is not positive.
    """
    times = arrival_times(config.num_prompts, config.request_rate, config.burstiness, config.seed + repeat)
    if config.load_seconds is not None and times[0] >= config.load_seconds:
        raise UsageError(
            f"--load-seconds {config.load_seconds:g}: at --request-rate {config.request_rate:g} the first request "
            f"arrives after {times[0]:.3g} s",
            fix="a longer load, or a higher rate",
            param="load_seconds",
        )


def _check_numbers(config: BenchServeConfig) -> None:
    lows = (
        ("num_prompts", 1),
        ("num_warmups", 0),
        ("max_concurrency", 1),
        ("prefix_len", 0),
        ("num_prefixes", 1),
        ("seed", 0),
    )
    for name, low in lows:
        value = getattr(config, name)
        if value is not None and value < low:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least {low}, found {value}", param=name)
    if not 0 <= config.max_failed_ratio <= 1:
        raise UsageError(f"--max-failed-ratio: expected 0 to 1, found {config.max_failed_ratio}")
    if not 0 <= config.temperature < math.inf:
        raise UsageError(f"--temperature: expected a number at least 0, found {config.temperature}")
    if not config.request_timeout > 0:
        raise UsageError(f"--request-timeout: expected seconds above 0, found {config.request_timeout}")
    if config.load_seconds is not None and not config.load_seconds > 0:
        raise UsageError(f"--load-seconds: expected seconds above 0, found {config.load_seconds}", param="load_seconds")
    if config.prefix_len and config.dataset_name != "random":
        raise UsageError(f"--prefix-len: is for --dataset-name random, not {config.dataset_name}", param="prefix_len")
    if config.num_prefixes > 1 and not config.prefix_len:
        raise UsageError("--num-prefixes: needs --prefix-len to say how long they are", param="num_prefixes")
    if not 0 <= config.ready_timeout < math.inf:
        raise UsageError(f"--ready-timeout: expected seconds, at least 0, found {config.ready_timeout}")
    if config.dataset_name not in DATASETS:
        hint = gate.suggestion(config.dataset_name, DATASETS)
        raise UsageError(f"--dataset-name '{config.dataset_name}': unknown{hint}", param="dataset_name")
    if (config.dataset_name == "random") != (config.dataset_path is None):
        need = "takes no" if config.dataset_name == "random" else "needs"
        raise UsageError(f"--dataset-name {config.dataset_name}: {need} --dataset-path", param="dataset_path")


def _output_lengths(config: BenchServeConfig) -> LengthRange | None:
    if config.output_len is None:
        return None if config.dataset_name == "sharegpt" else LengthRange.parse(_DEFAULT_OUTPUT, "output_len")
    return LengthRange.parse(config.output_len, "output_len")


def _metric_options(config: BenchServeConfig, judge: Judge, goodput: dict[str, float]) -> metrics.MetricOptions:
    """Metrics and percentiles asked for, and those that objectives and the regression check need."""
    names = [name.strip() for name in config.percentile_metrics.split(",") if name.strip()]
    for name in names:
        if name not in metrics.LATENCIES:
            hint = gate.suggestion(name, metrics.LATENCIES)
            raise UsageError(f"--percentile-metrics: unknown metric '{name}'{hint}", param="percentile_metrics")
    percentiles = set(_parse_percentiles(config.metric_percentiles))
    compared = [gate.Slo(m, "<=", 0) for m in judge.metrics] if config.compares else []
    for name, needed in gate.slo_percentiles([*judge.slos, *compared]).items():
        names.append(name)
        percentiles |= needed
    chosen = tuple(name for name in metrics.LATENCIES if name in names)
    return metrics.MetricOptions(chosen, tuple(sorted(percentiles)), goodput)


def _parse_percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 100 for value in values):
        raise UsageError(f"--metric-percentiles '{text}': expected numbers from 0 to 100 such as 50,90,99")
    return values


def _parse_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        loaded = json.loads(text)
    except ValueError:
        loaded = None
    if not isinstance(loaded, dict):
        raise UsageError(f"--extra-body '{text}': expected a JSON object", param="extra_body")
    return loaded


def make_items(plan: Plan, repeat: int, counter: TokenCounter | None) -> list[WorkItem]:
    """The workload of one repeat: the same lengths every time; random words differ, a file's prompts do not."""
    config = plan.config
    if config.dataset_name == "random":
        outputs = plan.outputs or LengthRange.parse(_DEFAULT_OUTPUT, "output_len")
        prefixes = SharedPrefixes(config.prefix_len, config.num_prefixes) if config.prefix_len else None
        return random_items(
            config.num_prompts,
            plan.inputs,
            outputs,
            seed=config.seed,
            stream=repeat,
            counter=counter,
            prefixes=prefixes,
        )
    path = Path(str(config.dataset_path))
    if config.dataset_name == "sharegpt":
        return sharegpt_items(path, config.num_prompts, plan.outputs, seed=config.seed, counter=counter)
    outputs = plan.outputs or LengthRange.parse(_DEFAULT_OUTPUT, "output_len")
    items = file_items(path, config.num_prompts, outputs, seed=config.seed, counter=counter)
    if not plan.endpoint.chat and any(item.messages for item in items):
        raise UsageError(f"--dataset-path {path}: has chat messages", fix="add --endpoint /v1/chat/completions")
    return items
