#!/usr/bin/env python3
"""How far quantized models are from the original: a Markdown table of methods, over calibration texts and seeds.

    python scripts/quantize_table.py --text wiki.test.txt --calib wiki.train.txt --calib self --seeds 0,1,2

Every case is quantized and compared with the original in float32 on ``--windows`` windows spread over the text. A row
is one case with one calibration text: means over the seeds, with the standard error over windows of the first seed and,
for several seeds, their range; it is printed once all of them are there. ``--results FILE`` keeps what is measured, a
JSON object a line, and skips what it has, so that a run that was stopped goes on; what other code has made is measured
again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from md_table import print_table
from trial_options import chosen, work_folder

from llmctl.config import QuantizeConfig
from llmctl.errors import ExitCode, LlmctlError
from llmctl.quantize.methods import method_of
from llmctl.quantize.workfolder import code_version

if TYPE_CHECKING:
    from llmctl.checkpoint.reader import Checkpoint
    from llmctl.evaluate.distributions import CheckpointDistributions, Window

HEAD = ("case", "calibration", "bits/weight", "KL", "KL, seeds", "ΔNLL", "top-1", "seconds")
_BASE = QuantizeConfig(group_size=64, symmetric=False)
CASES = {
    f"{method}-{bits}bit-{grid}": replace(_BASE, method=method, bits=bits, symmetric=grid == "symmetric")
    for bits, grid in ((4, "asymmetric"), (4, "symmetric"), (3, "asymmetric"), (8, "symmetric"))
    for method in ("rtn", "awq", "gptq", "awq+gptq")
}
CASES |= {method: QuantizeConfig(method=method) for method in ("w8a8", "fp8", "nf4")}
CASES |= {f"{m}-3.5bpw-asymmetric": replace(_BASE, method=m, bits=None, target_bpw=3.5) for m in ("gptq", "awq+gptq")}


@dataclass(frozen=True)
class Trial:
    """One quantization to measure, and by what; ``calib`` is "" for methods that look at weights only."""

    case: str
    config: QuantizeConfig
    protocol: tuple[str | int, ...]

    @property
    def key(self) -> list[str | int]:
        """What tells it from the others of a file of results: every option and the code, but not where it ran."""
        options = asdict(replace(self.config, output="", threads=None))
        return [self.case, code_version(), json.dumps(options, sort_keys=True), *self.protocol]


def main() -> int:
    """Run the measurement; the process's exit code."""
    args = _parser().parse_args()
    try:
        wanted = trials(args)
        with work_folder(args.keep, "llmctl-quantize-table-") as folder:
            print(f"{args.model}; {Path(args.text).name}, {args.windows} windows of {args.context}; {machine()}\n")
            print_table(HEAD, map(cells, measure(wanted, args, folder)))
    except LlmctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)
    return 0


def trials(args: argparse.Namespace) -> list[list[Trial]]:
    """All that the options ask for, by row of the table; a method that reads no text once.

    Raises:
        ValueError: a case that is not known.
    """
    protocol = (Path(args.text).name, args.windows, args.context)
    found = []
    for case, config in chosen(args.only, {case: (case, config) for case, config in CASES.items()}):
        settings = replace(config, calib_length=args.calib_length, threads=args.threads)
        settings = replace(settings, model=args.model, calib_samples=args.calib_samples)
        if config.group_size is not None:
            settings = replace(settings, group_size=args.group_size)
        if not (method_of(config).calibrated or config.has_budget):
            found.append([Trial(case, replace(settings, calib="", calib_samples=0, calib_length=0), protocol)])
            continue
        found += [
            [Trial(case, replace(settings, calib=calib, seed=seed), protocol) for seed in args.seeds]
            for calib in args.calib
        ]
    return found


