"""From the figures of a run to its outcome: gates, baseline, exit code, files. Shared by all benches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from llmctl.bench import baseline as base
from llmctl.bench import gate, report, stats
from llmctl.bench.config import ReportConfig
from llmctl.bench.metrics import is_known_metric
from llmctl.errors import ExitCode, UsageError

SCHEMA_VERSION = 1

DETAILED = (
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "latencies",
    "start_times",
    "queue_times",
    "generated_texts",
    "errors",
    "finish_reasons",
)

RESERVED = frozenset(
    (
        *DETAILED,
        *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate"),
        *("burstiness", "max_concurrency", "schema_version", "kind", "num_repeats", "repeats", "confidence"),
        *("workload", "environment", "definitions", "failures", "client", "server", "engine"),
        *("gates", "baseline", "notes", "interrupted", "exit_code"),
        *("elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"),
        *("avg_latency", "percentiles", "num_iters", "batch_size", "peak_rss_bytes", "output_token_source"),
        *("itl_token_source", "not_sent", "batching"),
    )
)


ReadBaseline = Callable[[Path], dict[str, Any]]
"""Reads an earlier result, or raises UsageError."""


def timestamp() -> str:
    """Local time as ``vllm bench`` writes it."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


@dataclass(frozen=True)
class Outcome:
    """A result document and the exit code it calls for."""

    result: dict[str, Any]
    exit_code: ExitCode


@dataclass(frozen=True)
class Judge:
    """How a run is judged; made from the options before any load is sent, so that bad options cost nothing.

    Attributes:
        slos: objectives, ``--min-goodput`` included. previous: the baseline's document, when there is one.
    """

    config: ReportConfig
    slos: tuple[gate.Slo, ...]
    max_regression: float
    metrics: tuple[str, ...]
    metadata: Mapping[str, str]
    previous: Mapping[str, Any] | None

    @classmethod
    def make(
        cls,
        config: ReportConfig,
        regression_metrics: str,
        is_known: Callable[[str], bool],
        names: Sequence[str],
        extra: Sequence[gate.Slo] = (),
        read: ReadBaseline = base.load_baseline,
    ) -> Judge:
        """Check every option that concerns the verdict and the files.

        Args:
            read: reads the baseline.

        Raises:
            UsageError: on the first that cannot be honoured.
        """
        check_files(config)
        slos = (*gate.parse_slos(config.slo, is_known, names), *extra)
        max_regression = gate.parse_share(config.max_regression, "max_regression")
        if config.update_baseline and not config.baseline:
            raise UsageError("--update-baseline: needs --baseline FILE to know what to write", param="update_baseline")
        if config.num_repeats < 1:
            raise UsageError(f"--repeats: expected at least 1, found {config.repeats}", param="repeats")
        if not 0 < config.confidence < 1:
            raise UsageError(f"--confidence: expected a share in (0, 1), found {config.confidence}", param="confidence")
        metrics = tuple(m.strip() for m in regression_metrics.split(",") if m.strip())
        for metric in metrics:
            if not is_known(metric):
                hint = gate.suggestion(metric, names)
                raise UsageError(f"--regression-metrics: unknown metric '{metric}'{hint}", param="regression_metrics")
        if config.allow_missing_baseline and not config.baseline:
            raise UsageError(
                "--allow-missing-baseline: needs --baseline FILE to know which", param="allow_missing_baseline"
            )
        previous = None
        may_miss = config.update_baseline or config.allow_missing_baseline
        if config.baseline and not (may_miss and not Path(config.baseline).exists()):
            previous = read(Path(config.baseline))
        return cls(config, slos, max_regression, metrics, parse_metadata(config.metadata), previous)

    def check_same_work(self, identity: Mapping[str, Any]) -> None:
        """Refuse a baseline of other work, unless it is about to be replaced."""
        if self.previous is not None and not self.config.update_baseline:
            base.check_same_work(Path(str(self.config.baseline)), self.previous, identity)

    def judge(self, result: dict[str, Any], first_gates: Sequence[gate.Gate]) -> Outcome:
        """Add gates, baseline and exit code to a result."""
        gates = [*first_gates]
        gates += [gate.check(s, result, "goodput" if "goodput" in s.metric else "slo") for s in self.slos]
        result["baseline"] = None
        result["notes"] = self.notes()
        if self.previous is not None:
            deltas = base.compare(
                self.previous, result, self.metrics, self.max_regression, confidence=self.config.confidence
            )
            result["baseline"] = base.as_dict(Path(str(self.config.baseline)), self.previous, deltas)
            if not self.config.update_baseline:
                gates += base.regression_gates(deltas, self.max_regression)
        code = ExitCode.INTERRUPTED if result["interrupted"] else gate.exit_code(gates)
        result["gates"] = [g.as_dict() for g in gates]
        result["exit_code"] = int(code)
        return Outcome(result, code)

    def notes(self) -> list[str]:
        """What a person should know of the verdict and would not see in it."""
        if self.previous is None and self.config.baseline and not self.config.update_baseline:
            path = self.config.baseline
            return [f"no baseline yet: nothing was compared with {path}; the same run with --update-baseline makes it"]
        return []


