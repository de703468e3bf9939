"""``bench compare``: rounds of A and B until what is allowed to become worse is known to have done so, or not."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.bench import gate, metrics, ratios, stats
from llmctl.bench.config import BenchCompareConfig
from llmctl.bench.environment import describe_environment, load_average
from llmctl.bench.looks import FIRST_LOOK, Looks
from llmctl.bench.metrics import higher_is_better
from llmctl.bench.outcome import SCHEMA_VERSION, Judge, Outcome, timestamp
from llmctl.bench.progress import Progress
from llmctl.bench.ratios import Decision, Ratio, Tails, Worsening, finite, paired_ratio, ratio_row
from llmctl.bench.rounds import FailedRequestsError, Player, Round, Visit
from llmctl.bench.serve import workload_of
from llmctl.bench.serve_plan import Plan, make_plan
from llmctl.bench.sides import Side, parse_sides
from llmctl.bench.units import changed, interval, noise, percent
from llmctl.errors import ExitCode, LlmctlError, UsageError

STATISTICS = {
    "ratio": "B over A: a round's is that of the geometric means of its two visits a side; all together, of the "
    f"rounds' logarithms the mean without an eighth at either end (below {ratios.BOOTSTRAP_FROM} rounds: of all)",
    "interval": f"studentized bootstrap (bootstrap-t) of that mean, {ratios.RESAMPLINGS} resamplings of the rounds; "
    f"Student's t below {ratios.BOOTSTRAP_FROM} rounds",
    "confidence": "1 - confidence is shared out over the looks (Lan and DeMets' spending function of Pocock's kind, "
    "union bound); what a look may spend is how often the end of an interval that a pass goes by may miss, and, shared "
    "out over the compared metrics (Bonferroni), the end that a regression goes by",
    "a, b": "of a ratio: geometric means of the rounds that were not trimmed; figures of a side are of all visits",
    "regression": "the whole interval is beyond what is allowed",
    "passed": "the whole interval is within what is allowed",
}


@dataclass(frozen=True)
class Compared:
    """One metric at a look: the ratio, and what it says of how much worse B is.

    ``a``, ``b``: geometric means of the rounds that the ratio is of, which is theirs.
    """

    metric: str
    a: float
    b: float
    ratio: Ratio
    worsening: Worsening
    decision: Decision


@dataclass(frozen=True)
class Look:
    """What is known after so many rounds of the metrics that decide; None of one that has no ratio.

    ``confidence``: of either verdict, at this look.
    """

    rounds: int
    confidence: float
    compared: Mapping[str, Compared | None]

    @property
    def decision(self) -> Decision:
        """One regression decides, and so do passes of all."""
        found = {one.decision if one is not None else Decision.UNDECIDED for one in self.compared.values()}
        if Decision.REGRESSION in found:
            return Decision.REGRESSION
        return Decision.PASS if found == {Decision.PASS} else Decision.UNDECIDED


@dataclass(frozen=True)
class Rules:
    """By which rules rounds are judged: metrics, what is allowed, and the looks.

    Only one verdict can be wrong, whatever the truth is, so each may err as often as the look may. A regression of any
    metric decides: the metrics share that error. A pass needs all of them, so whichever is worse than is allowed has
    to miss on its own: each has the whole of it (an intersection-union test: Berger, Technometrics 24, 1982).
    """

    metrics: tuple[str, ...]
    allowed: float
    looks: Looks

    def look(self, rounds: Sequence[Round], *, final: bool = False) -> Look:
        """Judge the rounds so far; ``final``: whatever the plan of looks says, there will be no other."""
        error = self.looks.error(len(rounds), final=final)
        return Look(len(rounds), 1 - error, {name: self._compare(name, rounds, error) for name in self.metrics})

    def others(self, rounds: Sequence[Round], confidence: float) -> list[Compared]:
        """The metrics that decide nothing, for information."""
        found = (self._compare(name, rounds, 1 - confidence) for name in _figures(rounds) if name not in self.metrics)
        return [one for one in found if one is not None]

    def _compare(self, metric: str, rounds: Sequence[Round], error: float) -> Compared | None:
        sides = [(played.log_mean("a", metric), played.log_mean("b", metric)) for played in rounds]
        known = [(a, b) for a, b in sides if a is not None and b is not None]
        if len(known) < len(sides) or not known:
            return None
        logs = [b - a for a, b in known]
        ratio = paired_ratio(logs, self._tails(metric, error))
        kept = [known[i] for i in ratios.kept(logs)]
        a, b = (math.exp(math.fsum(side) / len(kept)) for side in zip(*kept, strict=True))
        worsening = Worsening.of(ratio, higher_is_better(metric))
        return Compared(metric, a, b, ratio, worsening, worsening.decide(self.allowed))

    def _tails(self, metric: str, error: float) -> Tails:
        all_clear = min(0.5, error)
        alarm = all_clear / len(self.metrics)
        return Tails(all_clear, alarm) if higher_is_better(metric) else Tails(alarm, all_clear)


def _figures(rounds: Sequence[Round]) -> list[str]:
    """Metrics of a visit that have a ratio: speeds and latencies, in the order of a result."""
    first = rounds[0].visits[0].figures if rounds else {}
    known = ("request_throughput", "output_throughput", "total_token_throughput", "request_goodput")
    return [name for name in first if name in known or metrics.parse_latency_key(name) is not None]


@dataclass(frozen=True)
class Ended:
    """How a comparison ended: its rounds, the visits of one that was not finished, and why there are no more.

    ``look``: the one that decided.
    """

    rounds: list[Round]
    look: Look | None = None
    spare: tuple[Visit, ...] = ()
    failed: bool = False
    interrupted: bool = False
    error: LlmctlError | None = None


def run_compare(config: BenchCompareConfig, progress: Progress, sides: tuple[Side, Side] | None = None) -> Outcome:
    """Play rounds until they decide.

    Args:
        sides: instead of those that the options name.

    Raises:
        UsageError: options that cannot be honoured.
        LlmctlError: a side cannot be started or reached, and no round was played.
    """
    a, b = sides or parse_sides(config)
    if config.max_rounds < 1:
        raise UsageError(f"--max-rounds: expected at least 1, found {config.max_rounds}", param="max_rounds")
    if config.max_duration is not None and not config.max_duration > 0:
        raise UsageError(f"--max-duration: expected seconds above 0, found {config.max_duration}", param="max_duration")
    plan = make_plan(config)
    if not plan.judge.metrics:
        raise UsageError("--regression-metrics: expected at least one", param="regression_metrics")
    rules = rules_of(plan, config)
    environment = describe_environment()
    player = Player(plan, a, b, progress)
    start = time.monotonic()
    ended = _play(player, rules, config, progress)
    if not ended.rounds and not ended.failed:
        raise ended.error or KeyboardInterrupt
    look = ended.look or (rules.look(ended.rounds, final=True) if ended.rounds else None)
    result = make_result(plan, config, player, ended)
    result["ratios"] = {} if look is None else _ratios(look, rules.others(ended.rounds, look.confidence))
    result["duration"] = time.monotonic() - start
    result["environment"] = {**environment, "load_average_after": load_average()}
    return _judged(result, plan.judge, ended, look)


def rules_of(plan: Plan, config: BenchCompareConfig) -> Rules:
    """The rules that checked options ask for."""
    return Rules(plan.judge.metrics, plan.judge.max_regression, Looks(config.max_rounds, 1 - config.confidence))


def _play(player: Player, rules: Rules, config: BenchCompareConfig, progress: Progress) -> Ended:
    start = time.monotonic()
    rounds: list[Round] = []
    try:
        for number in range(config.max_rounds):
            rounds.append(player.play(number))
            _tell_round(rounds, rules, config, progress)
            if len(rounds) in rules.looks.rounds:
                look = rules.look(rounds)
                _tell_look(look, progress)
                if look.decision != Decision.UNDECIDED:
                    return Ended(rounds, look)
            passed = time.monotonic() - start
            if config.max_duration is not None and passed + passed / len(rounds) > config.max_duration:
                progress.log(f"--max-duration {config.max_duration:g}: no time for another round")
                break
    except FailedRequestsError as error:
        return Ended(rounds, spare=error.visits, failed=True)
    except KeyboardInterrupt:
        return Ended(rounds, interrupted=True)
    except LlmctlError as error:
        return Ended(rounds, error=error)
    finally:
        progress.stop()
    return Ended(rounds)


def _tell_round(rounds: Sequence[Round], rules: Rules, config: BenchCompareConfig, progress: Progress) -> None:
    last, metric = rounds[-1], rules.metrics[0]
    ratio = last.log_ratio(metric)
    said = "no ratio" if ratio is None else f"B/A {math.exp(ratio):.3f}"
    progress.log(f"round {len(rounds)}/{config.max_rounds} {last.order}: {metric} {said}")


def _tell_look(look: Look, progress: Progress) -> None:
    for metric, found in look.compared.items():
        said = "no ratio" if found is None else f"B/A {interval_text(found.ratio)}: {found.decision}"
        progress.log(f"look after {look.rounds} rounds: {metric} {said}")


def interval_text(ratio: Ratio) -> str:
    """``0.951 (0.930–0.973)``."""
    ends = "" if ratio.low is None else f" ({interval({'low': ratio.low, 'high': ratio.high})})"
    return f"{ratio.value:.3f}{ends}"


def make_result(plan: Plan, config: BenchCompareConfig, player: Player, ended: Ended) -> dict[str, Any]:
    """The result document, without what is made of the rounds."""
    visits = [visit for played in ended.rounds for visit in played.visits] + list(ended.spare)
    return {
        "date": timestamp(),
        "label": config.label,
        "model_id": player.models.get("a"),
        **plan.judge.metadata,
        "schema_version": SCHEMA_VERSION,
        "kind": "compare",
        "completed": sum(visit.figures["completed"] for visit in visits),
        "failed": sum(visit.figures["failed"] for visit in visits),
        "num_rounds": len(ended.rounds),
        "max_rounds": config.max_rounds,
        "interrupted": ended.interrupted,
        "a": _side(player, "a", visits),
        "b": _side(player, "b", visits),
        "ratios": {},
        "workload": workload_of(plan, str(player.counted_by)),
        "statistics": STATISTICS,
        "definitions": metrics.DEFINITIONS,
        "rounds": [round_document(played) for played in ended.rounds],
    }


def _side(player: Player, letter: str, visits: Sequence[Visit]) -> dict[str, Any]:
    mine = [visit for visit in visits if visit.side == letter]
    return {
        "served": player.sides[letter].shown,
        "model_id": player.models.get(letter),
        "version": player.versions.get(letter),
        "completed": sum(visit.figures["completed"] for visit in mine),
        "failed": sum(visit.figures["failed"] for visit in mine),
        "figures": _means(mine),
        "failures": [failure for visit in mine for failure in visit.failures],
    }


def _means(visits: Sequence[Visit]) -> dict[str, float]:
    """Means over visits of every figure that all of them have; geometric ones where there is no 0."""
    found = {}
    for name in visits[0].figures if visits else ():
        values = [visit.figures[name] for visit in visits]
        if all(isinstance(value, int | float) for value in values):
            found[name] = stats.geometric_mean(values) if min(values) > 0 else sum(values) / len(values)
    return found


def _ratios(look: Look, others: Sequence[Compared]) -> dict[str, Any]:
    rows = [*look.compared.values(), *others]
    return {
        row.metric: {
            "a": row.a,
            "b": row.b,
            **ratio_row(row.ratio),
            "worse": row.worsening.worse,
            "noise": finite(row.ratio.noise),
            "decision": str(row.decision) if row.metric in look.compared else None,
        }
        for row in rows
        if row is not None
    }


def round_document(played: Round) -> dict[str, Any]:
    """A round as results hold it."""
    return {
        "order": played.order,
        "busy_before": played.busy_before,
        "visits": [{"side": visit.side, "date": visit.date, **visit.figures} for visit in played.visits],
    }


def _judged(result: dict[str, Any], judge: Judge, ended: Ended, look: Look | None) -> Outcome:
    """Add gates, notes and exit code."""
    gates = [_requests_gate(result, letter, judge.config) for letter in ("a", "b")]
    if look is not None and not ended.failed:
        gates += [_ratio_gate(metric, found, judge.max_regression) for metric, found in look.compared.items()]
    result["notes"] = _notes(result, ended, look)
    result["gates"] = [one.as_dict() for one in gates]
    code = gate.exit_code(gates)
    if ended.error is not None:
        code = ended.error.exit_code
    if ended.interrupted:
        code = ExitCode.INTERRUPTED
    result["exit_code"] = int(code)
    return Outcome(result, code)


def _requests_gate(result: Mapping[str, Any], letter: str, config: Any) -> gate.Gate:
    failed, completed = result[letter]["failed"], result[letter]["completed"]
    ratio = failed / (failed + completed) if failed + completed else None
    first = "".join(f": {row['messages'][0]}" for row in result[letter]["failures"][:1])
    note = f"{letter.upper()}: {failed} of {failed + completed} requests failed{first}"
    passed = ratio is None or ratio <= config.max_failed_ratio
    return gate.Gate("requests", "failed_ratio", "<=", config.max_failed_ratio, ratio, passed, note)


def _ratio_gate(metric: str, found: Compared | None, allowed: float) -> gate.Gate:
    if found is None:
        note = "has no ratio: a visit gave no value above 0"
        return gate.Gate("inconclusive", metric, "<=", allowed, None, False, note)
    spread = "noise unknown" if found.ratio.noise is None else noise(found.ratio.noise)
    more = f"allowed {percent(allowed)}", spread, f"{found.ratio.count} rounds"
    note = changed(metric, found.a, found.b, found.ratio.value - 1, *more)
    undecided = found.decision == Decision.UNDECIDED
    kind = "inconclusive" if undecided else "regression"
    passed = found.decision == Decision.PASS
    return gate.Gate(kind, metric, "<=", allowed, found.worsening.worse, passed, note)


def _notes(result: Mapping[str, Any], ended: Ended, look: Look | None) -> list[str]:
    notes = []
    if ended.error is not None:
        notes.append(f"ended after {len(ended.rounds)} rounds by an error: {ended.error}")
    if ended.interrupted:
        notes.append(f"interrupted after {len(ended.rounds)} rounds: judged by what these say")
    if look is not None and not ended.failed and look.decision == Decision.UNDECIDED:
        busy = sorted(played["busy_before"] for played in result["rounds"])[len(result["rounds"]) // 2]
        few = f"; the first look is after {FIRST_LOOK}" if look.rounds < FIRST_LOOK else ""
        notes.append(
            f"inconclusive after {look.rounds} rounds{few}; before them others used {busy:.0%} of the processors: try "
            "a quieter machine, longer visits (--num-prompts), more --max-rounds or a larger --max-regression"
        )
    if result["a"]["model_id"] != result["b"]["model_id"]:
        notes.append(f"the sides serve different models: {result['a']['model_id']}, {result['b']['model_id']}")
    return notes
