"""A sweep against an earlier one: each load against the same load, by the statistics of ``--baseline``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmctl.bench import baseline as base
from llmctl.bench.gate import Gate
from llmctl.bench.outcome import Judge
from llmctl.bench.readiness import ServerFacts
from llmctl.bench.serve import make_head
from llmctl.bench.serve_plan import Plan
from llmctl.bench.sweep_plan import Level, Variant
from llmctl.bench.sweep_view import level_of, variant_of
from llmctl.errors import UsageError

_SHOWN = 4

At = tuple[Variant, Level]
"""Where a point is: what it was sent to, and the load."""


def load_sweep(path: Path) -> dict[str, Any]:
    """A result of ``bench sweep`` that measured its loads.

    Raises:
        UsageError: unreadable, not JSON, no sweep, one that was cut short, or without a request that completed.
    """
    loaded = base.read_result(path)
    points = loaded.get("points") if isinstance(loaded, dict) and loaded.get("kind") == "sweep" else None
    try:
        completed = [int(point["completed"]) for point in points or () if {key_of(point)}]  # hashable
    except (AttributeError, KeyError, TypeError, ValueError):
        completed = []
    if not completed:
        raise UsageError(f"--baseline {path}: expected a result of bench sweep, found no points", param="baseline")
    if not all(completed) or loaded.get("interrupted"):
        raise UsageError(
            f"--baseline {path}: that sweep was interrupted, or a load completed no request: it is no baseline",
            param="baseline",
        )
    return dict(loaded)


def key_of(point: Mapping[str, Any]) -> At:
    """Where a point of a result is."""
    return variant_of(point), level_of(point)


def label_of(at: At) -> str:
    """For people."""
    return ", ".join(filter(None, (at[0].label, at[1].label)))


def check_same_loads(path: str, previous: Mapping[str, Any], planned: Iterable[At]) -> None:
    """Refuse an earlier sweep of other loads or variants.

    Raises:
        UsageError: naming some that only one of them has.
    """
    there, here = {key_of(point) for point in previous["points"]}, set(planned)
    only = [(there - here, "there alone"), (here - there, "here alone")]
    said = [f"{_some(map(label_of, found))} {where}" for found, where in only if found]
    if said:
        raise UsageError(
            f"--baseline {path}: it measured other loads: {'; '.join(said)}",
            fix="sweep the same ones, or replace it with --update-baseline",
            param="baseline",
        )


def identity_of(head: Mapping[str, Any], previous: Mapping[str, Any], variants: Sequence[Variant]) -> dict[str, Any]:
    """What of a sweep must be as in the earlier one: objectives may differ, and models where they vary."""
    workload = {**head["workload"], "slo": (previous.get("workload") or {}).get("slo")}
    varies = any("model" in dict(variant.settings) for variant in variants)
    return {**head, "workload": workload} | ({"model_id": previous.get("model_id")} if varies else {})


def known_identity(plan: Plan, previous: Mapping[str, Any], variants: Sequence[Variant]) -> dict[str, Any]:
    """``identity_of`` before a server is asked anything: what it alone can say, the model's name and how prompts are
    counted, is taken to be as in the earlier one."""
    found = identity_of(make_head(plan, "", ServerFacts((), None, 0.0), ""), previous, variants)
    counted_by = (previous.get("workload") or {}).get("prompt_length_source")
    workload = {**found["workload"], "prompt_length_source": counted_by}
    return {**found, "workload": workload, "model_id": previous.get("model_id")}


def compare_sweeps(
    judge: Judge, points: Sequence[Mapping[str, Any]], planned: Sequence[At], refused: Collection[Variant] = ()
) -> tuple[dict[str, Any] | None, list[Gate]]:
    """The ``baseline`` member of a sweep's result, and its gates: one a load and metric, and one of what is missing.

    The confidence is shared out over loads and metrics (Bonferroni). Loads of ``refused`` variants, which are errors
    of their own, are not counted as missing.
    """
    config, previous = judge.config, judge.previous
    if not config.baseline:
        return None, []
    now = {key_of(point): point for point in points}
    gates = _all_measured(now, [at for at in planned if at[0] not in refused])
    if previous is None:
        return None, gates
    before = {key_of(point): point for point in previous["points"]}
    both = [at for at in planned if at in now and at in before]
    confidence = 1 - (1 - config.confidence) / max(1, len(both))
    rows: list[dict[str, Any]] = []
    for at in both:
        deltas = base.compare(before[at], now[at], judge.metrics, judge.max_regression, confidence)
        where = {name: now[at][name] for name in ("variant", "request_rate", "max_concurrency")}
        rows.append({**where, "delta": base.as_dict(Path(config.baseline), previous, deltas)["delta"]})
        if not config.update_baseline:
            mine = base.regression_gates(deltas, judge.max_regression)
            gates += [replace(one, note=f"at {label_of(at)} {one.note}") for one in mine]
    head = base.as_dict(Path(config.baseline), previous, [])
    return {**{name: value for name, value in head.items() if name != "delta"}, "points": rows}, gates


def _all_measured(now: Mapping[At, Any], planned: Sequence[At]) -> list[Gate]:
    missing = [label_of(at) for at in planned if at not in now]
    if not missing:
        return []
    note = f"{len(planned) - len(missing)} of {len(planned)}; not measured: {_some(missing)}"
    return [Gate("inconclusive", "points", ">=", len(planned), len(planned) - len(missing), False, note)]


def _some(labels: Iterable[str]) -> str:
    found = sorted(labels)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more
