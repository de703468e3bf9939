"""Repeated looks err no more often in all than one would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.bench.compare import Rules
from llmctl.bench.looks import Looks
from llmctl.bench.ratios import Decision, Worsening, paired_ratio
from llmctl.bench.rounds import Round, Visit


@given(st.integers(1, 200), st.floats(0.001, 0.2))
def test_the_errors_of_all_looks_add_up_to_alpha(max_rounds: int, alpha: float) -> None:
    looks = Looks(max_rounds, alpha)
    assert looks.rounds[-1] == max_rounds
    assert list(looks.rounds) == sorted(set(looks.rounds))
    errors = [looks.error(at) for at in looks.rounds]
    assert sum(errors) == pytest.approx(alpha)
    assert min(errors) > 0.05 * alpha / len(errors), "a look that may hardly err decides nothing"


@given(st.integers(1, 100), st.floats(0.001, 0.2), st.data())
def test_a_last_look_before_its_time_has_what_is_left(max_rounds: int, alpha: float, data: st.DataObject) -> None:
    looks = Looks(max_rounds, alpha)
    stop = data.draw(st.integers(1, max_rounds))
    spent = sum(looks.error(at) for at in looks.rounds if at < stop)
    assert spent + looks.error(stop, final=True) == pytest.approx(alpha)


def test_only_planned_looks_have_an_error() -> None:
    assert Looks(30, 0.05).rounds == (10, 14, 20, 30)
    with pytest.raises(ValueError, match="no look is planned after 9 rounds"):
        Looks(30, 0.05).error(9)


def decided(logs: np.ndarray, looks: Looks, allowed: float) -> Decision:
    """What a comparison of these rounds ends with."""
    for at in looks.rounds:
        ratio = paired_ratio(list(logs[:at]), 1 - looks.error(at), 400)
        decision = Worsening.of(ratio, True).decide(allowed)
        if decision != Decision.UNDECIDED:
            return decision
    return Decision.UNDECIDED


def shares(change: float, noise: float, looks: Looks, allowed: float, trials: int) -> dict[Decision, float]:
    rng = np.random.default_rng(round(1e6 * noise))
    found = [
        decided(np.log1p(change) + noise * rng.normal(size=looks.max_rounds), looks, allowed) for _ in range(trials)
    ]
    return {decision: found.count(decision) / trials for decision in Decision}


def test_what_is_allowed_is_no_regression_however_often_one_looks() -> None:
    """At the limit itself the truth is neither: each verdict stays within the half of alpha that is its.

    With the whole alpha at each of the six looks 22% are called a regression and 27% pass.
    """
    found = shares(-0.025, 0.03, Looks(60, 0.2), 0.025, 250)
    assert found[Decision.REGRESSION] <= 0.1
    assert found[Decision.PASS] <= 0.1


def test_what_may_go_wrong_is_shared_out_over_looks_and_metrics() -> None:
    looks, metrics = Looks(30, 0.01), ("output_throughput", "median_tpot_ms")
    figures = [dict.fromkeys(metrics, 100.0 + number) for number in range(14)]
    rounds = [Round("ABBA", 0.0, tuple(Visit(side, "", row, []) for side in "abba")) for row in figures]
    errors = []
    for at, final in ((10, False), (14, False), (12, True)):
        look = Rules(metrics, 0.025, looks).look(rounds[:at], final=final)
        found = [one.ratio.confidence for one in look.compared.values() if one is not None]
        assert found == pytest.approx([look.confidence] * len(metrics))
        errors.append(len(metrics) * (1 - look.confidence))
    assert errors == pytest.approx([looks.error(10), looks.error(14), looks.error(12, final=True)])


def test_a_slowdown_is_found_and_a_noisy_machine_is_undecided() -> None:
    looks = Looks(30, 0.01 / 3)
    slow, equal = (shares(change, 0.02, looks, 0.025, 60) for change in (-0.05, 0.0))
    assert slow[Decision.REGRESSION] >= 0.95
    assert slow[Decision.PASS] == equal[Decision.REGRESSION] == 0
    noisy = shares(0.0, 0.3, looks, 0.025, 20)
    assert noisy[Decision.UNDECIDED] >= 0.9
