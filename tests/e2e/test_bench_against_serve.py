"""``llmctl bench serve`` against a real ``llmctl serve``."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from fixtures import ServerProcess
from typer.testing import CliRunner

from llmctl.bench.readiness import FIRST_REQUEST
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
    _, first = server.post("/tokenize", {"prompt": FIRST_REQUEST.prompt})  # asked once, to see that it answers
    assert gained == [
        doc["total_input_tokens"] + first["count"],
        doc["total_output_tokens"] + FIRST_REQUEST.output_tokens,
    ]


def test_an_objective_that_is_missed(server: ServerProcess) -> None:
    assert bench(server, "--slo", "p99_ttft_ms<=0.001")[0] == 4


@pytest.mark.slow
def test_engines_are_compared(tiny_engine: Path, tmp_path: Path) -> None:
    """Two rounds, with servers that are started for their visits and gone after them."""
    small = ("--num-prompts", "3", "--input-len", "8", "--output-len", "4", "--max-rounds", "2")
    options = ("--b-args", "--max-num-seqs 2", "--csv", str(tmp_path / "c.csv"), "--json")
    result = CliRunner().invoke(
        app, ["bench", "compare", "--a", str(tiny_engine), "--b", str(tiny_engine), *small, *options]
    )
    doc = json.loads(result.stdout)
    assert doc["num_rounds"] == 2
    assert (doc["a"]["failed"], doc["b"]["failed"], doc["completed"]) == (0, 0, 2 * 4 * 3)
    assert doc["ratios"]["output_throughput"]["ratio"] > 0
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + 8
