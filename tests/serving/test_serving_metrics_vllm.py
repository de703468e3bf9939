"""With ``--metrics-prefix vllm``, /metrics is read by what is made for vLLM 0.33: names, types, labels, buckets."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from serving.metrics_page import full_page, samples, series

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
PAGE = full_page("vllm")

# What the queries of its dashboards use: examples/observability, Grafana's and Perses'.
DASHBOARDS = {
    "vllm:e2e_request_latency_seconds_bucket": {"le", "model_name"},
    "vllm:e2e_request_latency_seconds_count": {"model_name"},
    "vllm:e2e_request_latency_seconds_sum": {"model_name"},
    "vllm:generation_tokens_total": {"model_name"},
    "vllm:inter_token_latency_seconds_bucket": {"le", "model_name"},
    "vllm:inter_token_latency_seconds_count": {"model_name"},
    "vllm:inter_token_latency_seconds_sum": {"model_name"},
    "vllm:iteration_tokens_total_count": {"model_name"},
    "vllm:kv_cache_usage_perc": {"model_name"},
    "vllm:num_requests_running": {"model_name"},
    "vllm:num_requests_waiting": {"model_name"},
    "vllm:prompt_tokens_total": {"model_name"},
    "vllm:request_decode_time_seconds_sum": {"model_name"},
    "vllm:request_generation_tokens_bucket": {"le", "model_name"},
    "vllm:request_max_num_generation_tokens_sum": {"model_name"},
    "vllm:request_prefill_time_seconds_sum": {"model_name"},
    "vllm:request_prompt_tokens_bucket": {"le", "model_name"},
    "vllm:request_queue_time_seconds_sum": {"model_name"},
    "vllm:request_success_total": {"finished_reason", "model_name"},
    "vllm:request_time_per_output_token_seconds_bucket": {"le", "model_name"},
    "vllm:request_time_per_output_token_seconds_count": {"model_name"},
    "vllm:request_time_per_output_token_seconds_sum": {"model_name"},
    "vllm:time_to_first_token_seconds_bucket": {"le", "model_name"},
    "vllm:time_to_first_token_seconds_count": {"model_name"},
    "vllm:time_to_first_token_seconds_sum": {"model_name"},
}
# What the endpoint pickers of the Gateway API inference extension and of llm-d ask for.
ENDPOINT_PICKERS = {
    "vllm:num_requests_waiting": set[str](),
    "vllm:num_requests_running": set[str](),
    "vllm:kv_cache_usage_perc": set[str](),
    "vllm:cache_config_info": {"block_size", "num_gpu_blocks"},
}

BOTH = {"model_name", "engine"}
# vllm/v1/metrics/loggers.py; of cache_config_info, those of its labels that mean something here.
TYPES = {
    "num_requests_running": ("gauge", BOTH),
    "num_requests_waiting": ("gauge", BOTH),
    "num_requests_waiting_by_reason": ("gauge", {*BOTH, "reason"}),
    "engine_sleep_state": ("gauge", {*BOTH, "sleep_state"}),
    "kv_cache_usage_perc": ("gauge", BOTH),
    "prefix_cache_queries_total": ("counter", BOTH),
    "prefix_cache_hits_total": ("counter", BOTH),
    "external_prefix_cache_queries_total": ("counter", BOTH),
    "external_prefix_cache_hits_total": ("counter", BOTH),
    "mm_cache_queries_total": ("counter", BOTH),
    "mm_cache_hits_total": ("counter", BOTH),
    "num_preemptions_total": ("counter", BOTH),
    "prompt_tokens_total": ("counter", BOTH),
    "prompt_tokens_by_source_total": ("counter", {*BOTH, "source"}),
    "prompt_tokens_cached_total": ("counter", BOTH),
    "prompt_tokens_cached_by_source_total": ("counter", {*BOTH, "source"}),
    "generation_tokens_total": ("counter", BOTH),
    "request_success_total": ("counter", {*BOTH, "finished_reason"}),
    "admission_rejections_total": ("counter", {"model_name", "reason"}),
    "request_prompt_tokens": ("histogram", BOTH),
    "request_generation_tokens": ("histogram", BOTH),
    "iteration_tokens_total": ("histogram", BOTH),
    "request_max_num_generation_tokens": ("histogram", BOTH),
    "request_params_n": ("histogram", BOTH),
    "request_params_max_tokens": ("histogram", BOTH),
    "time_to_first_token_seconds": ("histogram", BOTH),
    "inter_token_latency_seconds": ("histogram", BOTH),
    "request_time_per_output_token_seconds": ("histogram", BOTH),
    "e2e_request_latency_seconds": ("histogram", BOTH),
    "request_queue_time_seconds": ("histogram", BOTH),
    "request_inference_time_seconds": ("histogram", BOTH),
    "request_prefill_time_seconds": ("histogram", BOTH),
    "request_decode_time_seconds": ("histogram", BOTH),
    "request_num_preemptions": ("histogram", BOTH),
    "request_prefill_kv_computed_tokens": ("histogram", BOTH),
    "kv_block_lifetime_seconds": ("histogram", BOTH),
    "kv_block_idle_before_evict_seconds": ("histogram", BOTH),
    "kv_block_reuse_gap_seconds": ("histogram", BOTH),
    "lora_requests_info": ("gauge", {"max_lora", "waiting_lora_adapters", "running_lora_adapters"}),
    "cache_config_info": ("gauge", {"engine", "block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"}),
}
# prometheus-fastapi-instrumentator, as it is without options.
HTTP_TYPES = {
    "http_requests_total": ("counter", {"method", "status", "handler"}),
    "http_request_size_bytes": ("summary", {"handler"}),
    "http_response_size_bytes": ("summary", {"handler"}),
    "http_request_duration_seconds": ("histogram", {"method", "handler"}),
    "http_request_duration_highr_seconds": ("histogram", set[str]()),
}


@pytest.mark.parametrize(("name", "labels"), [*DASHBOARDS.items(), *ENDPOINT_PICKERS.items()])
def test_what_is_made_for_vllm_finds_its_series(name: str, labels: set[str]) -> None:
    assert labels <= samples(PAGE)[name]


def test_its_dashboards_find_the_model_by_a_label() -> None:
    """``label_values(model_name)``."""
    assert any("model_name" in labels for labels in samples(PAGE).values())


def not_here() -> list[str]:
    """The patterns of the documented list of what llmctl has not."""
    section = DOCS.read_text().split("## What vLLM has and llmctl has not")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("name", TYPES)
def test_every_series_of_its_is_here_as_it_has_it_or_is_said_to_be_missing(name: str) -> None:
    found = series(PAGE).get("vllm:" + name)
    missing = any(fnmatch(name.removesuffix("_total"), pattern) for pattern in not_here())
    assert (found is None) == missing
    if found is not None:
        assert found == TYPES[name]


@pytest.mark.parametrize("name", HTTP_TYPES)
def test_http_series_are_the_instrumentators(name: str) -> None:
    assert series(PAGE)[name] == HTTP_TYPES[name]


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("time_to_first_token_seconds", (0.001, 0.02, 0.25, 2.5, 160.0, 2560.0)),
        ("inter_token_latency_seconds", (0.01, 0.025, 0.075, 0.15, 0.75, 7.5, 80.0)),
        ("e2e_request_latency_seconds", (0.3, 0.8, 1.5, 15.0, 480.0, 7680.0)),
        ("request_prompt_tokens", (1, 2, 5, 10, 20000, 100000)),
        ("request_params_n", (1, 2, 5, 10, 20)),
        ("request_num_preemptions", (1, 2, 3, 4, 5, 10, 20)),
        ("iteration_tokens_total", (1, 8, 16, 128, 16384)),
    ],
)
def test_its_bucket_bounds_are_here(name: str, bounds: tuple[float, ...]) -> None:
    found = {float(le) for le in re.findall(rf'vllm:{name}_bucket{{[^}}]*le="([^"]+)"', PAGE)}
    assert set(bounds) <= found


def test_there_is_one_prefix_at_a_time() -> None:
    prefixes = {name.partition(":")[0] for name in series(PAGE) if ":" in name}
    assert prefixes == {"vllm"}
    unprefixed = {name.partition("_")[0] for name in series(PAGE) if ":" not in name}
    assert unprefixed == {"http", "process", "python"}
