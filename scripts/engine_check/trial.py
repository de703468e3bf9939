"""Part ``trial``: another program's figures on the same card in the same run, and how the runtime's compare to them.

The program is any command that writes ``trial.json`` into the folder that the variable ``OUT`` names:
``results["w4 B1 L512"]["ms"]`` is a decode step of one sequence at 512 positions with 4-bit weights (``bfloat16`` with
dense ones), ``results["w4 prefill 512"]`` a prompt, its best time the least of ``graph ms`` and ``eager ms``.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KINDS = {"w4": "4-bit", "bfloat16": "bf16"}


def run_trial(command: str, output: Path, seconds: float) -> dict[str, Any]:
    """Run the command, for so long at most, and read what it has written by then.

    Raises:
        RuntimeError: it wrote nothing.
    """
    output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OUT": str(output), "TRIAL_SECONDS": str(int(seconds * 0.8))}
    with (output / "output.txt").open("w") as log:
        try:
            code = subprocess.run(
                command, shell=True, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=seconds, check=False
            ).returncode
            ending = f"exit code {code}"
        except subprocess.TimeoutExpired:
            ending = f"ended after {seconds:.0f} s"
    path = output / "trial.json"
    if not path.exists():
        raise RuntimeError(f"{ending}, and no trial.json: {(output / 'output.txt').read_text()[-300:]}")
    return {"ending": ending, **_read(json.loads(path.read_text()))}


def _read(document: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds by our own names: decode and prefill of each kind."""
    decode: dict[str, dict[str, float]] = {}
    prefill: dict[str, dict[str, float]] = {}
    for name, found in document["results"].items():
        word, _, rest = name.partition(" ")
        if word not in KINDS or not isinstance(found, Mapping):
            continue
        if rest.startswith("prefill ") and "eager ms" in found:
            best = min(found[key] for key in ("eager ms", "graph ms") if key in found)
            prefill.setdefault(KINDS[word], {})[rest.removeprefix("prefill ")] = best
        elif "ms" in found and "graph for" not in rest:
            decode.setdefault(KINDS[word], {})[rest] = found["ms"]
    return {"decode": decode, "prefill": prefill, "problems": list(document.get("problems", ()))}


def ratios(results: Mapping[str, Any], shape: str = "Llama-3-8B") -> dict[str, float]:
    """Ours over the trial's time of every case that both measured; below 1 ours is faster."""
    trial, models = results.get("trial", {}), results.get("models", {})
    found = {}
    for part in ("decode", "prefill"):
        for kind, cases in trial.get(part, {}).items():
            ours = models.get(f"{shape} {kind}", {}).get(part, {})
            for case, ms in cases.items():
                if case in ours:
                    label = case if part == "decode" else f"prefill {case}"
                    found[f"{kind} {label}"] = ours[case]["ms"] / ms
    return found
