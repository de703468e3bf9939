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
from llmctl.bench.ratios import Decision, Worsening, unpaired_ratio
from llmctl.bench.units import changed, noise, percent, quantity
from llmctl.errors import UsageError

WORKLOAD_KEYS = ("model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency")


class OtherWorkError(UsageError):
    """An earlier result measured other work."""


@dataclass(frozen=True)
class Delta:
    """Change of one metric against the baseline.

    Attributes:
        baseline, current: geometric means over repeats, of which ``change`` is the ratio; arithmetic ones where a value
            is 0.
        change: ``(current - baseline) / baseline``; worse: the same with the sign that means "worse" positive.
        noise: how far the change's confidence interval reaches towards no change, as a share of the baseline; None
            when neither side has repeats.
        decision: what they make of it, as of any ratio (``ratios.Worsening.decide_at_once``).
            method: of the interval.
    """

    metric: str
    baseline: float
    current: float
    change: float
    worse: float
    noise: float | None
    decision: Decision
    method: str | None

    @property
    def regressed(self) -> bool:
        """Worse by more than the allowed share and by more than the noise."""
        return self.decision == Decision.REGRESSION


def read_result(path: Path) -> Any:
    """What a file of ``--baseline`` holds.

    Raises:
        UsageError: unreadable, not JSON, or damaged.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--baseline {path}: {error.strerror or error}",
            fix=f"make it with --baseline {path} --update-baseline, or let a first run pass without: "
            "--allow-missing-baseline",
            param="baseline",
        ) from error
    except ValueError as error:
        raise UsageError(f"--baseline {path}: not JSON: {error}", param="baseline") from error
    for name in ("workload", "environment"):
        found = loaded.get(name) if isinstance(loaded, dict) else None
        if found is not None and not isinstance(found, dict):
            raise UsageError(f"--baseline {path}: damaged: its '{name}' is no object", param="baseline")
    return loaded


def load_baseline(path: Path) -> dict[str, Any]:
    """A result written by ``bench`` (or by ``vllm bench serve``).

    Raises:
        UsageError: unreadable, not JSON, or not a result.
    """
    loaded = read_result(path)
    if not isinstance(loaded, dict) or not isinstance(loaded.get("completed"), int):
        raise UsageError(f"--baseline {path}: expected a bench result, found no count of completed requests")
    if not loaded.get("completed"):
        raise UsageError(f"--baseline {path}: that run completed no request, so it is no baseline", param="baseline")
    return loaded


def check_same_work(path: Path, baseline: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to compare runs of different work.

    Keys that the baseline does not have (a vLLM result has no ``workload``) are not compared.

    Raises:
        OtherWorkError: naming every setting that differs.
    """
    pairs = {key: (baseline[key], current.get(key)) for key in WORKLOAD_KEYS if key in baseline}
    theirs, ours = baseline.get("workload") or {}, current.get("workload") or {}
    pairs |= {key: (theirs[key], ours.get(key)) for key in theirs}
    differing = [f"{key} {old!r} there, {new!r} here" for key, (old, new) in pairs.items() if old != new]
    if differing:
        raise OtherWorkError(
            f"--baseline {path}: it measured other work: " + "; ".join(differing),
            fix="run the same settings, or replace it with --update-baseline",
            param="baseline",
        )


def repeat_values(result: Mapping[str, Any], metric: str) -> list[float]:
    """A metric's value in each whole repeat, or its one top-level value; empty when the result has neither."""
    repeats = result.get("repeats") or []
    whole = [r for r in repeats if not r.get("interrupted")] if isinstance(repeats, list) else []
    values = [r.get(metric) for r in whole]
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
        return Delta(metric, base, math.nan, math.nan, math.nan, None, Decision.REGRESSION, None)
    now = math.fsum(after) / len(after)
    better_up = higher_is_better(metric)
    ratio = unpaired_ratio(before, after, confidence)
    if ratio is not None:
        base, now = stats.geometric_mean(before), stats.geometric_mean(after)
        found = Worsening.of(ratio, better_up)
        decision = found.decide_at_once(max_regression)
        return Delta(metric, base, now, ratio.value - 1, found.worse, ratio.noise, decision, ratio.method)
    # There is no ratio to a value of 0 (no good request a second, say): the difference, as a share of the baseline.
    change = (now - base) / abs(base) if base else 0.0 if now == 0 else math.copysign(math.inf, now)
    half = stats.difference_noise(before, after, confidence)
    noise = None if half is None else half / abs(base) if base else 0.0 if half == 0 else math.inf
    worse = -change if better_up else change
    within = Worsening(worse, None, None) if noise is None else Worsening(worse, worse - noise, worse + noise)
    return Delta(
        metric, base, now, change, worse, noise, within.decide_at_once(max_regression), "student-t of differences"
    )


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
    if not math.isfinite(delta.change):
        now = "has no value any more" if math.isnan(delta.current) else f"is {quantity(delta.metric, delta.current)}"
        return f"{now} (it was {quantity(delta.metric, delta.baseline)})"
    spread = "noise unknown: use --repeats" if delta.noise is None else noise(delta.noise)
    more = f"allowed {percent(max_regression)}", spread
    said = changed(delta.metric, delta.baseline, delta.current, delta.change, *more)
    undecided = delta.noise is not None and delta.decision == Decision.UNDECIDED
    return said + ": too noisy to tell, not counted" * undecided


def as_dict(path: Path, baseline: Mapping[str, Any], deltas: Sequence[Delta]) -> dict[str, object]:
    """The ``baseline`` member of a result."""
    return {
        "path": str(path),
        "date": baseline.get("date"),
        "git_commit": (baseline.get("environment") or {}).get("git_commit"),
        "delta": {
            d.metric: {k: _finite(v) for k, v in (asdict(d) | {"regressed": d.regressed}).items() if k != "metric"}
            for d in deltas
        },
    }


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
