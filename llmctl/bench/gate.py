"""The verdict of a run: service-level objectives, failed requests, goodput. Pure functions from figures to gates."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from llmctl.bench.metrics import GOODPUT_METRICS, is_known_metric, known_metrics, parse_latency_key
from llmctl.errors import ExitCode, UsageError

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}

_SLO = re.compile(
    r"^\s*(?P<metric>[A-Za-z][\w.]*)\s*(?P<op><=|>=|==|<|>)\s*(?P<limit>[^\s<>=]+?)\s*(?P<unit>ms|s|%)?\s*$"
)


@dataclass(frozen=True)
class Slo:
    """One objective: ``metric op limit``; limits of ``*_ms`` metrics are in ms."""

    metric: str
    op: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.op}{self.limit:g}"


@dataclass(frozen=True)
class Gate:
    """One checked condition. ``observed`` is None when the run gave no such figure; then it never passes.

    ``kind`` is requests, slo, goodput, regression or inconclusive and decides the exit code.
    """

    kind: str
    metric: str
    op: str
    limit: float
    observed: float | None
    passed: bool
    note: str = ""

    def as_dict(self) -> dict[str, object]:
        """JSON form: metric, op, limit, observed, passed first."""
        fields = asdict(self)
        order = ("metric", "op", "limit", "observed", "passed", "kind", "note")
        return {key: fields[key] for key in order}


def parse_slos(
    texts: Iterable[str], is_known: Callable[[str], bool] = is_known_metric, names: Sequence[str] | None = None
) -> tuple[Slo, ...]:
    """Objectives such as ``p99_ttft_ms<=200`` or ``p99_ttft_ms<=0.2s``; several may stand in one text after commas.

    Args:
        is_known, names: which metrics a run of this kind yields, and those to list or suggest.

    Raises:
        UsageError: malformed, unknown metric (the nearest is suggested), or a limit that is not a finite number.
    """
    return tuple(
        _parse_slo(part, is_known, names or known_metrics())
        for text in texts
        for part in text.split(",")
        if part.strip()
    )


def _parse_slo(text: str, is_known: Callable[[str], bool], names: Sequence[str]) -> Slo:
    match = _SLO.match(text)
    if match is None:
        raise UsageError(
            f"--slo '{text}': expected METRIC OP NUMBER with OP one of {' '.join(OPERATORS)}",
            fix='such as --slo "p99_ttft_ms<=200"',
            param="slo",
        )
    metric = match["metric"]
    if not is_known(metric):
        raise UsageError(f"--slo '{text}': unknown metric '{metric}'{suggestion(metric, names)}", param="slo")
    return Slo(metric, match["op"], _limit(text, metric, match["limit"], match["unit"]))


def _limit(text: str, metric: str, number: str, unit: str | None) -> float:
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise UsageError(f"--slo '{text}': expected a finite number, found '{number}'", param="slo")
    wrong = UsageError(f"--slo '{text}': the unit '{unit}' does not fit {metric}", param="slo")
    if unit in ("ms", "s"):
        if metric.endswith("_ms"):
            return limit * 1000 if unit == "s" else limit
        if metric != "duration":
            raise wrong
        return limit / 1000 if unit == "ms" else limit
    if unit == "%":
        if not metric.endswith("_ratio"):
            raise wrong
        return limit / 100
    return limit


def suggestion(name: str, names: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or the list of what there is."""
    known = list(names)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "; known: " + ", ".join(known)


def slo_percentiles(slos: Iterable[Slo]) -> dict[str, set[float]]:
    """Latency metrics that objectives name, with the percentiles they need, so that a run computes them."""
    needed: dict[str, set[float]] = {}
    for slo in slos:
        parsed = parse_latency_key(slo.metric)
        if parsed is not None:
            needed.setdefault(parsed[0], set()).update([parsed[1]] if parsed[1] is not None else [])
    return needed


def parse_goodput(texts: Iterable[str]) -> dict[str, float]:
    """Limits in ms by metric from ``ttft:200 tpot:50 e2el:5000`` (any split over texts, blanks or commas).

    Raises:
        UsageError: not METRIC:MS, an unknown metric, or a limit that is not a non-negative finite number.
    """
    limits: dict[str, float] = {}
    for pair in (p for text in texts for p in re.split(r"[\s,]+", text) if p):
        name, colon, number = pair.partition(":")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not colon or not math.isfinite(limit) or limit < 0:
            raise UsageError(f"--goodput '{pair}': expected METRIC:MILLISECONDS such as ttft:200", param="goodput")
        if name not in GOODPUT_METRICS:
            raise UsageError(f"--goodput '{pair}': unknown metric{suggestion(name, GOODPUT_METRICS)}", param="goodput")
        limits[name] = limit
    return limits


def parse_min_goodput(text: str) -> Slo:
    """``2.5`` is requests a second (``request_goodput``); ``95%`` a share of all requests (``goodput_ratio``)."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit) or limit < 0:
        raise UsageError(
            f"--min-goodput '{text}': expected requests a second such as 2.5, or a share such as 95%",
            param="min_goodput",
        )
    return Slo("goodput_ratio", ">=", limit / 100) if percent else Slo("request_goodput", ">=", limit)


def parse_share(text: str, param: str) -> float:
    """``5%`` or ``0.05`` -> 0.05.

    Raises:
        UsageError: not a share, or negative.
    """
    stripped = text.strip()
    try:
        share = float(stripped.removesuffix("%")) / (100 if stripped.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not math.isfinite(share) or share < 0:
        option = "--" + param.replace("_", "-")
        raise UsageError(f"{option} '{text}': expected a share such as 5% or 0.05", param=param)
    return share


def check(slo: Slo, figures: Mapping[str, object], kind: str = "slo") -> Gate:
    """The gate of one objective; a figure that is missing or not a number never passes."""
    value = figures.get(slo.metric)
    observed = float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    passed = observed is not None and OPERATORS[slo.op](observed, slo.limit)
    return Gate(kind, slo.metric, slo.op, slo.limit, observed, passed)


def request_gates(figures: Mapping[str, object], max_failed_ratio: float) -> list[Gate]:
    """Something completed, and no more failed than allowed."""
    return [
        check(Slo("completed", ">=", 1), figures, "requests"),
        check(Slo("failed_ratio", "<=", max_failed_ratio), figures, "requests"),
    ]


def exit_code(gates: Iterable[Gate]) -> ExitCode:
    """The code of the gravest gate that failed: requests, objectives, regressions, what stayed undecided."""
    failed = {gate.kind for gate in gates if not gate.passed}
    if "requests" in failed:
        return ExitCode.FAILED_REQUESTS
    if failed & {"slo", "goodput"}:
        return ExitCode.SLO_MISSED
    if "regression" in failed:
        return ExitCode.REGRESSION
    return ExitCode.INCONCLUSIVE if "inconclusive" in failed else ExitCode.OK
