"""Options that the benches share, as Typer annotations."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def option(*names: str, panel: str, help: str, **more: Any) -> Any:
    """A Typer option in a help panel."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


_GATES = "Gates"
_OUTPUT = "Output"
_ENGINE = "Engine"

Slo = Annotated[
    list[str] | None,
    option(
        "--slo",
        metavar="METRIC<=LIMIT",
        panel=_GATES,
        help='Objective such as "p99_ttft_ms<=200" (<=, <, >=, >, ==; ms or s); repeatable.',
    ),
]
Baseline = Annotated[
    str | None,
    option("--baseline", metavar="FILE", panel=_GATES, help="Earlier result to compare with; --repeats becomes 3."),
]
MaxRegression = Annotated[
    str,
    option(
        "--max-regression",
        metavar="SHARE",
        panel=_GATES,
        help="How much worse than the baseline is allowed; counts only beyond the noise interval.",
    ),
]
RegressionMetrics = Annotated[
    str, option("--regression-metrics", metavar="LIST", panel=_GATES, help="Metrics compared with the baseline.")
]
UpdateBaseline = Annotated[
    bool,
    option("--update-baseline", panel=_GATES, help="Write this result to --baseline if it passes the other gates."),
]
Repeats = Annotated[
    int | None,
    option("--repeats", metavar="N", panel="Load", help="Runs of the whole workload, for confidence intervals."),
]
Confidence = Annotated[
    float, option("--confidence", metavar="SHARE", panel=_GATES, help="Level of the intervals across repeats.")
]
ExitZero = Annotated[
    bool, option("--exit-zero", panel=_GATES, help="Exit 0 whatever the gates say (errors still count).")
]
Label = Annotated[str | None, option("--label", panel=_OUTPUT, help="Name of this run in the result.")]
Metadata = Annotated[
    list[str] | None, option("--metadata", metavar="K=V", panel=_OUTPUT, help="Extra key of the result; repeatable.")
]
SaveResult = Annotated[bool, option("--save-result", panel=_OUTPUT, help="Write the JSON result to a file.")]
ResultDir = Annotated[str | None, option("--result-dir", metavar="DIR", panel=_OUTPUT, help="Folder of that file.")]
ResultFilename = Annotated[
    str | None, option("--result-filename", metavar="FILE", panel=_OUTPUT, help="Its name; made up by default.")
]
Junit = Annotated[str | None, option("--junit", metavar="FILE", panel=_OUTPUT, help="JUnit XML, one test case a gate.")]
Markdown = Annotated[
    str | None,
    option("--markdown", metavar="FILE", panel=_OUTPUT, help="Summary; $GITHUB_STEP_SUMMARY gets it as well when set."),
]
Csv = Annotated[str | None, option("--csv", metavar="FILE", panel=_OUTPUT, help="One row a repeat, one for all.")]
GithubActionBenchmark = Annotated[
    str | None,
    option(
        "--github-action-benchmark",
        metavar="STEM",
        panel=_OUTPUT,
        help="STEM-bigger-is-better.json and STEM-smaller-is-better.json for that action.",
    ),
]

Target = Annotated[str, option("--target", panel=_ENGINE, help="Target to build for when the model is no engine.")]
Dtype = Annotated[str, option("--dtype", panel=_ENGINE, help="Activations' type: auto, float32, bfloat16, float16.")]
MaxModelLen = Annotated[
    int | None, option("--max-model-len", metavar="N", min=1, panel=_ENGINE, help="Longest sequence, tokens.")
]
BlockSize = Annotated[int | None, option("--block-size", min=1, panel=_ENGINE, help="Tokens a KV block.")]
KvCacheMemory = Annotated[
    str | None, option("--kv-cache-memory", metavar="SIZE", panel=_ENGINE, help="KV cache, such as 512MiB.")
]
MaxNumSeqs = Annotated[int, option("--max-num-seqs", min=1, panel=_ENGINE, help="Sequences in one batch.")]
MaxNumBatchedTokens = Annotated[
    int, option("--max-num-batched-tokens", min=1, panel=_ENGINE, help="Token budget of a step.")
]
PrefixCaching = Annotated[
    bool,
    option(
        "--enable-prefix-caching/--no-enable-prefix-caching", panel=_ENGINE, help="Reuse KV blocks of equal prefixes."
    ),
]
ChunkedPrefill = Annotated[
    bool,
    option(
        "--enable-chunked-prefill/--no-enable-chunked-prefill", panel=_ENGINE, help="Split long prompts over steps."
    ),
]
Threads = Annotated[
    int | None, option("--threads", metavar="N", min=1, panel=_ENGINE, help="Processor threads to use.")
]
Verify = Annotated[bool, option("--verify", panel=_ENGINE, help="Check sha256 of every engine file first.")]
EngineModel = Annotated[
    str, option("--model", panel="Model", help="Engine folder, checkpoint folder, .gguf, hub id, or demo:smollm2-135m.")
]
Seed = Annotated[int, option("--seed", panel="Workload", help="Seed of prompts, lengths and arrivals.")]
InputLen = Annotated[
    str, option("--input-len", metavar="N|LO-HI", panel="Workload", help="Prompt tokens, or a uniform range.")
]
OutputLen = Annotated[
    str, option("--output-len", metavar="N|LO-HI", panel="Workload", help="Output tokens, or a uniform range.")
]
