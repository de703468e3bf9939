"""The targets of the CUDA runtime, judged from a run's results: reached, MISSED or not measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine_check.trial import ratios

_W4, _BF16 = "Llama-3-8B 4-bit", "Llama-3-8B bf16"
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """One target: its name, the limit, whether more or less is better, and what of the results it is about.

    ``found``: the figure and how it was measured; None where it was not.
    """

    name: str
    limit: float
    most: bool
    shown: Callable[[float], str]
    found: Callable[[Results], tuple[float, str] | None]


@dataclass(frozen=True)
class Verdict:
    """A goal, what was found, and whether that is enough; None: not measured."""

    goal: Goal
    found: str
    reached: bool | None

    @property
    def word(self) -> str:
        """In the table."""
        return {True: "reached", False: "MISSED", None: "not measured"}[self.reached]


def get(results: Results, *path: str) -> Any:
    """A value by its path of keys; None where there is none."""
    place: Any = results
    for key in path:
        if not isinstance(place, Mapping) or key not in place:
            return None
        place = place[key]
    return place


def _served(model: str, at_once: int, figure: str) -> Callable[[Results], tuple[float, str] | None]:
    def found(results: Results) -> tuple[float, str] | None:
        for part in ("http", "served"):  # what clients see counts, where it was measured
            value = get(results, "models", model, part, str(at_once), figure)
            if value is not None:
                return float(value), str(get(results, "models", model, part, str(at_once), "way"))
        return None

    return found


def _against_trial(results: Results) -> tuple[float, str] | None:
    cases = {name: ratio for name, ratio in ratios(results).items() if "prefill" not in name}
    if not cases:
        return None
    worst = max(cases, key=lambda name: cases[name])
    return cases[worst], f"the worst of {len(cases)} cases: {worst}"


def gap_share(results: Results, model: str, batch: str) -> float | None:
    """Share of a decode step, as it was timed untraced, in which no kernel runs."""
    busy = get(results, "models", model, "gaps", batch, "in a step", "busy us")
    step = get(results, "models", model, "decode", f"B{batch} L512", "ms")
    return max(0.0, 1 - busy / (step * 1e3)) if busy and step else None


def between_steps(results: Results, model: str, batch: str) -> float | None:
    """Share of a decode run of the engine in which the device waits between one step and the next."""
    value = get(results, "models", model, "gaps", batch, "engine", "between steps")
    return None if value is None else float(value)


def _largest(share: Callable[[Results, str, str], float | None]) -> Callable[[Results], tuple[float, str] | None]:
    def found(results: Results) -> tuple[float, str] | None:
        values = {batch: share(results, _W4, batch) for batch in get(results, "models", _W4, "gaps") or {}}
        known = {batch: value for batch, value in values.items() if value is not None}
        if not known:
            return None
        worst = max(known, key=lambda batch: known[batch])
        return known[worst], f"batch {worst}, 4-bit"

    return found


def of_matmul(results: Results, model: str, tokens: int) -> float | None:
    """Share of the device's matmul rate that a prompt gets."""
    rate, matmul = get(results, "models", model, "prefill", str(tokens), "TFLOP/s"), get(results, "rates",
                                                                                        "matmul TFLOP/s")  # fmt: skip
    return rate / matmul if rate and matmul else None


def of_read(results: Results, model: str, case: str) -> float | None:
    """Share of the device's read rate that a decode step gets."""
    rate, read = get(results, "models", model, "decode", case, "GB/s"), get(results, "rates", "read GB/s")
    return rate / read if rate and read else None


def _prefill(results: Results) -> tuple[float, str] | None:
    shares = {m: of_matmul(results, m, 8192) for m in (_W4, _BF16)}
    known = {m: share for m, share in shares.items() if share is not None}
    if not known:
        return None
    worst = min(known, key=lambda m: known[m])
    return known[worst], worst


def _start(results: Results) -> tuple[float, str] | None:
    seconds = get(results, "models", _W4, "http", "start to ready s")
    return None if seconds is None else (float(seconds), "llmctl serve, files read before")


def _right(results: Results) -> tuple[float, str] | None:
    variants = get(results, "right")
    if not variants:
        return None
    return float(sum(v["wrong in all"] for v in variants.values())), f"{len(variants)} small models"


def _number(unit: str, digits: int = 0) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}{unit}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


GOALS = (
    Goal("small models as the reference: nothing wrong", 0, True, _number(" wrong"), _right),
    Goal("one stream, 4-bit, 128 in, 256 out: ≥ 300 tok/s", 300, False, _number(" tok/s"), _served(_W4, 1, "tok/s")),
    Goal("one stream, 4-bit, 128 in: first token in ≤ 15 ms", 15, True, _number(" ms", 1),
         _served(_W4, 1, "TTFT ms")),
    Goal("64 at once, 4-bit, 512 in, 256 out: ≥ 4,000 tok/s", 4000, False, _number(" tok/s"),
         _served(_W4, 64, "tok/s")),
    Goal("64 at once, bf16, 512 in, 256 out: ≥ 5,000 tok/s", 5000, False, _number(" tok/s"),
         _served(_BF16, 64, "tok/s")),
    Goal("decode steps: ≤ 1.05 × the trial's time", 1.05, True, _number(" ×", 2), _against_trial),
    Goal("idle in a decode step: ≤ 3%", 0.03, True, _percent, _largest(gap_share)),
    Goal("idle between decode steps: ≤ 3%", 0.03, True, _percent, _largest(between_steps)),
    Goal("prefill of 8,192 tokens: ≥ 55% of matmul", 0.55, False, _percent, _prefill),
    Goal("start to ready, 4-bit: ≤ 4 s", 4, True, _number(" s", 1), _start),
)  # fmt: skip


def judge(results: Results) -> list[Verdict]:
    """Every goal."""
    verdicts = []
    for goal in GOALS:
        found = goal.found(results)
        if found is None:
            verdicts.append(Verdict(goal, "", None))
            continue
        value, how = found
        reached = value <= goal.limit if goal.most else value >= goal.limit
        verdicts.append(Verdict(goal, f"{goal.shown(value)} ({how})", reached))
    return verdicts
