"""Part ``http``: ``llmctl serve`` with its own defaults on a really written engine folder, loaded by ``llmctl bench``'s
client."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_check.loads import MANY, ONE, Load
from engine_check.models import Model
from engine_check.supervise import Budget, Emit, LeftOut

SERVER_PACKAGES = (
    "aiohttp", "httptools", "jinja2", "msgspec", "prometheus_client", "psutil", "pydantic", "rich",
    "safetensors", "starlette", "tokenizers", "typer", "uvicorn", "uvloop", "yaml",
)  # fmt: skip


def missing_packages() -> list[str]:
    """Those of the server's packages that cannot be imported here."""
    return [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]


def start_writing(model: Model, output: Path) -> subprocess.Popen[bytes]:
    """Have the engine folder written by a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "engine_check.folder", str(output), model.shape, model.kind, model.arch],
        cwd=Path(__file__).parent.parent, start_new_session=True,
    )  # fmt: skip


def written_mark(folder: Path) -> Path:
    """The file that says how many seconds the folder took, there when it is whole."""
    return folder.parent / f"{folder.name}.written"


def wait_written(folder: Path, budget: Budget) -> float:
    """Seconds that the folder took to write.

    Raises:
        LeftOut: it is not there in time.
    """
    while not written_mark(folder).exists():
        if not budget.holds(20):
            raise LeftOut("the engine folder was not written in time")
        time.sleep(0.1)
    return float(written_mark(folder).read_text())


def serve_over_http(model: str, folder: Path, budget: Budget, emit: Emit, loads: Sequence[Load] = (ONE, MANY)) -> None:
    """Start twice (the second time every file has been read before), serve, and take the start apart.

    Raises:
        LeftOut: packages that the server needs are not installed.
    """
    missing = missing_packages()
    if missing:
        raise LeftOut(f"packages of the server are not installed: {', '.join(missing)}")
    from served import serving

    path = ["models", model, "http"]
    emit([*path, "folder written in s"], wait_written(folder, budget))
    began = time.perf_counter()
    with serving(str(folder)) as server:
        emit([*path, "first start to ready s"], time.perf_counter() - began)
        for load in loads:
            if budget.holds(8):
                emit([*path, str(load.at_once)], send(server.url, folder, load))
    if budget.holds(8):
        began = time.perf_counter()
        with serving(str(folder)):
            emit([*path, "start to ready s"], time.perf_counter() - began)
    if budget.holds(6):
        emit([*path, "stages of a start s"], stages(folder))


def send(url: str, tokenizer: Path, load: Load) -> dict[str, Any]:
    """A load over HTTP: ``llmctl bench serve``'s figures.

    Raises:
        RuntimeError: requests that failed or ended short.
    """
    from llmctl.bench.config import BenchServeConfig
    from llmctl.bench.progress import Progress
    from llmctl.bench.serve import run_serve

    config = BenchServeConfig(
        base_url=url, tokenizer=str(tokenizer), input_len=str(load.tokens_in), output_len=str(load.tokens_out),
        num_prompts=load.at_once, max_concurrency=load.at_once, repeats=load.repeats, keep_alive=True,
        num_warmups=min(load.at_once, 8),
    )  # fmt: skip
    result = run_serve(config, Progress())[0].result
    if result["failed"] or result["short_outputs"]:
        raise RuntimeError(f"{result['failed']} requests failed, {result['short_outputs']} ended short")
    rates = [repeat["output_throughput"] for repeat in result["repeats"]]
    firsts = [repeat["median_ttft_ms"] for repeat in result["repeats"]]
    return {
        "way": "over HTTP, llmctl serve and llmctl bench serve's client", "load": load.name, "rounds": load.repeats,
        "tok/s": statistics.median(rates), "tok/s range": [min(rates), max(rates)],
        "TTFT ms": statistics.median(firsts), "TTFT ms range": [min(firsts), max(firsts)],
        "between tokens ms": result["median_itl_ms"], "client's share of a core":
        result["client"]["cpu_share_of_one_core"],
    }  # fmt: skip


def stages(folder: Path) -> dict[str, float]:
    """Seconds of each stage of opening the engine, in a process of its own.

    Raises:
        RuntimeError: it does not open.
    """
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "engine_check.stages", str(folder), repr(began)], capture_output=True, text=True,
        cwd=Path(__file__).parent.parent, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"stages of a start: {done.stderr.strip()[-300:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
