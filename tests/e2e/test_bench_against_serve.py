"""``llmctl bench serve`` against a real ``llmctl serve``."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
from fixtures import ServerProcess
from typer.testing import CliRunner

from llmctl.cli.main import app


def bench(server: ServerProcess, *args: str) -> tuple[int, dict[str, Any]]:
    small = ("--num-prompts", "6", "--max-concurrency", "3", "--input-len", "12-40", "--output-len", "7")
    result = CliRunner().invoke(app, ["bench", "serve", "--base-url", server.url, *small, "--json", *args])
    assert result.stdout, result.stderr
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_counts_are_the_servers(server: ServerProcess, endpoint: str) -> None:
    code, doc = bench(server, "--endpoint", endpoint, "--save-detailed")
    assert code == 0, doc["failures"]
    assert (doc["completed"], doc["failed"], doc["short_outputs"]) == (6, 0, 0)
    assert doc["output_lens"] == [7] * 6
    assert (doc["output_token_source"], doc["workload"]["prompt_length_source"]) == ("usage", "server")
    assert 0 < doc["p50_ttft_ms"] <= doc["p50_e2el_ms"]
    if endpoint == "/v1/completions":
        assert all(12 <= n <= 40 for n in doc["input_lens"]), "prompts are not of the length the server counts"
        # A token that ends inside a character waits for the rest of it, so there may be fewer chunks than tokens.
        assert all(1 <= len(gaps) <= 6 for gaps in doc["itls"])


def test_the_servers_own_counters_agree(server: ServerProcess) -> None:
    def counters() -> dict[str, float]:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        rows = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        names = ("llmctl:prompt_tokens_total", "llmctl:generation_tokens_total")
        return {n: sum(float(value) for key, value in rows if key.split("{")[0] == n) for n in names}

    before = counters()
    _, doc = bench(server, "--num-warmups", "0")
    after = counters()
    gained = [after[name] - before[name] for name in after]
    assert gained == [doc["total_input_tokens"], doc["total_output_tokens"]]


def test_an_objective_that_is_missed(server: ServerProcess) -> None:
    assert bench(server, "--slo", "p99_ttft_ms<=0.001")[0] == 4
