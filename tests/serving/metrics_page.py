"""/metrics with at least one sample of every series, and what it says of each."""

from __future__ import annotations

import os
from typing import NamedTuple

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from llmctl.serving.metrics import ServerMetrics


class Series(NamedTuple):
    """A family as /metrics shows it."""

    type: str
    labels: frozenset[str]


def full_page(prefix: str = "llmctl") -> str:
    """The text of a server to which everything that has a series of its own has happened."""
    metrics = ServerMetrics("m", prefix=prefix)
    metrics.watch(lambda: 0, os.getpid)
    metrics.set_engine(target="cpu:x86_64-amx", dtype="bfloat16", kernel_build="avx512bf16 (AMX: refused)")
    metrics.set_cache_config(block_size=16, num_gpu_blocks=8, enable_prefix_caching=True, cache_dtype="int8")
    metrics.watch_adapters(8, lambda: ({"sql", "chat"}, {"code"}))
    metrics.restarted("SIGKILL")
    metrics.http.count("GET", "/v1/models", 200, 0.1, 0, 10)
    return metrics.render()[0].decode()


def families(text: str) -> list[Metric]:
    """What prometheus_client reads in it."""
    return list(text_string_to_metric_families(text))


def series(text: str) -> dict[str, Series]:
    """Each family by the name in its TYPE line, with the labels of all its samples (but a histogram's ``le``)."""
    found = {}
    for family in families(text):
        name = family.name + "_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        found[name] = Series(family.type, frozenset(labels - {"le"} if family.type == "histogram" else labels))
    return found


def samples(text: str) -> dict[str, set[str]]:
    """Each sample's name, as a query spells it, with the labels that all samples of that name have."""
    found: dict[str, set[str]] = {}
    for family in families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, set(sample.labels)) & set(sample.labels)
    return found