def measure(
    wanted: Sequence[Sequence[Trial]], args: argparse.Namespace, folder: Path
) -> Iterator[list[dict[str, Any]]]:
    """Row by row its trials' results as JSON data, from the file of results where it has them."""
    import torch

    from llmctl.checkpoint.opening import open_checkpoint
    from llmctl.checkpoint.resolve import resolve_model
    from llmctl.evaluate.distributions import CheckpointDistributions
    from llmctl.evaluate.divergence import spread_windows
    from llmctl.text.tokenizer import Tokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    original = open_checkpoint(resolve_model(args.model), widen=True)
    tokenizer = Tokenizer.from_files(original.aux_files(), where=str(original.path))
    text = Path(args.text).read_text(encoding="utf-8")
    windows = spread_windows(tokenizer.encode(text, add_special_tokens=False), args.context, args.windows)
    known = {json.dumps(row["key"]): row for row in kept(args.results)}
    reference = None
    for row in wanted:
        found = []
        for trial in row:
            if (result := known.get(json.dumps(trial.key))) is None:
                reference = reference or CheckpointDistributions(original, windows)
                result = _measured(trial, original, reference, windows, folder / f"{trial.case}-{trial.config.seed}")
                keep(args.results, result)
                said = f"{trial.case}, {trial.config.calib or 'no text'}: KL {result['kl']:.4f}"
                print(said, file=sys.stderr, flush=True)
            found.append(result)
        yield found


def _measured(
    trial: Trial, original: Checkpoint, reference: CheckpointDistributions, windows: Sequence[Window], output: Path
) -> dict[str, Any]:
    import shutil

    from llmctl.checkpoint.opening import open_checkpoint
    from llmctl.evaluate.distributions import CheckpointDistributions
    from llmctl.evaluate.divergence import divergence
    from llmctl.quantize.driver import quantize_checkpoint
    from llmctl.quantize.quality import INT8_FORMAT
    from llmctl.targets.options import INT8_PASS

    usual = QuantizeConfig()
    config = trial.config
    if not config.calib:
        config = replace(config, calib=usual.calib, calib_samples=usual.calib_samples, calib_length=usual.calib_length)
    started = time.monotonic()
    report = quantize_checkpoint(replace(config, model=str(original.path), output=str(output)))
    seconds = time.monotonic() - started
    passes = (INT8_PASS,) if report.format == INT8_FORMAT else ()
    made = CheckpointDistributions(open_checkpoint(output), windows, passes=passes)
    found = divergence(reference, made, windows)
    shutil.rmtree(output)
    row = {"key": trial.key, "case": trial.case, "calibration": Path(trial.config.calib).name or "none"}
    row["machine"] = machine()
    return {**row, "seconds": seconds, "bits_per_weight": report.bits_per_weight, **found.to_json()}


def cells(group: Sequence[dict[str, Any]]) -> list[str]:
    """The row of one case and calibration text, of the results with all seeds."""
    mean = {name: statistics.fmean(row[name] for row in group) for name in ("kl", "delta_nll", "top1", "seconds")}
    each = [row["kl"] for row in group]
    spread = f"{min(each):.4f}–{max(each):.4f}" if len(each) > 1 else "-"
    return [
        group[0]["case"],
        group[0]["calibration"],
        f"{group[0]['bits_per_weight']:.2f}",
        f"{mean['kl']:.4f} ± {group[0]['kl_error']:.4f}",
        spread,
        f"{mean['delta_nll']:+.4f} ± {group[0]['delta_nll_error']:.4f}",
        f"{mean['top1']:.3f}",
        f"{mean['seconds']:.0f}",
    ]


def kept(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, none where there is no file."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def keep(path: Path | None, row: dict[str, Any]) -> None:
    """Add a row to it."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def machine() -> str:
    """Its processor and how many cores may be used."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to compare on")
    parser.add_argument("--model", default="demo:smollm2-135m", help="checkpoint folder, .gguf, demo name or hub id")
    parser.add_argument("--only", metavar="CASES", help=f"comma-separated, of {', '.join(CASES)} (default: all)")
    parser.add_argument("--calib", action="append", required=True, help="as llmctl quantize --calib; repeatable")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0], metavar="N,N")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calib-samples", type=int, default=32)
    parser.add_argument("--calib-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="quantize there")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="JSON lines to keep results in and skip known ones"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser


if __name__ == "__main__":
    sys.exit(main())