def check_files(config: ReportConfig) -> None:
    """Refuse, before any load is sent, files that could not be written after it.

    Raises:
        UsageError: a folder where a file should be, or a place that cannot be written to.
    """
    folder = Path(config.result_dir or ".")
    named = {
        "result_dir": folder / (config.result_filename or "result.json"),
        "junit": config.junit,
        "markdown": config.markdown,
        "csv": config.csv,
        "github_action_benchmark": config.github_action_benchmark,
        "svg": getattr(config, "svg", None),
        "html": getattr(config, "html", None),
        "baseline": config.baseline if config.update_baseline else None,
    }
    for name, file in named.items():
        if name != "result_dir" or config.saves:
            check_file(name, file)


def check_file(param: str, file: str | Path | None) -> None:
    """Refuse a file that could not be written; None is none.

    Raises:
        UsageError: a folder where a file should be, or a place that cannot be written to.
    """
    if file is None:
        return
    path = Path(file)
    there = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    option = f"--{param.replace('_', '-')}"
    if path.is_dir():
        raise UsageError(f"{option} {path}: expected a file, found a folder", param=param)
    if not there.is_dir():
        raise UsageError(f"{option} {path}: {there} is not a folder", param=param)
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: {there} cannot be written to", param=param)


def parse_metadata(items: Sequence[str]) -> dict[str, str]:
    """``K=V`` pairs, which become top-level keys of the result, as ``vllm bench serve`` writes them.

    Raises:
        UsageError: not K=V, or a key that results have already.
    """
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--metadata '{item}': expected KEY=VALUE", param="metadata")
        if key in RESERVED or is_known_metric(key):
            raise UsageError(f"--metadata '{item}': '{key}' is a key that results have already", param="metadata")
        pairs[key] = value.strip()
    return pairs


_SUMS = frozenset(
    ("completed", "failed", "duration", "elapsed_time", "total_input_tokens", "total_output_tokens", "num_requests")
)


def confidence_intervals(repeats: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, dict[str, Any]]:
    """Per metric: mean, std, half width and ends of the Student-t interval across repeats; empty for one repeat.

    Counts and durations, which the top level sums up, have none.
    """
    if len(repeats) < 2:
        return {}
    intervals: dict[str, dict[str, Any]] = {}
    for metric in report.numeric_metrics(repeats[0]):
        values = base.repeat_values({"repeats": list(repeats)}, metric)
        if metric in _SUMS or len(values) < 2:
            continue
        found = stats.mean_interval(values, confidence)
        intervals[metric] = {
            "mean": found.mean,
            "std": found.std,
            "half_width": found.half_width,
            "low": found.low,
            "high": found.high,
            "count": found.count,
            "confidence": confidence,
        }
    return intervals


Render = Callable[[Mapping[str, Any], str], str]
"""From a result and its title to a text."""


def write_reports(
    outcome: Outcome,
    config: ReportConfig,
    title: str,
    backend: str,
    *,
    to_markdown: Render = report.to_markdown,
    to_csv: Callable[[Mapping[str, Any]], str] = report.to_csv,
    more: Sequence[tuple[str | None, Callable[[], str]]] = (),
) -> list[Path]:
    """Write every file asked for, append to ``$GITHUB_STEP_SUMMARY``, replace the baseline of a run that passed.

    Args:
        more: files beside those of every bench, and what makes their texts.

    Returns:
        The files written.
    """
    result = outcome.result
    files: list[tuple[Path, str]] = []
    if config.saves:
        folder = Path(config.result_dir or ".")
        files.append(
            (folder / (config.result_filename or report.default_filename(result, backend)), report.to_json(result))
        )
    markdown = to_markdown(result, title)
    if config.junit:
        files.append((Path(config.junit), report.to_junit(result, title)))
    if config.markdown:
        files.append((Path(config.markdown), markdown))
    if config.csv:
        files.append((Path(config.csv), to_csv(result)))
    files += [(Path(path), render()) for path, render in more if path]
    if config.github_action_benchmark:
        stem = Path(config.github_action_benchmark)
        for name, bigger in (("bigger-is-better", True), ("smaller-is-better", False)):
            text = report.to_github_action_benchmark(result, bigger)
            files.append((stem.with_name(f"{stem.name.removesuffix('.json')}-{name}.json"), text))
    if config.update_baseline and config.baseline and outcome.exit_code == ExitCode.OK:
        slim = {k: v for k, v in result.items() if k not in DETAILED}
        files.append((Path(config.baseline), report.to_json(slim)))
    for path, text in files:
        report.write_text(path, text)
    append_step_summary(markdown)
    return [path for path, _ in files]


def append_step_summary(markdown: str) -> None:
    """Append to ``$GITHUB_STEP_SUMMARY``, where there is one."""
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with open(summary, "a", encoding="utf-8") as file:
            file.write(markdown + "\n")
