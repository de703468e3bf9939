#!/usr/bin/env python3
"""QLoRA on what llmctl writes: ``quantize --method nf4``, trained on by PEFT over bitsandbytes, merged by llmctl.

    python scripts/qlora_trial.py                     # a tiny random model; the table on stdout
    python scripts/qlora_trial.py --keep ~/qlora      # environment and checkpoints are kept

transformers, bitsandbytes and PEFT (versions: ``TOOL``) run in an environment of their own, on a CPU. Each checkpoint
is trained on for a few steps; then the adapter is merged into it, and both compute the same tokens in float32. Progress
goes to stderr.

Exit codes: 0 all trained and agree within ``TOLERANCE``; 1 not so; 2 usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from parity_trials.catalog import TOOLS, Tool
from parity_trials.trials import TrialError, Trials, write_dense
from peers.contest import PeerError, Setup
from peers.venvs import install
from safetensors.torch import load_file
from torch import Tensor
from trial_options import work_folder

from llmctl.checkpoint.adapters.opening import open_merged
from llmctl.checkpoint.reader import Checkpoint
from llmctl.errors import ExitCode, LlmctlError
from llmctl.evaluate.distributions import CheckpointDistributions

KINDS = ("nf4", "nf4-double")
TOLERANCE = 1e-4
"""Of log-probabilities."""
_TRANSFORMERS = next(tool for tool in TOOLS if tool.name == "transformers")
TOOL = Tool(
    "peft",
    "train_with_peft.py",
    (*_TRANSFORMERS.groups, ("peft==0.21.2",)),
    ("peft", "transformers", "bitsandbytes"),
)


def main() -> int:
    """Run; the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo:smollm2-135m", help="whose tokenizer the random model is given (%(default)s)")
    add("--keep", type=Path, metavar="DIR", help="environment and checkpoints; the environment is reused when there")
    add("--timeout", type=float, default=900, help="seconds for each step (%(default)s)")
    add("--pip-flags", default="", help="further options of pip install")
    args = parser.parse_args()
    good = True
    try:
        with work_folder(args.keep, "llmctl-qlora-") as work:
            setup = Setup(work, args.model, tuple(range(os.cpu_count() or 1)), pip_flags=tuple(args.pip_flags.split()))
            versions = install(setup, TOOL.install, _say)
            print(", ".join(f"{name} {version}" for name, version in versions.items()))
            trials = Trials(setup, write_dense(args.model, work / "dense"), _say, args.timeout)
            for line, agrees in _tried(trials, work):
                print(line)
                good = good and agrees
    except (LlmctlError, OSError, PeerError, TrialError) as error:
        print(f"error: {error}", file=sys.stderr)
        return int(ExitCode.RUNTIME)
    return 0 if good else int(ExitCode.RUNTIME)


def _tried(trials: Trials, work: Path) -> Iterator[tuple[str, bool]]:
    """A line a kind, and whether it is good."""
    for kind in KINDS:
        base, adapter, output = trials.ours(kind), work / f"{kind}-adapter", work / f"{kind}.safetensors"
        trials.run(TOOL, str(base), str(adapter), str(output))
        apart, changed = compare(base, adapter, output)
        line = f"{kind}: trained, log-probabilities changed by up to {changed:.3g}; merged they differ by {apart:.2g}"
        yield line, apart <= TOLERANCE < changed


def compare(base: Path, adapter: Path, output: Path) -> tuple[float, float]:
    """Largest differences of log-probabilities: of PEFT's and those of the merged checkpoint; of these and the base's.

    Args:
        output: PEFT's logits f32 [T, vocab], and their tokens i32 [T].
    """
    found = load_file(output)
    tokens = found["tokens"].tolist()
    theirs = found["logits"].log_softmax(dim=-1)[:-1]
    merged = open_merged(str(base), [str(adapter)], "adapter")
    ours, before = (_log_probs(checkpoint, tokens) for checkpoint in (merged.checkpoint, merged.base))
    return float((ours - theirs).abs().max()), float((before - theirs).abs().max())


def _log_probs(checkpoint: Checkpoint, tokens: list[int]) -> Tensor:
    """f32 [T - 1, vocab], of all tokens but the first."""
    return torch.cat(list(CheckpointDistributions(checkpoint, [(tokens, len(tokens) - 1)])))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
