"""What lm-evaluation-harness makes of the server's log-probabilities of prompts, against transformers.

One test sends its requests and reads the answers as lm_eval 0.4.13 does (``LocalCompletionsAPI`` in
``models/openai_completions.py``, ``TemplateAPI`` in ``models/api_models.py``); the other, a slow one, runs lm_eval
itself. LM_EVAL names a Python that has it; without, it is installed into an environment of its own.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from fixtures import ServerProcess

from llmctl.text.tokenizer import Tokenizer

TASKS = Path(__file__).parent / "lm_eval"
VERSION = "0.4.13"
MODEL = "tiny-llama"


@dataclass(frozen=True)
class Pair:
    """A context and what may follow it."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Scored:
    """The continuation's log-probability, and whether it is what greedy decoding yields."""

    logprob: float
    greedy: bool


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def pairs() -> list[Pair]:
    """All that is scored: the items of ``greedy``, then every choice of those of ``choices``."""
    found = [Pair(item["context"], item["continuation"]) for item in read("greedy")]
    return found + [Pair(item["context"], " " + choice) for item in read("choices") for choice in item["choices"]]


def metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """lm_eval's, of the scores of ``pairs``."""
    rest = iter(scored)
    greedy = [next(rest) for _ in read("greedy")]
    right, right_by_length = [], []
    for item in read("choices"):
        sums = [next(rest).logprob for _ in item["choices"]]
        lengths = [len(choice) for choice in item["choices"]]
        by_length = [total / length for total, length in zip(sums, lengths, strict=True)]
        right.append(sums.index(max(sums)) == item["gold"])
        right_by_length.append(by_length.index(max(by_length)) == item["gold"])
    return {
        "greedy acc": sum(s.greedy for s in greedy) / len(greedy),
        "greedy perplexity": math.exp(-sum(s.logprob for s in greedy) / len(greedy)),
        "choices acc": sum(right) / len(right),
        "choices acc_norm": sum(right_by_length) / len(right_by_length),
    }


def encoded(tokenizer: Tokenizer, pair: Pair) -> tuple[list[int], int]:
    """``_encode_pair``: tokens of context and continuation, and how many are the context's."""
    stripped = pair.context.rstrip()
    whole = tokenizer.encode(pair.context + pair.continuation, add_special_tokens=False)
    return whole, len(tokenizer.encode(stripped, add_special_tokens=False))


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[Scored]:
    """By transformers, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    tokenizer = Tokenizer.from_folder(tiny_llama)
    found = []
    for pair in pairs():
        ids, context = encoded(tokenizer, pair)
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, context - 1 : -1], -1)
        targets = torch.tensor(ids[context:])
        total = logprobs.gather(1, targets[:, None]).sum()
        found.append(Scored(float(total), bool((logprobs.argmax(-1) == targets).all())))
    return found


@pytest.mark.parametrize("batch", [1, 7])
def test_requests_and_parsing_of_lm_eval(
    server: ServerProcess, tiny_llama: Path, expected: list[Scored], batch: int
) -> None:
    tokenizer = Tokenizer.from_folder(tiny_llama)
    inputs = [encoded(tokenizer, pair) for pair in pairs()]
    found: list[Scored] = []
    for first in range(0, len(inputs), batch):
        chunk = inputs[first : first + batch]
        status, out = server.post(
            "/v1/completions",
            {
                "model": MODEL,
                "prompt": [ids for ids, _ in chunk],
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 1,
                "seed": 1234,
                "echo": True,
            },
        )
        assert status == 200, out
        found += parse_logprobs(out, [context for _, context in chunk])
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert mine.greedy == theirs.greedy
    wanted = metrics(expected)
    assert metrics(found) == pytest.approx(wanted, rel=1e-4)
    assert all(0 < wanted[name] < 1 for name in ("greedy acc", "choices acc", "choices acc_norm"))


def parse_logprobs(out: dict[str, Any], context_lengths: list[int]) -> list[Scored]:
    """``LocalCompletionsAPI.parse_logprobs``; the last token is the generated one."""
    found = []
    for choice, length in zip(sorted(out["choices"], key=itemgetter("index")), context_lengths, strict=True):
        own = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        greedy = all(token == max(top.values()) for token, top in zip(own, tops, strict=True))
        found.append(Scored(sum(own), greedy))
    return found


@pytest.fixture(scope="module")
def lm_eval_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has lm_eval."""
    named = os.environ.get("LM_EVAL")
    if named is not None:
        return named
    folder = tmp_path_factory.mktemp("lm_eval")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", f"lm_eval[api]=={VERSION}", "transformers"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(
            f"lm_eval {VERSION} cannot be installed (set LM_EVAL to a Python that has it): {done.stderr[-500:]}"
        )
    return python


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("batch", "concurrent"), [(1, 1), (5, 1), (1, 4)])
def test_lm_eval_itself(
    server: ServerProcess,
    tiny_llama: Path,
    expected: list[Scored],
    lm_eval_python: str,
    tmp_path: Path,
    batch: int,
    concurrent: int,
) -> None:
    arguments = f"model={MODEL},base_url={server.url}/v1/completions,tokenizer_backend=huggingface"
    arguments += f",tokenizer={tiny_llama},num_concurrent={concurrent}"
    command = [lm_eval_python, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    command += ["--batch_size", str(batch), "--tasks", "greedy,choices", "--include_path", str(TASKS)]
    command += ["--output_path", str(tmp_path / "results.json")]
    done = subprocess.run(
        command, cwd=TASKS, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob("results*.json")
    results = json.loads(written.read_text())["results"]
    found = {name: results[name.split()[0]][f"{name.split()[1]},none"] for name in metrics(expected)}
    assert found == pytest.approx(metrics(expected), rel=1e-4)
