"""``llmctl bench``: serve, sweep, throughput, latency, profile; compare is in ``bench_compare.py``."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import typer

from llmctl.bench.config import (
    BenchLatencyConfig,
    BenchProfileConfig,
    BenchServeConfig,
    BenchSweepConfig,
    BenchThroughputConfig,
    ReportConfig,
)
from llmctl.cli.bench_compare import compare
from llmctl.cli.bench_exit import EXIT_CODES, INTERRUPTED, finish
from llmctl.cli.bench_options import LATENCY, PROFILE, SERVE, SWEEP, THROUGHPUT, command_of
from llmctl.cli.common import WholeNames, guarded, print_json
from llmctl.cli.model_word import with_model_word
from llmctl.config import option_of
from llmctl.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from llmctl.bench.outcome import Outcome

_Serving = TypeVar("_Serving", bound=BenchServeConfig)

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure a server (serve, sweep), two of them in turns (compare), or the engine in this process (throughput, "
    "latency), and judge what came; or find where its steps' time goes (profile).\n\n"
    "Example: llmctl bench serve --base-url http://127.0.0.1:8000 --max-concurrency 8 --slo 'p99_ttft_ms<=500'\n\n"
    "Example: llmctl bench compare --a ./engine --b http://127.0.0.1:8000 --input-len 128 --output-len 64\n\n"
    "Example: llmctl bench throughput --model ./engine --num-prompts 32 --input-len 128 --output-len 128\n\n"
    "Example: llmctl bench latency --model ./engine --batch-size 1 --input-len 128 --output-len 64",
    epilog=EXIT_CODES,
)


@app.command("serve", cls=WholeNames, epilog=EXIT_CODES, context_settings={"allow_extra_args": True})
@guarded
@command_of(BenchServeConfig, SERVE)
def serve(ctx: typer.Context, settings: BenchServeConfig, json_output: bool) -> None:
    """Load an OpenAI-compatible server and judge what comes back: TTFT, TPOT, ITL, end-to-end, throughput.

    Example: llmctl bench serve --base-url http://127.0.0.1:8000 --input-len 32-256 --max-concurrency 8
    --slo "p99_ttft_ms<=500" --goodput "ttft:300 tpot:50" --min-goodput 95% --junit bench.xml
    """
    from llmctl.bench.progress import Progress
    from llmctl.bench.serve import run_serve

    settings = _sort_out(ctx.args, settings)
    progress = Progress()
    try:
        outcome, plan = run_serve(settings, progress)
    finally:
        progress.stop()
    _finish(outcome, settings, "llmctl bench serve", plan.backend, json_output)


@app.command("sweep", cls=WholeNames, epilog=EXIT_CODES, context_settings={"allow_extra_args": True})
@guarded
@command_of(BenchSweepConfig, SWEEP)
def sweep(ctx: typer.Context, settings: BenchSweepConfig, json_output: bool) -> None:
    """One load after another: throughput against latency, the knee, the highest load that meets the objectives.

    Example: llmctl bench sweep --base-url http://127.0.0.1:8000 --max-concurrency 1,2,4,8,16 --html sweep.html

    Example: llmctl bench sweep --engine ./engine --find-max --slo "p99_ttft_ms<=500"

    Example: llmctl bench sweep --engine ./engine --vary max-num-seqs=8,32 --vary threads=1,2 --repeats 3
    """
    from rich.console import Console

    from llmctl.bench.outcome import write_reports
    from llmctl.bench.sweep import run_sweep
    from llmctl.bench.sweep_charts import to_svg
    from llmctl.bench.sweep_page import to_html
    from llmctl.bench.sweep_report import found_lines, to_csv, to_markdown
    from llmctl.bench.sweep_view import NOTE, SweepView, tables
    from llmctl.bench.table import print_verdict

    title = "llmctl bench sweep"
    _check_whose_server(ctx, settings)
    outcome = run_sweep(_sort_out(ctx.args, settings), SweepView())
    if json_output:
        print_json(outcome.result)
    console = Console(stderr=json_output)
    for table in tables(outcome.result["points"]):
        console.print(table)
    for line in (NOTE, *found_lines(outcome.result)):
        console.print(line, markup=False, highlight=False)
    print_verdict(outcome.result, console)
    more = [(settings.html, lambda: to_html(outcome.result, title)), (settings.svg, lambda: to_svg(outcome.result))]
    for path in write_reports(outcome, settings, title, "sweep", to_markdown=to_markdown, to_csv=to_csv, more=more):
        print(f"wrote {path}", file=sys.stderr)
    finish(outcome, settings.exit_zero, title)


@app.command("throughput", cls=WholeNames, epilog=EXIT_CODES)
@guarded
@with_model_word
@command_of(BenchThroughputConfig, THROUGHPUT)
def throughput(settings: BenchThroughputConfig, json_output: bool) -> None:
    """All requests at once through the engine in this process: tokens a second, prefill and decode apart.

    Example: llmctl bench throughput --model ./engine --num-prompts 32 --input-len 32-256 --output-len 128
    --slo "decode_tokens_per_second>=200"
    """
    from llmctl.bench.offline import run_throughput
    from llmctl.bench.progress import Progress

    outcome = run_throughput(settings, Progress())
    _finish(outcome, settings, "llmctl bench throughput", "throughput", json_output)


@app.command("latency", cls=WholeNames, epilog=EXIT_CODES)
@guarded
@with_model_word
@command_of(BenchLatencyConfig, LATENCY)
def latency(settings: BenchLatencyConfig, json_output: bool) -> None:
    """One batch through the engine in this process, again and again: its latency and percentiles.

    Example: llmctl bench latency --model ./engine --batch-size 1 --input-len 128 --output-len 128 --num-iters 10
    """
    from llmctl.bench.offline import run_latency
    from llmctl.bench.progress import Progress

    outcome = run_latency(settings, Progress())
    _finish(outcome, settings, "llmctl bench latency", "latency", json_output)


@app.command("profile", cls=WholeNames)
@guarded
@with_model_word
@command_of(BenchProfileConfig, PROFILE)
def profile(settings: BenchProfileConfig, json_output: bool) -> None:
    """Where a step's time goes, by kind of op (by kernel on a GPU), against what this machine can read and multiply.

    Example: llmctl bench profile --model ./engine --threads 2 --svg profile.svg
    """
    from pathlib import Path

    from rich.console import Console

    from llmctl.bench.outcome import check_file
    from llmctl.bench.profile_report import print_profile, to_svg
    from llmctl.bench.report import write_text
    from llmctl.bench.step_profile import run_profile

    check_file("svg", settings.svg)
    result = run_profile(settings, lambda line: print(line, file=sys.stderr, flush=True))
    if json_output:
        print_json(result)
    print_profile(result, Console(stderr=json_output))
    if settings.svg:
        write_text(Path(settings.svg), to_svg(result))
        print(f"wrote {settings.svg}", file=sys.stderr)
    if result["interrupted"]:
        print(INTERRUPTED, file=sys.stderr)
        raise typer.Exit(int(ExitCode.INTERRUPTED))


app.command("compare", cls=WholeNames, epilog=EXIT_CODES)(compare)


def _sort_out(more: list[str], settings: _Serving) -> _Serving:
    """vLLM's ``--goodput a:1 b:2`` and ``--metadata k=v k2=v2`` leave words behind; put them where they belong."""
    goodput, metadata = settings.goodput, settings.metadata
    for word in more:
        if goodput and re.fullmatch(r"\w+:[\d.]+", word):
            goodput += (word,)
        elif metadata and re.fullmatch(r"[\w.-]+=.*", word):
            metadata += (word,)
        else:
            raise UsageError(f"unexpected argument '{word}'")
    return replace(settings, goodput=goodput, metadata=metadata)


def _check_whose_server(ctx: typer.Context, settings: BenchSweepConfig) -> None:
    """Refuse what names another server beside our own, but a key that the environment has for others.

    Raises:
        UsageError.
    """
    if not settings.engine:
        return
    for name in ("host", "port", "api_key", "insecure"):
        source = ctx.get_parameter_source(name)
        if source is not None and source.name not in ("DEFAULT", "ENVIRONMENT"):
            option = option_of(name)
            raise UsageError(
                f"{option}: is of another server, and --engine starts one here", fix=f"leave {option} out", param=name
            )


def _finish(outcome: Outcome, settings: ReportConfig, title: str, backend: str, json_output: bool) -> None:
    """Print the result, write the files (in this order: a full disk must not lose a run), exit with the verdict."""
    from rich.console import Console

    from llmctl.bench.outcome import write_reports
    from llmctl.bench.table import print_result

    if json_output:
        print_json(outcome.result)
    # With --json, stdout holds the document alone and the table goes to stderr.
    print_result(outcome.result, title, Console(stderr=json_output, width=None))
    for path in write_reports(outcome, settings, title, backend):
        print(f"wrote {path}", file=sys.stderr)
    finish(outcome, settings.exit_zero, title)
