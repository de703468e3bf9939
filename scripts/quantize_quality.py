#!/usr/bin/env python3
"""Perplexity of a model before and after quantization, as a table and JSON; fails when the methods are out of order.

    python scripts/quantize_quality.py --text eval.txt --bits 3 --group-size 64 --max-tokens 20000

Quantizes with each method, measures perplexity through the engine, and exits with 1 unless
``fp <= awq, gptq < rtn``. Stdout holds the table and then one JSON document (only that with ``--json``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmctl.config import QUANTIZED_GROUP, QuantizeConfig
from llmctl.errors import ExitCode, LlmctlError

_D = QuantizeConfig()


def main() -> int:
    """Run the measurement; the process's exit code."""
    args = _parser().parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="llmctl-quality-") as scratch:
            result = measure(args, Path(args.work or scratch))
    except LlmctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: {args.text}: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)
    if not args.json:
        _print_table(result)
    print(json.dumps(result, indent=2))
    for line in result["violations"]:
        print(f"out of order: {line}", file=sys.stderr)
    return 1 if result["violations"] else 0


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Quantize and score with every method; the result as JSON data."""
    import torch

    from llmctl.checkpoint.opening import open_checkpoint
    from llmctl.checkpoint.resolve import resolve_model
    from llmctl.evaluate.divergence import measure_divergence
    from llmctl.quantize.driver import quantize_checkpoint
    from llmctl.evaluate.perplexity import Protocol, measure_perplexity

    if args.threads:
        torch.set_num_threads(args.threads)
    text = Path(args.text).read_text(encoding="utf-8")
    protocol = Protocol(args.context, args.stride or args.context, args.max_tokens)
    model = resolve_model(args.model)
    original = open_checkpoint(model, widen=True)
    rows = [{"method": "fp", **_scored(measure_perplexity(original, text, protocol).to_json())}]
    _say(rows[-1])
    for method in args.methods.split(","):
        output = work / f"{model.stem}-{method}-{args.bits}bit"
        config = QuantizeConfig(
            model=str(model),
            output=str(output),
            method=method,
            bits=args.bits,
            group_size=args.group_size,
            symmetric=args.symmetric,
            calib=args.calib,
            calib_samples=args.calib_samples,
            calib_length=args.calib_length,
            seed=args.seed,
        )
        started = time.monotonic()
        report = quantize_checkpoint(config)
        seconds = time.monotonic() - started
        quantized = open_checkpoint(output)
        row = {"method": method, **_scored(measure_perplexity(quantized, text, protocol).to_json())}
        row |= {"bits_per_weight": report.bits_per_weight, "quantize_seconds": round(seconds, 1)}
        row["calibration"] = report.calibration
        if args.kl_tokens:
            kl_protocol = Protocol(args.context, args.context, args.kl_tokens)
            row["kl_divergence"] = measure_divergence(original, quantized, text, kl_protocol).kl
        rows.append(row)
        _say(row)
    return {
        "model": args.model,
        "bits": args.bits,
        "group_size": args.group_size,
        "protocol": measure_protocol(rows[0], args),
        "results": rows,
        "violations": violations({row["method"]: row["perplexity"] for row in rows}),
    }


def measure_protocol(row: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What makes the perplexities comparable."""
    keys = ("context", "stride", "tokens", "scored_tokens", "text_sha256", "tokenizer_sha256")
    return {"text": Path(args.text).name, **{key: row[key] for key in keys}}


def violations(perplexity: dict[str, float]) -> list[str]:
    """Which parts of ``fp <= awq, gptq < rtn`` do not hold among the methods measured."""
    found = []
    for method in ("awq", "gptq"):
        if method in perplexity and not perplexity["fp"] <= perplexity[method]:
            found.append(f"fp {perplexity['fp']:.3f} > {method} {perplexity[method]:.3f}")
        if method in perplexity and "rtn" in perplexity and not perplexity[method] < perplexity["rtn"]:
            found.append(f"{method} {perplexity[method]:.3f} >= rtn {perplexity['rtn']:.3f}")
    return found


def _scored(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "perplexity": round(result["perplexity"], 4)}


def _say(row: dict[str, Any]) -> None:
    print(f"{row['method']}: perplexity {row['perplexity']}", file=sys.stderr, flush=True)


def _print_table(result: dict[str, Any]) -> None:
    protocol = result["protocol"]
    print(
        f"{result['model']}, {result['bits']} bits, group {result['group_size']}; {protocol['text']}: "
        f"{protocol['scored_tokens']} tokens scored, context {protocol['context']}, stride {protocol['stride']}, "
        f"tokenizer {protocol['tokenizer_sha256'][:12]}"
    )
    print(f"{'method':8} {'perplexity':>10} {'x fp':>7} {'KL/token':>9} {'bits/weight':>11} {'seconds':>8}")
    base = result["results"][0]["perplexity"]
    for row in result["results"]:
        kl = f"{row['kl_divergence']:.4f}" if "kl_divergence" in row else "-"
        bits = f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else "16"
        print(
            f"{row['method']:8} {row['perplexity']:10.3f} {row['perplexity'] / base:7.3f} {kl:>9} {bits:>11} "
            f"{row.get('quantize_seconds', '-'):>8}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--model", default="demo:smollm2-135m", help="checkpoint folder, .gguf, demo name or hub id")
    parser.add_argument("--methods", default="rtn,awq,gptq", help="comma-separated (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=QUANTIZED_GROUP)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--calib", default=_D.calib, help="as llmctl quantize --calib (default: %(default)s)")
    parser.add_argument("--calib-samples", type=int, default=_D.calib_samples)
    parser.add_argument("--calib-length", type=int, default=_D.calib_length)
    parser.add_argument("--seed", type=int, default=_D.seed)
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: the context)")
    parser.add_argument("--max-tokens", type=int, default=20_000, help="leading tokens used (default: %(default)s)")
    parser.add_argument("--kl-tokens", type=int, default=0, help="leading tokens for KL divergence (default: off)")
    parser.add_argument("--work", metavar="DIR", help="keep the quantized checkpoints there")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
