"""The options of the benches: each written once, by field of its configuration, and the commands made of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from llmctl.cli.common import AsOption, ConfigOption, JsonOption
from llmctl.config import GPU_MEMORY_UTILIZATION

Table = Mapping[str, Any]
"""Typer annotations by field name, in the order of the help."""


def command_of(config: type[Any], *tables: Table) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function of ``settings`` (a ``config``), ``json_output`` and, if it wants it, ``ctx``.

    The command's options are those of the tables, and --config and --json; their defaults are the configuration's.

    Raises:
        KeyError: an option without a field.
    """
    options = {name: annotation for table in tables for name, annotation in table.items()}
    defaults = {field.name: field.default for field in fields(config)}

    def make(function: Callable[..., None]) -> Callable[..., None]:
        takes_context = "ctx" in inspect.signature(function).parameters

        @functools.wraps(function)
        def command(**values: Any) -> None:
            chosen = {name: _setting(values[name], defaults[name]) for name in options}
            context = {"ctx": values["ctx"]} if takes_context else {}
            function(settings=config(**chosen), json_output=values["json_output"], **context)

        parameters = [_parameter(name, kind, _default(defaults[name])) for name, kind in options.items()]
        parameters += [_parameter("config", ConfigOption, None), _parameter("json_output", JsonOption, False)]
        if takes_context:
            parameters.insert(0, inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        del command.__wrapped__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return make


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(default: Any) -> Any:
    """A field's default as Typer wants it: None for a repeatable option's empty tuple."""
    return None if default == () else default


def _setting(value: Any, default: Any) -> Any:
    return tuple(value or ()) if isinstance(default, tuple) else value


def option(*names: str, kind: Any = str, panel: str, help: str, **more: Any) -> Any:
    """An option as Typer takes it: its names, its type, the panel of the help that it stands in."""
    return Annotated[kind, typer.Option(*names, help=help, rich_help_panel=panel, **more)]


_MAYBE, _NUMBER, _SHARE, _MANY = str | None, int | None, float | None, list[str] | None
_server = functools.partial(option, panel="Server")
_workload = functools.partial(option, panel="Workload")
_load = functools.partial(option, panel="Load")
_metric = functools.partial(option, panel="Metrics")
_engine = functools.partial(option, panel="Engine")
_gate = functools.partial(option, panel="Gates")
_output = functools.partial(option, panel="Output")

_SLO_HELP = 'Objective such as "p99_ttft_ms<=200" (<=, <, >=, >, ==; ms or s); repeatable.'
_CHUNKED, _PREFIX = "--enable-chunked-prefill", "--enable-prefix-caching"

_INPUT_LEN = _workload("--input-len", metavar="N|LO-HI", help="Prompt tokens, or a uniform range.")
_SEED = _workload("--seed", kind=int, help="Seed of prompts, lengths and arrivals.")
_NUM_PROMPTS = _workload("--num-prompts", kind=int, help="Requests a repeat.")
_SLO = _gate("--slo", kind=_MANY, metavar="METRIC<=LIMIT", help=_SLO_HELP)

REPEATS: Table = {
    "repeats": _load(
        "--repeats", kind=_NUMBER, metavar="N", help="Runs of the whole workload, for confidence intervals."
    ),
}
BASELINE: Table = {
    "baseline": _gate(
        "--baseline", kind=_MAYBE, metavar="FILE", help="Earlier result to compare with; --repeats becomes 3."
    ),
    "max_regression": _gate(
        "--max-regression",
        metavar="SHARE",
        help="How much worse than the baseline is allowed; counts only beyond the noise interval.",
    ),
    "regression_metrics": _gate("--regression-metrics", metavar="LIST", help="Metrics compared with the baseline."),
    "allow_missing_baseline": _gate(
        "--allow-missing-baseline", kind=bool, help="Pass, and say so, while --baseline does not exist: a first run."
    ),
    "update_baseline": _gate(
        "--update-baseline", kind=bool, help="Write this result to --baseline if it passes the other gates."
    ),
    "confidence": _gate("--confidence", kind=float, metavar="SHARE", help="Level of the intervals across repeats."),
    "exit_zero": _gate("--exit-zero", kind=bool, help="Exit 0 whatever the gates say (errors still count)."),
}
OUTPUT: Table = {
    "label": _output("--label", kind=_MAYBE, help="Name of this run in the result."),
    "metadata": _output("--metadata", kind=_MANY, metavar="K=V", help="Extra key of the result; repeatable."),
    "save_result": _output("--save-result", kind=bool, help="Write the JSON result to a file."),
    "result_dir": _output("--result-dir", kind=_MAYBE, metavar="DIR", help="Folder of that file."),
    "result_filename": _output("--result-filename", kind=_MAYBE, metavar="FILE", help="Its name; made up by default."),
    "junit": _output("--junit", kind=_MAYBE, metavar="FILE", help="JUnit XML, one test case a gate."),
    "markdown": _output(
        "--markdown", kind=_MAYBE, metavar="FILE", help="Summary; $GITHUB_STEP_SUMMARY gets it as well when set."
    ),
    "csv": _output("--csv", kind=_MAYBE, metavar="FILE", help="One row a repeat, one for all."),
    "github_action_benchmark": _output(
        "--github-action-benchmark",
        kind=_MAYBE,
        metavar="STEM",
        help="STEM-bigger-is-better.json and STEM-smaller-is-better.json for that action.",
    ),
}
ENGINE: Table = {
    "as_family": AsOption,
    "target": _engine(
        "--target",
        help="What a checkpoint is built for: cuda (this machine's GPU), cpu or reference; auto: the GPU where one can "
        "be used, else the CPU. An engine must be for it.",
    ),
    "dtype": _engine("--dtype", help="Activations' type: auto, float32, bfloat16, float16."),
    "max_model_len": _engine("--max-model-len", kind=_NUMBER, metavar="N", min=1, help="Longest sequence, tokens."),
    "block_size": _engine("--block-size", kind=_NUMBER, min=1, help="Tokens a KV block."),
    "kv_cache_dtype": _engine(
        "--kv-cache-dtype",
        metavar="DTYPE",
        help="KV cache: auto (as built), int8; fp8 on a GPU; or a float dtype of the target.",
    ),
    "kv_cache_memory": _engine("--kv-cache-memory", kind=_MAYBE, metavar="SIZE", help="KV cache, such as 512MiB."),
    "gpu_memory_utilization": _engine(
        "--gpu-memory-utilization",
        kind=_SHARE,
        metavar="SHARE",
        help=f"Share of the GPU's memory to take in all; {GPU_MEMORY_UTILIZATION:g} by default. Only for a GPU.",
    ),
    "enforce_eager": _engine(
        "--enforce-eager", kind=bool, help="Launch every kernel by itself, replay no CUDA graph. Only for a GPU."
    ),
    "max_num_seqs": _engine(
        "--max-num-seqs", kind=_NUMBER, min=1, help="Sequences in one batch: 256 on a GPU, 64 on a CPU."
    ),
    "max_num_batched_tokens": _engine(
        "--max-num-batched-tokens", kind=_NUMBER, min=1, help="Tokens of a step: 2048 on a GPU, 512 on a CPU."
    ),
    "enable_prefix_caching": _engine(
        f"{_PREFIX}/--no{_PREFIX[1:]}", kind=bool, help="Reuse KV blocks of equal prefixes."
    ),
    "enable_chunked_prefill": _engine(
        f"{_CHUNKED}/--no{_CHUNKED[1:]}", kind=bool, help="Split long prompts over steps."
    ),
    "itl_target": _engine(
        "--itl-target", metavar="MS", help="Longest step with prompts beside decodes, or auto; 0: no limit."
    ),
    "threads": _engine("--threads", kind=_NUMBER, metavar="N", min=1, help="Processor threads to use; not for a GPU."),
    "verify": _engine("--verify", kind=bool, help="Check sha256 of every engine file first."),
}
_MODEL: Table = {
    "model": option(
        "--model", panel="Model", help="Engine folder, checkpoint folder, .gguf, hub id, or demo:smollm2-135m."
    ),
}
_LENGTHS: Table = {
    "input_len": _INPUT_LEN,
    "output_len": _workload("--output-len", metavar="N|LO-HI", help="Output tokens, or a uniform range."),
    "seed": _SEED,
}
_OFFLINE: Table = {**REPEATS, **ENGINE, "slo": _SLO, **BASELINE, **OUTPUT}

THROUGHPUT: Table = {
    **_MODEL,
    "num_prompts": _NUM_PROMPTS,
    **_LENGTHS,
    "num_warmups": _workload("--num-warmups", kind=int, help="Requests run first and not counted."),
    "batching": _workload(
        "--batching",
        metavar="HOW",
        help="continuous; static: also in batches of --max-num-seqs that all end before the next, and the ratio.",
    ),
    **_OFFLINE,
}
LATENCY: Table = {
    **_MODEL,
    "batch_size": _workload("--batch-size", kind=int, help="Requests in the batch."),
    **_LENGTHS,
    "num_iters": _workload("--num-iters", kind=int, help="Times the batch is run."),
    "num_iters_warmup": _workload("--num-iters-warmup", kind=int, help="Times it is run first, not counted."),
    "metric_percentiles": _workload("--metric-percentiles", metavar="LIST", help="Percentiles to report."),
    **_OFFLINE,
}
SERVE: Table = {
    "base_url": _server("--base-url", kind=_MAYBE, metavar="URL", help="Server; wins over --host and --port."),
    "host": _server("--host", help="Server's host."),
    "port": _server("--port", kind=int, help="Server's port."),
    "endpoint": _server(
        "--endpoint",
        kind=_MAYBE,
        metavar="PATH",
        help="/v1/completions (default) or /v1/chat/completions; both stream.",
    ),
    "backend": _server("--backend", kind=_MAYBE, help="openai, openai-chat or vllm; sets the endpoint."),
    "model": _server("--model", kind=_MAYBE, help="Model to ask for; by default the server's first."),
    "api_key": _server("--api-key", kind=_MAYBE, envvar="OPENAI_API_KEY", help="Sent as bearer token."),
    "header": _server("--header", kind=_MANY, metavar="K=V", help="Header of every request; repeatable."),
    "insecure": _server("--insecure", kind=bool, help="Do not check TLS certificates."),
    "ready_timeout": _server(
        "--ready-timeout",
        kind=float,
        metavar="S",
        help="Wait so long for the server to be ready and to answer a request.",
    ),
    "request_timeout": _server("--request-timeout", kind=float, metavar="S", help="A longer request has failed."),
    "keep_alive": _server("--keep-alive", kind=bool, help="Reuse connections; by default each request opens its own."),
    "dataset_name": _workload("--dataset-name", help="random (distinct words), file or sharegpt."),
    "dataset_path": _workload(
        "--dataset-path",
        kind=_MAYBE,
        metavar="FILE",
        help=".txt (a prompt a line), .jsonl (prompt, text or messages; output_len), ShareGPT .json.",
    ),
    "num_prompts": _NUM_PROMPTS,
    "input_len": _INPUT_LEN,
    "prefix_len": _workload(
        "--prefix-len", kind=int, metavar="N", help="Tokens that random prompts begin with and share, before their own."
    ),
    "num_prefixes": _workload("--num-prefixes", kind=int, metavar="N", help="Different ones of those, in turns."),
    "output_len": _workload(
        "--output-len", kind=_MAYBE, metavar="N|LO-HI", help="Output tokens (128), or a uniform range."
    ),
    "tokenizer": _workload(
        "--tokenizer",
        kind=_MAYBE,
        metavar="MODEL",
        help="Counts prompt tokens; by default the server's /tokenize does.",
    ),
    "ignore_eos": _workload(
        "--ignore-eos/--no-ignore-eos", kind=bool | None, help="Ask for full outputs; default for random."
    ),
    "temperature": _workload("--temperature", kind=float, help="0 is greedy."),
    "extra_body": _workload("--extra-body", kind=_MAYBE, metavar="JSON", help="Fields added to every request."),
    "seed": _SEED,
    "request_rate": _load("--request-rate", kind=float, metavar="R", help="Arrivals a second; inf: all at once."),
    "burstiness": _load(
        "--burstiness", kind=float, help="Shape of the gamma gaps: 1 Poisson, below burstier, inf even."
    ),
    "max_concurrency": _load(
        "--max-concurrency", kind=_NUMBER, metavar="N", help="Requests under way at once (closed loop)."
    ),
    "load_seconds": _load(
        "--load-seconds", kind=_SHARE, metavar="S", help="Seconds after which a load sends no more requests."
    ),
    "num_warmups": _load("--num-warmups", kind=int, help="Requests sent first and not counted."),
    **REPEATS,
    "percentile_metrics": _metric("--percentile-metrics", metavar="LIST", help="Latencies to report."),
    "metric_percentiles": _metric("--metric-percentiles", metavar="LIST", help="Their percentiles."),
    "goodput": _metric(
        "--goodput", kind=_MANY, metavar="METRIC:MS", help="What a good request is, such as ttft:200 tpot:50."
    ),
    "slo": _SLO,
    "min_goodput": _gate(
        "--min-goodput", kind=_MAYBE, metavar="N|SHARE", help="Good requests a second, or a share: 95%."
    ),
    "max_failed_ratio": _gate("--max-failed-ratio", kind=float, metavar="SHARE", help="Failed requests allowed."),
    **BASELINE,
    **OUTPUT,
    "save_detailed": _output("--save-detailed", kind=bool, help="Per-request lists in the result."),
}

_SERVE_ALONE = ("request_rate", "max_concurrency", "save_detailed", "github_action_benchmark")
_FIND_MAX_HELP = "Search the highest load that meets every --slo; begins at the one load given."
SWEEP: Table = {
    "engine": _server(
        "--engine", metavar="ENGINE|MODEL", help="Serve this with llmctl serve for the sweep, in place of --base-url."
    ),
    "vary": _server(
        "--vary",
        kind=_MANY,
        metavar="OPTION=A,B",
        help="Values of an option of llmctl serve (model too): a server each, in turns; repeatable.",
    ),
    "request_rates": _load(
        "--request-rate", kind=_MAYBE, metavar="R,R", help="Arrivals a second; this list varies, or the next."
    ),
    "concurrencies": _load(
        "--max-concurrency", kind=_MAYBE, metavar="N,N", help="Requests under way at once; 1,2,4,8,16,32 by default."
    ),
    "find_max": _load("--find-max", kind=bool, help=_FIND_MAX_HELP),
    "max_duration": _load(
        "--max-duration", kind=_SHARE, metavar="S", help="Seconds after which the sweep sends no more requests."
    ),
    "resolution": _load("--resolution", metavar="SHARE", help="How near --find-max comes to that load."),
    **{name: kind for name, kind in SERVE.items() if name not in _SERVE_ALONE},
    "quality": _gate(
        "--quality",
        kind=_MAYBE,
        metavar="FILE",
        help="Options of llmctl eval (YAML): its figures, its limits as gates.",
    ),
    "price_per_hour": _output(
        "--price-per-hour", kind=_SHARE, metavar="P", help="Of the machine: reports the cost of a million tokens."
    ),
    "html": _output("--html", kind=_MAYBE, metavar="FILE", help="One page with charts and tables; it loads nothing."),
    "svg": _output("--svg", kind=_MAYBE, metavar="FILE", help="The charts alone."),
}

_STEPS = functools.partial(option, panel="Steps")
_ONLY_OF_RUNS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
PROFILE: Table = {
    **_MODEL,
    "only": _STEPS("--only", metavar="LIST", help="Of decode, prefill, growth (of decode with its context)."),
    "batches": _STEPS("--batches", metavar="N,N", help="Sequences of a decode step."),
    "context": _STEPS("--context", kind=int, metavar="N", help="Tokens of each of them."),
    "prefill": _STEPS("--prefill", kind=_NUMBER, metavar="N", help="Tokens of the prompt, which is one step: 512."),
    "contexts": _STEPS(
        "--contexts",
        kind=_MAYBE,
        metavar="N,N",
        help="Contexts of growth: 512 to 8192, doubling, as the engine takes them.",
    ),
    "steps": _STEPS("--steps", kind=int, metavar="N", help="Timed steps of each kind."),
    "from_source": _engine(
        "--from-source",
        kind=bool,
        help="Run this version's kernels, compiled now, in place of the engine's; CPU only.",
    ),
    **{
        name: kind
        for name, kind in ENGINE.items()
        if name not in _ONLY_OF_RUNS and not name.startswith("enable_") and name not in ("itl_target", "verify")
    },
    "svg": _output("--svg", kind=_MAYBE, metavar="FILE", help="Bars of where each step's time goes."),
}
