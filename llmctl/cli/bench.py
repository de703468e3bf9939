"""``llmctl bench``: serve, throughput, latency."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from llmctl.bench.config import BenchLatencyConfig, BenchServeConfig, BenchThroughputConfig, ReportConfig
from llmctl.cli import bench_options as o
from llmctl.cli.common import ConfigOption, JsonOption, guarded, print_json
from llmctl.errors import UsageError

if TYPE_CHECKING:
    from llmctl.bench.outcome import Outcome

C = TypeVar("C", bound=ReportConfig)

_S = BenchServeConfig()
_T = BenchThroughputConfig()
_L = BenchLatencyConfig()

_EXIT_CODES = "Exit codes: 0 pass, 1 run-time error, 2 usage, 3 failed requests, 4 objective missed, 5 regression."

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure a server (serve), or the engine in this process (throughput, latency), and judge the result.\n\n"
    "Example: llmctl bench serve --base-url http://127.0.0.1:8000 --max-concurrency 8 --slo 'p99_ttft_ms<=500'\n\n"
    "Example: llmctl bench throughput --model ./engine --num-prompts 32 --input-len 128 --output-len 128\n\n"
    "Example: llmctl bench latency --model ./engine --batch-size 1 --input-len 128 --output-len 64",
    epilog=_EXIT_CODES,
)


@app.command("serve", epilog=_EXIT_CODES, context_settings={"allow_extra_args": True})
@guarded
def serve(
    ctx: typer.Context,
    base_url: Annotated[
        str | None, o.option("--base-url", metavar="URL", panel="Server", help="Server; wins over --host and --port.")
    ] = _S.base_url,
    host: Annotated[str, o.option("--host", panel="Server", help="Server's host.")] = _S.host,
    port: Annotated[int, o.option("--port", panel="Server", help="Server's port.")] = _S.port,
    endpoint: Annotated[
        str | None,
        o.option(
            "--endpoint",
            metavar="PATH",
            panel="Server",
            help="/v1/completions (default) or /v1/chat/completions; both stream.",
        ),
    ] = _S.endpoint,
    backend: Annotated[
        str | None, o.option("--backend", panel="Server", help="openai, openai-chat or vllm; sets the endpoint.")
    ] = _S.backend,
    model: Annotated[
        str | None, o.option("--model", panel="Server", help="Model to ask for; by default the server's first.")
    ] = _S.model,
    api_key: Annotated[
        str | None, o.option("--api-key", envvar="OPENAI_API_KEY", panel="Server", help="Sent as bearer token.")
    ] = _S.api_key,
    header: Annotated[
        list[str] | None,
        o.option("--header", metavar="K=V", panel="Server", help="Header of every request; repeatable."),
    ] = None,
    insecure: Annotated[bool, o.option("--insecure", panel="Server", help="Do not check TLS certificates.")] = (
        _S.insecure
    ),
    ready_timeout: Annotated[
        float, o.option("--ready-timeout", metavar="S", panel="Server", help="Wait so long for the server to answer.")
    ] = _S.ready_timeout,
    request_timeout: Annotated[
        float, o.option("--request-timeout", metavar="S", panel="Server", help="A longer request has failed.")
    ] = _S.request_timeout,
    keep_alive: Annotated[
        bool,
        o.option("--keep-alive", panel="Server", help="Reuse connections; by default each request opens its own."),
    ] = _S.keep_alive,
    dataset_name: Annotated[
        str, o.option("--dataset-name", panel="Workload", help="random (distinct words), file or sharegpt.")
    ] = _S.dataset_name,
    dataset_path: Annotated[
        str | None,
        o.option(
            "--dataset-path",
            metavar="FILE",
            panel="Workload",
            help=".txt (a prompt a line), .jsonl (prompt, text or messages; output_len), ShareGPT .json.",
        ),
    ] = _S.dataset_path,
    num_prompts: Annotated[
        int, o.option("--num-prompts", panel="Workload", help="Requests a repeat.")
    ] = _S.num_prompts,
    input_len: o.InputLen = _S.input_len,
    output_len: Annotated[
        str | None,
        o.option("--output-len", metavar="N|LO-HI", panel="Workload", help="Output tokens (128), or a uniform range."),
    ] = _S.output_len,
    tokenizer: Annotated[
        str | None,
        o.option(
            "--tokenizer",
            metavar="MODEL",
            panel="Workload",
            help="Counts prompt tokens; by default the server's /tokenize does.",
        ),
    ] = _S.tokenizer,
    ignore_eos: Annotated[
        bool | None,
        o.option("--ignore-eos/--no-ignore-eos", panel="Workload", help="Ask for full outputs; default for random."),
    ] = _S.ignore_eos,
    temperature: Annotated[float, o.option("--temperature", panel="Workload", help="0 is greedy.")] = _S.temperature,
    extra_body: Annotated[
        str | None, o.option("--extra-body", metavar="JSON", panel="Workload", help="Fields added to every request.")
    ] = _S.extra_body,
    seed: o.Seed = _S.seed,
    request_rate: Annotated[
        float, o.option("--request-rate", metavar="R", panel="Load", help="Arrivals a second; inf: all at once.")
    ] = _S.request_rate,
    burstiness: Annotated[
        float,
        o.option("--burstiness", panel="Load", help="Shape of the gamma gaps: 1 Poisson, below burstier, inf even."),
    ] = _S.burstiness,
    max_concurrency: Annotated[
        int | None,
        o.option("--max-concurrency", metavar="N", panel="Load", help="Requests under way at once (closed loop)."),
    ] = _S.max_concurrency,
    num_warmups: Annotated[
        int, o.option("--num-warmups", panel="Load", help="Requests sent first and not counted.")
    ] = _S.num_warmups,
    repeats: o.Repeats = _S.repeats,
    percentile_metrics: Annotated[
        str, o.option("--percentile-metrics", metavar="LIST", panel="Metrics", help="Latencies to report.")
    ] = _S.percentile_metrics,
    metric_percentiles: Annotated[
        str, o.option("--metric-percentiles", metavar="LIST", panel="Metrics", help="Their percentiles.")
    ] = _S.metric_percentiles,
    goodput: Annotated[
        list[str] | None,
        o.option(
            "--goodput", metavar="METRIC:MS", panel="Metrics", help="What a good request is, such as ttft:200 tpot:50."
        ),
    ] = None,
    slo: o.Slo = None,
    min_goodput: Annotated[
        str | None,
        o.option("--min-goodput", metavar="N|SHARE", panel="Gates", help="Good requests a second, or a share: 95%."),
    ] = _S.min_goodput,
    max_failed_ratio: Annotated[
        float, o.option("--max-failed-ratio", metavar="SHARE", panel="Gates", help="Failed requests allowed.")
    ] = _S.max_failed_ratio,
    baseline: o.Baseline = _S.baseline,
    max_regression: o.MaxRegression = _S.max_regression,
    regression_metrics: o.RegressionMetrics = _S.regression_metrics,
    update_baseline: o.UpdateBaseline = _S.update_baseline,
    confidence: o.Confidence = _S.confidence,
    exit_zero: o.ExitZero = _S.exit_zero,
    label: o.Label = _S.label,
    metadata: o.Metadata = None,
    save_result: o.SaveResult = _S.save_result,
    result_dir: o.ResultDir = _S.result_dir,
    result_filename: o.ResultFilename = _S.result_filename,
    save_detailed: Annotated[
        bool, o.option("--save-detailed", panel="Output", help="Per-request lists in the result.")
    ] = _S.save_detailed,
    junit: o.Junit = _S.junit,
    markdown: o.Markdown = _S.markdown,
    csv: o.Csv = _S.csv,
    github_action_benchmark: o.GithubActionBenchmark = _S.github_action_benchmark,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Load an OpenAI-compatible server and judge what comes back: TTFT, TPOT, ITL, end-to-end, throughput.

    Example: llmctl bench serve --base-url http://127.0.0.1:8000 --input-len 32-256 --max-concurrency 8
    --slo "p99_ttft_ms<=500" --goodput "ttft:300 tpot:50" --min-goodput 95% --junit bench.xml
    """
    from llmctl.bench.progress import Progress
    from llmctl.bench.serve import run_serve

    values = {**locals(), **_sort_out(ctx.args, goodput or [], metadata or [])}
    settings = _settings(BenchServeConfig, values)
    progress = Progress()
    try:
        outcome, plan = run_serve(settings, progress)
    finally:
        progress.stop()
    _finish(outcome, settings, "llmctl bench serve", plan.backend, json_output)


