"""``bench sweep``: a table of loads, the knee, the highest load that meets the objectives, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from llmctl.bench import gate
from llmctl.bench.capacity import Capacity
from llmctl.bench.config import BenchSweepConfig
from llmctl.bench.environment import describe_environment, load_average
from llmctl.bench.local_server import serving
from llmctl.bench.metrics import DEFINITIONS
from llmctl.bench.outcome import SCHEMA_VERSION, Outcome, timestamp
from llmctl.bench.sweep_baseline import check_same_loads, compare_sweeps, known_identity, load_sweep
from llmctl.bench.sweep_measure import Serve, Sweep
from llmctl.bench.sweep_plan import Axis, Level, SweepPlan, Variant, plan_sweep
from llmctl.bench.sweep_view import SweepView
from llmctl.errors import ExitCode, LlmctlError

_LEAST_FOR_A_KNEE = 3
SWEEP_DEFINITIONS = {
    "meets": "whether the point's figures meet every objective and no more requests failed than allowed; settled: "
    "whether chance is ruled out at 5%, by exact binomial tests of shares of requests (percentiles of TTFT, TPOT and "
    "E2E, goodput_ratio) and Student's t over rounds for other figures (ITL's percentiles too: gaps of one request are "
    "not independent); requests are taken to be independent",
    "knee": "of a variant's points with a finite latency, that of the greatest power: output_throughput / "
    "median_e2el_ms (Kleinrock 1979)",
    "highest": "the highest load tried that met the objectives; missed: the lowest above it that did not; resolution: "
    "missed / highest - 1",
    "cost": "price per hour / tokens per hour of this kind, times 1,000,000: the whole price each time",
}


def run_sweep(config: BenchSweepConfig, view: SweepView, serve: Serve | None = None) -> Outcome:
    """Run the whole sweep.

    Args:
        serve: starts our servers.

    Returns:
        The outcome; of an interrupted sweep, of what was measured until then.

    Raises:
        UsageError: options that cannot be honoured.
        LlmctlError: no server answers.
        KeyboardInterrupt: before anything was measured.
    """
    plan = plan_sweep(config, load_sweep)
    judge = plan.serve.judge
    if judge.previous is not None and not config.update_baseline:
        check_same_loads(str(config.baseline), judge.previous, plan.points)
        judge.check_same_work(known_identity(plan.serve, judge.previous, plan.variants))
    environment = describe_environment()
    sweep = Sweep(plan, view, serve or _serve(view, config.ready_timeout))
    interrupted = False
    try:
        sweep.measure_quality()
        sweep.measure()
    except KeyboardInterrupt:
        if not sweep.points:
            raise
        interrupted = True
    finally:
        view.close()
    if not sweep.points:
        raise _why_nothing(sweep)
    return judged(sweep, environment, interrupted)


def _why_nothing(sweep: Sweep) -> LlmctlError:
    """The error to raise of a sweep without a point."""
    for error in sweep.refused.values():
        return error
    seconds = sweep.plan.config.max_duration
    return LlmctlError(f"--max-duration {seconds:g}: over before a request was sent", fix="a longer one")


def _serve(view: SweepView, ready_timeout: float) -> Serve:
    @contextmanager
    def start(model: str, options: Sequence[str]) -> Iterator[str]:
        with serving(model, options, ready_timeout=ready_timeout, tell=view.log) as server:
            yield server.url

    return start


def mark_knees(points: Sequence[dict[str, Any]]) -> None:
    """Set ``knee`` of the point of the greatest power of each variant that has points enough."""
    variants: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for point in points:
        if point["completed"] and point.get("median_e2el_ms"):
            variants.setdefault(tuple(point["variant"].items()), []).append(point)
    for group in variants.values():
        if len(group) >= _LEAST_FOR_A_KNEE:
            max(group, key=lambda p: p["output_throughput"] / p["median_e2el_ms"])["knee"] = True


def judged(sweep: Sweep, environment: Mapping[str, object], interrupted: bool) -> Outcome:
    """The result document, with its gates and exit code."""
    plan = sweep.plan
    assert sweep.session is not None
    points = [sweep.describe(sweep.points[key]) for key in sorted(sweep.points, key=_order(plan))]
    mark_knees(points)
    head = sweep.session.head
    found = {variant: search.found for variant, search in sweep.searches.items()}
    measured = [variant for variant in plan.variants if any(v == variant for v, _ in sweep.points)]
    gates = [g for variant in measured for g in _gates(sweep, variant, found)]
    gates += [g for _, mine in sweep.quality.values() for g in mine]
    baseline, against = compare_sweeps(plan.serve.judge, points, plan.points, sweep.refused)
    gates += against
    code = next((error.exit_code for error in sweep.refused.values()), ExitCode.OK) or gate.exit_code(gates)
    if interrupted:
        code = ExitCode.INTERRUPTED
    result = {
        **{key: value for key, value in head.items() if key not in ("workload", "server")},
        "schema_version": SCHEMA_VERSION,
        "kind": "sweep",
        "num_repeats": plan.config.num_repeats,
        "axis": plan.axis.name,
        "duration": sum(point["duration"] for point in points),
        "workload": {**head["workload"], "slo": [str(slo) for slo in plan.objectives.slos]},
        "server": head["server"],
        "points": points,
        "find_max": [_described(variant, capacity, plan.axis) for variant, capacity in found.items()],
        "refused": [{"variant": dict(v.settings), "reason": e.message} for v, e in sweep.refused.items()],
        "quality": [{**measured, "gates": [g.as_dict() for g in mine]} for measured, mine in sweep.quality.values()],
        "price_per_hour": plan.config.price_per_hour,
        "environment": {**environment, "load_average_after": load_average()},
        "definitions": {**DEFINITIONS, **SWEEP_DEFINITIONS},
        "baseline": baseline,
        "notes": plan.serve.judge.notes(),
        "interrupted": interrupted,
        "time_up": sweep.time_up,
        "ended": timestamp(),
        "gates": [g.as_dict() for g in gates],
        "exit_code": int(code),
    }
    return Outcome(result, code)


def _order(plan: SweepPlan) -> Callable[[tuple[Variant, Level]], tuple[int, float, int]]:
    def key(at: tuple[Variant, Level]) -> tuple[int, float, int]:
        return plan.variants.index(at[0]), at[1].request_rate, at[1].max_concurrency or 0

    return key


def _gates(sweep: Sweep, variant: Variant, found: Mapping[Variant, Capacity]) -> list[gate.Gate]:
    """Of one variant: some load without too many failures; some load that meets the objectives, or a highest one."""
    mine = [(point, sweep.describe(point)) for (v, _), point in sweep.points.items() if v == variant]
    clean = sum(bool(d["completed"]) and d["failed_ratio"] <= sweep.plan.config.max_failed_ratio for _, d in mine)
    note = variant.label
    gates = [gate.Gate("requests", "points_without_failures", ">=", 1, clean, clean >= 1, note)]
    slos = ", ".join(str(slo) for slo in sweep.plan.objectives.slos)
    if variant in found:
        highest = found[variant].highest
        name = f"highest_{sweep.plan.axis.name}"
        undecided = "" if found[variant].trials else "no load was decided"
        gates.append(gate.Gate("slo", name, ">", 0, highest, highest is not None, _said(note, slos, undecided)))
    elif slos:
        meeting = sum(d["meets"] for _, d in mine)
        gates.append(gate.Gate("slo", "points_that_meet", ">=", 1, meeting, meeting >= 1, _said(note, slos)))
    return gates


def _said(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _described(variant: Variant, capacity: Capacity, axis: Axis) -> dict[str, Any]:
    return {
        "variant": dict(variant.settings),
        "axis": axis.name,
        "highest": capacity.highest,
        "missed": capacity.missed,
        "resolution": capacity.resolution,
        "settled": capacity.settled,
        "trials": [{"load": trial.load, **asdict(trial.verdict)} for trial in capacity.trials],
    }
