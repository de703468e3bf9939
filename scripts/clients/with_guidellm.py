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
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


def benchmark(at: Endpoint, kind: str, **options: Any) -> dict[str, Any]:
    """What a benchmark of synthetic prompts reports.

    Raises:
        RuntimeError: it failed, with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "target": at.root,
            "model": at.model,
            "backend-kwargs": json.dumps({"api_key": at.key, **options}),
            "request-type": kind,
            "profile": "synchronous",
            "max-requests": REQUESTS,
            "data": f"prompt_tokens={PROMPT},output_tokens={FEW}",
            "processor": tokenizer(),
            "output-path": str(Path(folder) / "report.json"),
        }
        command = [sys.executable, "-m", "guidellm", "benchmark", "run", "--disable-console"]
        command += [f"--{name}={value}" for name, value in arguments.items()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=OFFLINE)
        if done.returncode:
            raise RuntimeError(" ".join((done.stderr or done.stdout).split())[-300:])
        (found,) = json.loads((Path(folder) / "report.json").read_text())["benchmarks"]
        return found


def answered(report: dict[str, Any]) -> None:
    requests = report["requests"]
    expect(not requests["errored"], f"no errors, found {str(requests['errored'])[:200]}")
    expect(len(requests["successful"]) == REQUESTS, f"{REQUESTS} answers, found {len(requests['successful'])}")
    counts = [request["output_metrics"]["text_tokens"] for request in requests["successful"]]
    expect(all(count == FEW for count in counts), f"{FEW} tokens of each answer, found {counts}")


def chat(at: Endpoint) -> None:
    answered(benchmark(at, "chat_completions", stream=False))


def stream(at: Endpoint) -> None:
    answered(benchmark(at, "chat_completions"))


def completions(at: Endpoint) -> None:
    answered(benchmark(at, "text_completions"))


def bad_model(at: Endpoint) -> None:
    wrong = Endpoint(at.root, at.key, NO_MODEL)
    refused(lambda: answered(benchmark(wrong, "chat_completions")), "404")


def wrong_key(at: Endpoint) -> None:
    refused(lambda: benchmark(at.with_wrong_key(), "chat_completions"), "401")


if __name__ == "__main__":
    play(chat, stream, completions, bad_model, wrong_key)
