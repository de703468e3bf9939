"""guidellm: short benchmarks of chats and of texts, which must count every request as answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scenarios import FEW, NO_MODEL, Endpoint, expect, play, refused, tokenizer

REQUESTS, PROMPT = 2, 24
CHAT = "/v1/chat/completions"
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


def benchmark(at: Endpoint, path: str, stream: bool = True) -> dict[str, Any]:
    """What a benchmark of synthetic prompts reports.

    Raises:
        RuntimeError: it failed, with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        backend = {"target": at.root, "model": at.model, "api_key": at.key, "request_format": path, "stream": stream}
        arguments: dict[str, dict[str, Any]] = {
            "backend": {"kind": "openai_http", **backend},
            "profile": {"kind": "synchronous"},
            "constraint": {"kind": "max_requests", "count": REQUESTS},
            "tokenizer": {"kind": "hf_auto", "model": tokenizer()},
            "data": {"kind": "synthetic_text", "prompt_tokens": PROMPT, "output_tokens": FEW},
            "output": {"kind": "json", "path": str(report)},
        }
        command = [sys.executable, "-m", "guidellm", "run", "--disable-console"]
        for name, fields in arguments.items():
            command += [f"--{name}", ",".join(f"{key}={value}" for key, value in fields.items())]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=OFFLINE)
        if done.returncode:
            raise RuntimeError(" ".join((done.stderr or done.stdout).split())[-300:])
        (found,) = json.loads(report.read_text())["benchmarks"]
        return found


def answered(report: dict[str, Any]) -> None:
    requests = report["requests"]
    errors = [request["info"]["error"] for request in requests["errored"]]
    expect(not errors, f"no errors, found {errors[:1]}")
    expect(len(requests["successful"]) == REQUESTS, f"{REQUESTS} answers, found {len(requests['successful'])}")
    counts = [request["output_metrics"]["text_tokens"] for request in requests["successful"]]
    expect(all(count == FEW for count in counts), f"{FEW} tokens of each answer, found {counts}")


def chat(at: Endpoint) -> None:
    answered(benchmark(at, CHAT, stream=False))


def stream(at: Endpoint) -> None:
    answered(benchmark(at, CHAT))


def completions(at: Endpoint) -> None:
    answered(benchmark(at, "/v1/completions"))


def responses(at: Endpoint) -> None:
    answered(benchmark(at, "/v1/responses"))


def bad_model(at: Endpoint) -> None:
    wrong = Endpoint(at.root, at.key, NO_MODEL)
    refused(lambda: answered(benchmark(wrong, CHAT)), "404")


def wrong_key(at: Endpoint) -> None:
    refused(lambda: answered(benchmark(at.with_wrong_key(), CHAT)), "401")


if __name__ == "__main__":
    play(chat, stream, completions, responses, bad_model, wrong_key)
