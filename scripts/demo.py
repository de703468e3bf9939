#!/usr/bin/env python3
"""The whole path on a real language model, on this machine: quantize, build, serve, ask, bench.

Runs the same commands a user would type, prints each, and ends with a table of what was measured
(also written to ``demo/summary.json``). Needs llmctl installed in the running Python; ``make demo`` sees to that.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmctl.bench.local_server import LocalServer, ServerError, running

console = Console()
QUESTION = "In one sentence: why is the sky blue?"


def llmctl(*args: str) -> list[str]:
    """The command ``llmctl ARGS`` of this Python: the script beside it, as it is reached from the current folder."""
    script = Path(sys.executable).parent / "llmctl"
    if not script.exists():
        return [sys.executable, "-m", "llmctl", *args]
    here = Path.cwd()
    return [str(script.relative_to(here) if script.is_relative_to(here) else script), *args]


def show(command: Sequence[str], end: str = "") -> None:
    """A command as it can be copied: on one line, however long, with nothing in it taken for markup."""
    console.print(f"\n$ {shlex.join(command)}{end}", style="bold cyan", soft_wrap=True, markup=False, highlight=False)


def run(*args: str) -> float:
    """Run ``llmctl ARGS``; seconds it took. Exits with its code when it fails."""
    command = llmctl(*args)
    show(command)
    start = time.perf_counter()
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)
    return time.perf_counter() - start


def request(url: str, body: dict[str, Any] | None = None, timeout: float = 120) -> Any:
    """The JSON (or None) that ``url`` answers; POSTs ``body`` when given."""
    data = json.dumps(body).encode() if body else None
    call = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=timeout) as answer:
        text = answer.read()
    return json.loads(text) if text else None


@contextmanager
def server(engine: Path, *options: str) -> Iterator[LocalServer]:
    """``llmctl serve`` on a free port, ready; shown as it was started, with what it said. Exits when it fails."""
    try:
        with running(
            llmctl("serve", str(engine), *options), tell=lambda line: console.print(line, markup=False)
        ) as started:
            show([str(word) for word in started.process.args], end=" &")
            console.print(started.announced().rstrip(), markup=False, highlight=False, soft_wrap=True)
            yield started
    except ServerError as error:
        sys.exit(f"error: {error}")


def peak_memory(pid: int) -> int:
    """Peak resident bytes of a process and its children (sum of each one's VmHWM)."""
    import psutil

    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        status = Path(f"/proc/{process.pid}/status")
        if status.exists():
            line = next((ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM")), "VmHWM: 0 kB")
            total += int(line.split()[1]) * 1024
        else:
            total += process.memory_info().rss
    return total


def question(url: str) -> list[str]:
    """A curl that asks the model QUESTION through the chat endpoint."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60, "temperature": 0}
    body["model"] = request(f"{url}/v1/models")["data"][0]["id"]
    address = f"{url}/v1/chat/completions"
    return ["curl", "--silent", "--show-error", address, "-H", "Content-Type: application/json", "-d", json.dumps(body)]


def ask(url: str) -> str:
    """The model's answer to QUESTION, by the curl that is shown; without a curl here, by the same request."""
    command = question(url)
    show(command)
    if shutil.which(command[0]):
        document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    else:
        document = request(f"{url}/v1/chat/completions", json.loads(command[-1]))
    answer = document["choices"][0]["message"]["content"].strip()
    console.print(f"Q: {QUESTION}\nA: {answer}", markup=False, highlight=False)
    return str(answer)


def bench(url: str, model: str, concurrency: int, out: Path) -> dict[str, Any]:
    """``llmctl bench serve`` at one concurrency; its JSON report."""
    run(
        *("bench", "serve", "--base-url", url, "--model", model, "--dataset-name", "random"),
        *("--input-len", "32-128", "--output-len", "32", "--ignore-eos", "--num-prompts", str(2 * concurrency)),
        *("--max-concurrency", str(concurrency), "--num-warmups", "1", "--slo", "p99_itl_ms<=2000"),
        *("--save-result", "--result-filename", str(out)),
    )
    return dict(json.loads(out.read_text()))


def folder_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def summary_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"llmctl demo: {summary['model']}, target {summary['target']}, on {os.cpu_count()} CPU(s)")
    table.add_column("step")
    table.add_column("result", justify="right")
    for step, seconds in summary["seconds"].items():
        table.add_row(step, f"{seconds:.1f} s")
    for name, size in summary["bytes"].items():
        table.add_row(name, f"{size / 2**20:.0f} MiB")
    for concurrency, row in summary["bench"].items():
        table.add_row(
            f"bench, {concurrency} at once",
            f"{row['output_throughput']:.1f} tok/s · TTFT p50 {row['median_ttft_ms']:.0f} ms"
            f" · ITL p50 {row['median_itl_ms']:.0f} ms",
        )
    return table


def target_here() -> str:
    """The ``--target`` to build for: what serve would choose, and said as it says it."""
    from llmctl.targets.table import default_target

    chosen = default_target()
    for line in chosen.said:
        console.print(f"\n{line}", markup=False)
    return chosen.spelling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder for what is made")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    quantized, engine = work / "awq-4bit", work / "engine"
    for folder in (quantized, quantized.with_name(f"{quantized.name}.partial"), engine):
        shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()

    seconds: dict[str, float] = {}
    start = time.perf_counter()
    fetch = [sys.executable, str(Path(__file__).with_name("demo_model.py"))]
    if args.model.startswith("demo:"):
        subprocess.run(fetch, check=True)
    seconds["fetch the model"] = time.perf_counter() - start
    seconds["quantize (AWQ, 4 bits, group 64)"] = run(
        *("quantize", "--model", args.model, "--method", "awq", "--bits", "4", "--group-size", "64"),
        *("--output", str(quantized)),
    )
    target = target_here()
    seconds["build"] = run("build", "--model", str(quantized), "--target", target, "--output", str(engine))
    run("inspect", str(engine))
    with server(engine) as served:
        url = served.url
        seconds["serve: start to ready"] = served.ready_seconds
        answer = ask(url)
        model = request(f"{url}/v1/models")["data"][0]["id"]
        results = {c: bench(url, model, c, work / f"bench-c{c}.json") for c in args.concurrency}
        peak = peak_memory(served.process.pid)
    seconds["everything"] = time.perf_counter() - began

    sizes = {
        "quantized checkpoint": folder_bytes(quantized),
        "engine": folder_bytes(engine),
        "server's peak memory": peak,
    }
    keys = ("output_throughput", "median_ttft_ms", "median_itl_ms", "completed", "failed")
    benches = {str(c): {k: r[k] for k in keys} for c, r in results.items()}
    summary = {
        "model": args.model,
        "target": target,
        "answer": answer,
        "seconds": seconds,
        "bytes": sizes,
        "bench": benches,
    }
    (work / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print()
    console.print(summary_table(summary))
    console.print("Now chat with it, or serve it:")
    show(llmctl("run", str(engine)))
    show(llmctl("serve", str(engine)))


if __name__ == "__main__":
    main()