@app.command("throughput", epilog=_EXIT_CODES)
@guarded
def throughput(
    model: o.EngineModel = _T.model,
    num_prompts: Annotated[
        int, o.option("--num-prompts", panel="Workload", help="Requests a repeat.")
    ] = _T.num_prompts,
    input_len: o.InputLen = _T.input_len,
    output_len: o.OutputLen = _T.output_len,
    seed: o.Seed = _T.seed,
    num_warmups: Annotated[
        int, o.option("--num-warmups", panel="Workload", help="Requests run first and not counted.")
    ] = _T.num_warmups,
    repeats: o.Repeats = _T.repeats,
    target: o.Target = _T.target,
    dtype: o.Dtype = _T.dtype,
    max_model_len: o.MaxModelLen = _T.max_model_len,
    block_size: o.BlockSize = _T.block_size,
    kv_cache_memory: o.KvCacheMemory = _T.kv_cache_memory,
    max_num_seqs: o.MaxNumSeqs = _T.max_num_seqs,
    max_num_batched_tokens: o.MaxNumBatchedTokens = _T.max_num_batched_tokens,
    enable_prefix_caching: o.PrefixCaching = _T.enable_prefix_caching,
    enable_chunked_prefill: o.ChunkedPrefill = _T.enable_chunked_prefill,
    threads: o.Threads = _T.threads,
    verify: o.Verify = _T.verify,
    slo: o.Slo = None,
    baseline: o.Baseline = _T.baseline,
    max_regression: o.MaxRegression = _T.max_regression,
    regression_metrics: o.RegressionMetrics = _T.regression_metrics,
    update_baseline: o.UpdateBaseline = _T.update_baseline,
    confidence: o.Confidence = _T.confidence,
    exit_zero: o.ExitZero = _T.exit_zero,
    label: o.Label = _T.label,
    metadata: o.Metadata = None,
    save_result: o.SaveResult = _T.save_result,
    result_dir: o.ResultDir = _T.result_dir,
    result_filename: o.ResultFilename = _T.result_filename,
    junit: o.Junit = _T.junit,
    markdown: o.Markdown = _T.markdown,
    csv: o.Csv = _T.csv,
    github_action_benchmark: o.GithubActionBenchmark = _T.github_action_benchmark,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """All requests at once through the engine in this process: tokens a second, prefill and decode apart.

    Example: llmctl bench throughput --model ./engine --num-prompts 32 --input-len 32-256 --output-len 128
    --slo "decode_tokens_per_second>=200"
    """
    settings = _settings(BenchThroughputConfig, locals())
    from llmctl.bench.offline import run_throughput
    from llmctl.bench.progress import Progress

    outcome = run_throughput(settings, Progress())
    _finish(outcome, settings, "llmctl bench throughput", "throughput", json_output)


@app.command("latency", epilog=_EXIT_CODES)
@guarded
def latency(
    model: o.EngineModel = _L.model,
    batch_size: Annotated[int, o.option("--batch-size", panel="Workload", help="Requests in the batch.")] = (
        _L.batch_size
    ),
    input_len: o.InputLen = _L.input_len,
    output_len: o.OutputLen = _L.output_len,
    seed: o.Seed = _L.seed,
    num_iters: Annotated[int, o.option("--num-iters", panel="Workload", help="Times the batch is run.")] = _L.num_iters,
    num_iters_warmup: Annotated[
        int, o.option("--num-iters-warmup", panel="Workload", help="Times it is run first, not counted.")
    ] = _L.num_iters_warmup,
    metric_percentiles: Annotated[
        str, o.option("--metric-percentiles", metavar="LIST", panel="Workload", help="Percentiles to report.")
    ] = _L.metric_percentiles,
    repeats: o.Repeats = _L.repeats,
    target: o.Target = _L.target,
    dtype: o.Dtype = _L.dtype,
    max_model_len: o.MaxModelLen = _L.max_model_len,
    block_size: o.BlockSize = _L.block_size,
    kv_cache_memory: o.KvCacheMemory = _L.kv_cache_memory,
    max_num_seqs: o.MaxNumSeqs = _L.max_num_seqs,
    max_num_batched_tokens: o.MaxNumBatchedTokens = _L.max_num_batched_tokens,
    enable_prefix_caching: o.PrefixCaching = _L.enable_prefix_caching,
    enable_chunked_prefill: o.ChunkedPrefill = _L.enable_chunked_prefill,
    threads: o.Threads = _L.threads,
    verify: o.Verify = _L.verify,
    slo: o.Slo = None,
    baseline: o.Baseline = _L.baseline,
    max_regression: o.MaxRegression = _L.max_regression,
    regression_metrics: o.RegressionMetrics = _L.regression_metrics,
    update_baseline: o.UpdateBaseline = _L.update_baseline,
    confidence: o.Confidence = _L.confidence,
    exit_zero: o.ExitZero = _L.exit_zero,
    label: o.Label = _L.label,
    metadata: o.Metadata = None,
    save_result: o.SaveResult = _L.save_result,
    result_dir: o.ResultDir = _L.result_dir,
    result_filename: o.ResultFilename = _L.result_filename,
    junit: o.Junit = _L.junit,
    markdown: o.Markdown = _L.markdown,
    csv: o.Csv = _L.csv,
    github_action_benchmark: o.GithubActionBenchmark = _L.github_action_benchmark,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """One batch through the engine in this process, again and again: its latency and percentiles.

    Example: llmctl bench latency --model ./engine --batch-size 1 --input-len 128 --output-len 128 --num-iters 10
    """
    settings = _settings(BenchLatencyConfig, locals())
    from llmctl.bench.offline import run_latency
    from llmctl.bench.progress import Progress

    outcome = run_latency(settings, Progress())
    _finish(outcome, settings, "llmctl bench latency", "latency", json_output)


def _sort_out(more: list[str], goodput: list[str], metadata: list[str]) -> dict[str, list[str]]:
    """vLLM's ``--goodput a:1 b:2`` and ``--metadata k=v k2=v2`` leave words behind; put them where they belong."""
    found = {"goodput": list(goodput), "metadata": list(metadata)}
    for word in more:
        if goodput and re.fullmatch(r"\w+:[\d.]+", word):
            found["goodput"].append(word)
        elif metadata and re.fullmatch(r"[\w.-]+=.*", word):
            found["metadata"].append(word)
        else:
            raise UsageError(f"unexpected argument '{word}'")
    return found


def _settings(cls: type[C], values: dict[str, Any]) -> C:
    """The frozen configuration made of a command's parameters."""
    settings: dict[str, Any] = {}
    for field in fields(cls):
        if field.name in values:
            value = values[field.name]
            repeatable = isinstance(field.default, tuple)
            settings[field.name] = tuple(value or ()) if repeatable else value
    return cls(**settings)


def _finish(outcome: Outcome, settings: ReportConfig, title: str, backend: str, json_output: bool) -> None:
    """Print the result, write the files (in this order: a full disk must not lose a run), exit with the verdict."""
    import sys

    from rich.console import Console

    from llmctl.bench.outcome import write_reports
    from llmctl.bench.table import print_result

    if json_output:
        print_json(outcome.result)
    # With --json, stdout holds the document alone and the table goes to stderr.
    print_result(outcome.result, title, Console(stderr=json_output, width=None))
    for path in write_reports(outcome, settings, title, backend):
        print(f"wrote {path}", file=sys.stderr)
    for gate in outcome.result["gates"]:
        if not gate["passed"]:
            print(f"gate failed: {gate['metric']} {gate['op']} {gate['limit']:g}", file=sys.stderr)
    if outcome.exit_code and not settings.exit_zero:
        raise typer.Exit(int(outcome.exit_code))
