"""Whether a load meets its objectives, and whether chance is ruled out: from the requests of its rounds so far.

An objective on a percentile of requests (TTFT, TPOT, E2E) is one on a share: p99 <= L holds where at most 1% of the
values are above L. That share is tested with the exact binomial distribution (Clopper and Pearson 1934), as are shares
of good requests; other figures with Student's t over the rounds. So are percentiles of ITL: a request has hundreds of
gaps, which are far from independent. The level is shared out over the looks (Bonferroni), so that looking again does
not make errors more likely. Requests of one load are taken to be independent; they are less so the nearer it is to
saturation, so that "settled" is then said too early rather than too late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmctl.bench import metrics, stats
from llmctl.bench.capacity import Verdict
from llmctl.bench.gate import OPERATORS, Slo, check

LOOKS = 4
"""Rounds of requests after which a load is decided at the latest."""
_LEVEL = 0.05


@dataclass(frozen=True)
class Round:
    """One round of requests under a load, and its figures."""

    records: Sequence[metrics.RequestRecord]
    figures: Mapping[str, object]


@dataclass(frozen=True)
class Objectives:
    """What a load must meet.

    Attributes:
        slos: all of them. goodput: limits in ms by metric, of what a good request is. max_failed_ratio: failed
            requests allowed.
    """

    slos: tuple[Slo, ...]
    goodput: Mapping[str, float]
    max_failed_ratio: float

    @property
    def requests(self) -> int:
        """Requests from which every share can be settled when none of them misses: ln(level) / ln(share met)."""
        shares = [allowed for slo in self.slos if (allowed := _allowed(slo)) is not None and 0 < allowed < 1]
        return max((math.ceil(math.log(_LEVEL / LOOKS) / math.log(1 - share)) for share in shares), default=1)

    def judge(self, rounds: Sequence[Round], figures: Mapping[str, object]) -> Verdict:
        """The verdict so far. ``figures``: of all rounds together.

        A load whose figures miss an objective has missed it; it is settled as soon as one such miss is, or every
        objective is met beyond chance.
        """
        records = [record for one in rounds for record in one.records]
        failed = sum(not record.ok for record in records)
        if not records or failed > self.max_failed_ratio * len(records) or failed == len(records):
            return Verdict(False, True, len(records), (f"{failed} of {len(records)} requests failed",))
        states = [self._state(slo, records, rounds, figures) for slo in self.slos]
        missed = tuple(str(slo) for slo, (met, _) in zip(self.slos, states, strict=True) if not met)
        if missed:
            settled = any(settled for met, settled in states if not met)
        else:
            settled = all(settled for _, settled in states)
        return Verdict(not missed, settled, len(records), missed)

    def _state(
        self,
        slo: Slo,
        records: Sequence[metrics.RequestRecord],
        rounds: Sequence[Round],
        figures: Mapping[str, object],
    ) -> tuple[bool, bool]:
        """Whether the figures meet an objective, and whether that is settled."""
        met = check(slo, figures).passed
        allowed = _allowed(slo)
        if allowed is not None:
            values = _violations(slo, records, self.goodput)
            return met, _share_settled(met, sum(values), len(values), allowed)
        if slo.metric in ("completed", "failed", "failed_ratio"):
            return met, True  # counts of these very requests
        found = [one.figures.get(slo.metric) for one in rounds]
        return met, _mean_settled([float(v) for v in found if isinstance(v, int | float)], slo)


def _allowed(slo: Slo) -> float | None:
    """The share of values that may be beyond the limit; None: the objective is not on a share."""
    if slo.metric == "goodput_ratio":
        return 1 - slo.limit if slo.op in (">=", ">") else None
    parsed = metrics.parse_latency_key(slo.metric)
    if parsed is None or parsed[0] == "itl" or slo.op == "==" or slo.metric.startswith(("mean_", "std_")):
        return None
    share = (50.0 if parsed[1] is None else parsed[1]) / 100
    return 1 - share if slo.op in ("<=", "<") else share


def _violations(slo: Slo, records: Sequence[metrics.RequestRecord], goodput: Mapping[str, float]) -> list[bool]:
    """For each value that the objective is on, whether it is beyond the limit."""
    if slo.metric == "goodput_ratio":
        return [not (record.ok and metrics.meets_goodput(record, goodput)) for record in records]
    parsed = metrics.parse_latency_key(slo.metric)
    assert parsed is not None
    samples = metrics.latency_samples([record for record in records if record.ok])[parsed[0]]
    return [not OPERATORS[slo.op](value * 1000, slo.limit) for value in samples]


def _share_settled(met: bool, beyond: int, values: int, allowed: float) -> bool:
    """Whether so many values beyond the limit would hardly come of a share at its edge."""
    if not values:
        return False
    level = _LEVEL / LOOKS
    if met:
        return allowed >= 1 or stats.binomial_cdf(beyond, values, allowed) <= level
    return allowed <= 0 or 1 - stats.binomial_cdf(beyond - 1, values, allowed) <= level


def _mean_settled(values: Sequence[float], slo: Slo) -> bool:
    """Whether the interval of the mean over rounds is on one side of the limit."""
    if len(values) < 2:
        return False
    interval = stats.mean_interval(values, 1 - 2 * _LEVEL / LOOKS)
    assert interval.half_width is not None
    return abs(interval.mean - slo.limit) > interval.half_width
