"""Comparison with an earlier result: deltas with their noise, and the regression gates they give."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmctl.bench import stats
from llmctl.bench.gate import Gate
from llmctl.bench.metrics import higher_is_better
from llmctl.errors import UsageError

WORKLOAD_KEYS = ("model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency")


@dataclass(frozen=True)
class Delta:
    """Change of one metric against the baseline; means over repeats.

    Attributes:
        change: ``(current - baseline) / baseline``; worse: the same with the sign that means "worse" positive.
        noise: half width of the difference's confidence interval as a share of the baseline; None when neither side
            has repeats.
        regressed: worse by more than the allowed share and by more than the noise.
    """

    metric: str
    baseline: float
    current: float
    change: float
    worse: float
    noise: float | None
    regressed: bool


def load_baseline(path: Path) -> dict[str, Any]:
    """A result written by ``bench`` (or by ``vllm bench serve``).

    Raises:
        UsageError: unreadable, not JSON, or not a result.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--baseline {path}: {error.strerror or error}",
            fix="make one with --baseline FILE --update-baseline",
            param="baseline",
        ) from error
    except ValueError as error:
        raise UsageError(f"--baseline {path}: not JSON: {error}", param="baseline") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("completed"), int):
        raise UsageError(f"--baseline {path}: expected a bench result, found no count of completed requests")
    if not loaded.get("completed"):
        raise UsageError(f"--baseline {path}: that run completed no request, so it is no baseline", param="baseline")
    return loaded


def check_same_work(path: Path, baseline: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to compare runs of different work.

    Keys that the baseline does not have (a vLLM result has no ``workload``) are not compared.

    Raises:
        UsageError: naming every setting that differs.
    """
    pairs = {key: (baseline[key], current.get(key)) for key in WORKLOAD_KEYS if key in baseline}
    theirs, ours = baseline.get("workload") or {}, current.get("workload") or {}
    pairs |= {key: (theirs[key], ours.get(key)) for key in theirs}
    differing = [f"{key} {old!r} there, {new!r} here" for key, (old, new) in pairs.items() if old != new]
    if differing:
        raise UsageError(
            f"--baseline {path}: it measured other work: " + "; ".join(differing),
            fix="run the same settings, or replace it with --update-baseline",
            param="baseline",
        )


def repeat_values(result: Mapping[str, Any], metric: str) -> list[float]:
    """A metric's value in each repeat, or its one top-level value; empty when the result has neither."""
    repeats = result.get("repeats") or []
    values = [r.get(metric) for r in repeats] if isinstance(repeats, list) else []
    numbers = [float(v) for v in values if _is_number(v)]
    if numbers:
        return numbers
    return [float(result[metric])] if _is_number(result.get(metric)) else []


def compare(
    baseline: Mapping[str, Any],
    current: Mapping[str, Any],
    metrics: Sequence[str],
    max_regression: float,
    confidence: float = 0.95,
) -> list[Delta]:
    """Deltas of the metrics that the baseline has. A metric that vanished from ``current`` has NaN and regressed.

    The confidence is shared out over the metrics (Bonferroni), so that more metrics do not mean more false alarms.
    """
    present = [m for m in metrics if repeat_values(baseline, m)]
    level = 1 - (1 - confidence) / max(1, len(present))
    return [
        compare_values(m, repeat_values(baseline, m), repeat_values(current, m), max_regression, level) for m in present
    ]


def compare_values(
    metric: str, before: Sequence[float], after: Sequence[float], max_regression: float, confidence: float
) -> Delta:
    """Delta of one metric from its repeats on both sides."""
    base = math.fsum(before) / len(before)
    if not after:
        return Delta(metric, base, math.nan, math.nan, math.nan, None, True)
    now = math.fsum(after) / len(after)
    half = stats.difference_noise(before, after, confidence)
    if base == 0:
        change = 0.0 if now == 0 else math.copysign(math.inf, now)
        noise = None if half is None else (0.0 if half == 0 else math.inf)
    else:
        change = (now - base) / abs(base)
        noise = None if half is None else half / abs(base)
    worse = -change if higher_is_better(metric) else change
    regressed = worse > max_regression and (noise is None or worse > noise)
    return Delta(metric, base, now, change, worse, noise, regressed)


def regression_gates(deltas: Sequence[Delta], max_regression: float) -> list[Gate]:
    """One gate a metric: ``observed`` is how much worse it became, as a share (negative: it became better)."""
    return [
        Gate(
            "regression",
            delta.metric,
            "<=",
            max_regression,
            delta.worse if math.isfinite(delta.worse) else None,
            not delta.regressed,
            _note(delta, max_regression),
        )
        for delta in deltas
    ]


def _note(delta: Delta, max_regression: float) -> str:
    values = f"{delta.baseline:.6g} -> {delta.current:.6g}, {delta.change:+.1%}"
    if delta.noise is None:
        return f"{values}; noise unknown, use --repeats"
    verdict = "; within noise, not counted" if delta.worse > max_regression and not delta.regressed else ""
    return f"{values}, noise ±{delta.noise:.1%}{verdict}"


def as_dict(path: Path, baseline: Mapping[str, Any], deltas: Sequence[Delta]) -> dict[str, object]:
    """The ``baseline`` member of a result."""
    return {
        "path": str(path),
        "date": baseline.get("date"),
        "git_commit": (baseline.get("environment") or {}).get("git_commit"),
        "delta": {d.metric: {k: _finite(v) for k, v in asdict(d).items() if k != "metric"} for d in deltas},
    }


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
