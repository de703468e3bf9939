"""``llmctl bench compare``: two servers or engines against each other, in turns, until it is known which is worse."""

from __future__ import annotations

import sys
from functools import partial

from llmctl.bench.config import BenchCompareConfig
from llmctl.cli.bench_exit import finish
from llmctl.cli.bench_options import BASELINE, OUTPUT, SERVE, Table, command_of, option
from llmctl.cli.common import guarded, print_json

_side = partial(option, panel="Sides")
_rounds = partial(option, panel="Rounds")
_gate = partial(option, panel="Gates")

_OF_SERVE = (
    *("endpoint", "backend", "model", "api_key", "header", "insecure", "request_timeout", "keep_alive"),
    *("dataset_name", "dataset_path", "num_prompts", "input_len", "output_len", "tokenizer", "ignore_eos"),
    *("temperature", "extra_body", "seed", "request_rate", "burstiness", "max_concurrency", "num_warmups"),
    *("percentile_metrics", "metric_percentiles", "goodput", "max_failed_ratio"),
)


def _key(side: str) -> object:
    return _side(
        f"--{side}-api-key",
        kind=str | None,
        metavar="KEY",
        envvar=f"LLMCTL_{side.upper()}_API_KEY",
        help=f"Sent to --{side} in place of --api-key, which is not sent to two hosts.",
    )


_SIDE_HELP = "A server's URL; or an engine, a checkpoint or demo:smollm2-135m, which is served here in its turns."
COMPARE: Table = {
    "a": _side("--a", metavar="URL|MODEL", help=_SIDE_HELP),
    "b": _side("--b", metavar="URL|MODEL", help="What is compared with --a; likewise."),
    "a_api_key": _key("a"),
    "b_api_key": _key("b"),
    "a_args": _side("--a-args", metavar="OPTIONS", help="Options of 'llmctl serve' for --a, as one text."),
    "b_args": _side("--b-args", metavar="OPTIONS", help="Options of 'llmctl serve' for --b."),
    "ready_timeout": _side("--ready-timeout", kind=float, metavar="S", help="Wait so long for a side to be ready."),
    "max_rounds": _rounds("--max-rounds", kind=int, metavar="N", help="Rounds (ABBA, BAAB, …) after which it ends."),
    "max_duration": _rounds(
        "--max-duration", kind=float | None, metavar="S", help="Begin no round that would end later than this."
    ),
    **{name: SERVE[name] for name in _OF_SERVE},
    "output_len": option(
        "--output-len",
        kind=str | None,
        metavar="N|LO-HI",
        panel="Workload",
        help="Output tokens, or a uniform range: half of bench serve's, so that the sides take turns often.",
    ),
    "max_regression": _gate(
        "--max-regression", metavar="SHARE", help="How much worse than A B may be; a regression is beyond it for sure."
    ),
    "regression_metrics": _gate("--regression-metrics", metavar="LIST", help="Metrics that decide."),
    "confidence": _gate(
        "--confidence", kind=float, metavar="SHARE", help="Of the verdict: over all looks and all metrics that decide."
    ),
    "exit_zero": BASELINE["exit_zero"],
    **{name: annotation for name, annotation in OUTPUT.items() if name != "github_action_benchmark"},
    "svg": option("--svg", kind=str | None, metavar="FILE", panel="Output", help="Chart of the ratios' intervals."),
}


@guarded
@command_of(BenchCompareConfig, COMPARE)
def compare(settings: BenchCompareConfig, json_output: bool) -> None:
    """Load A and B in turns (ABBA, BAAB, …) until it is known whether B is worse.

    Rounds end as soon as the intervals of the ratios decide: exit code 0 when B is not worse by more than
    --max-regression, 5 when it is, 6 when --max-rounds cannot tell.

    Example: llmctl bench compare --a ./engine-before --b ./engine-after --markdown compare.md --svg compare.svg

    Example: llmctl bench compare --a ./engine --b ./engine --b-args "--kv-cache-dtype int8"
    """
    from rich.console import Console

    from llmctl.bench.compare import run_compare
    from llmctl.bench.compare_chart import to_svg
    from llmctl.bench.compare_report import print_comparison, to_csv, to_markdown
    from llmctl.bench.outcome import write_reports
    from llmctl.bench.progress import Progress

    title = "llmctl bench compare"
    outcome = run_compare(settings, Progress())
    if json_output:
        print_json(outcome.result)
    print_comparison(outcome.result, title, Console(stderr=json_output, width=None))
    chart = (settings.svg, lambda: to_svg(outcome.result, title))
    for path in write_reports(
        outcome, settings, title, "compare", to_markdown=to_markdown, to_csv=to_csv, more=[chart]
    ):
        print(f"wrote {path}", file=sys.stderr)
    finish(outcome, settings.exit_zero, title)
