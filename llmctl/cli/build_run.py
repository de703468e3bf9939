"""How ``llmctl build`` runs and looks: progress on stderr, the engine and what its head costs on stdout."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from llmctl.artifact.builder import plan_output
from llmctl.artifact.loader import read_manifest
from llmctl.artifact.memory import human_bytes
from llmctl.artifact.plan import BuildPlan
from llmctl.artifact.step_progress import step_progress
from llmctl.artifact.writer import write_engine
from llmctl.cli.common import print_json
from llmctl.config import BuildConfig
from llmctl.errors import LlmctlError
from llmctl.evaluate.eval_text import read_text
from llmctl.quantize.heads import HeadComparison, compare_heads
from llmctl.text.tokenizer import Tokenizer


def run_build(settings: BuildConfig, json_output: bool) -> None:
    """Build, then measure what each ``--lm-head`` does to perplexity, and print both.

    Raises:
        LlmctlError: as ``build_engine``; a text that cannot be read. A measurement that fails is a line on stderr.
    """
    start = time.perf_counter()
    text = read_text(settings.eval_text)
    plan = plan_output(settings)
    tokenizer = Tokenizer.from_files(plan.checkpoint.aux_files(), where=str(plan.checkpoint.path))
    path = Path(settings.output)
    with step_progress() as progress:
        write_engine(plan, path, partial(progress, "weights"), partial(progress, "kernels"))
    seconds = time.perf_counter() - start
    manifest = read_manifest(path)
    size = sum(record.size for record in manifest.files.values())
    if not json_output:
        print(f"{path}: {human_bytes(size)} for {manifest.target}, {manifest.options.dtype}, built in {seconds:.1f} s")
    heads = None if text is None else _compare(path, plan, tokenizer, text, settings.eval_text)
    if not json_output:
        if heads is not None:
            _print_heads(heads)
        return
    print_json({
        "engine": str(path), "target": str(manifest.target), "dtype": manifest.options.dtype, "bytes": size,
        "checksum": manifest.checksum, "kernels": sorted({choice.kernel for choice in manifest.kernels}),
        "seconds": round(seconds, 3), "lm_head": None if heads is None else _heads_document(heads),
    })  # fmt: skip


def _compare(path: Path, plan: BuildPlan, tokenizer: Tokenizer, text: str, name: str) -> HeadComparison | None:
    try:
        with step_progress() as progress:
            return compare_heads(path, plan, tokenizer, text, name, partial(progress, "perplexity of output heads"))
    except LlmctlError as error:
        print(f"warning: the effect of --lm-head is not measured: {error.message}", file=sys.stderr)
        return None


def _heads_document(heads: HeadComparison) -> dict[str, Any]:
    return asdict(heads) | {"heads": [asdict(h) | {"change": heads.change(h)} for h in heads.heads]}


def _print_heads(heads: HeadComparison) -> None:
    from rich.console import Console
    from rich.table import Table

    text = "the built-in text" if heads.text == "builtin" else heads.text
    table = Table(title=f"output head, perplexity on {heads.tokens} tokens of {text}", title_justify="left")
    for column in ("--lm-head", "size", "perplexity", "against dense"):
        table.add_column(column, justify="left" if column == "--lm-head" else "right")
    for head in heads.heads:
        mark = " (built)" if head.lm_head == heads.chosen else ""
        change = f"{100 * heads.change(head):+.2f}%" if head.lm_head != "dense" else ""
        table.add_row(f"{head.lm_head}{mark}", human_bytes(head.bytes), f"{head.perplexity:.3f}", change)
    Console().print(table)
