"""The search of the highest load, on edges that are known; and what settles a load."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.bench.capacity import Search, Verdict
from llmctl.bench.decide import LOOKS, Objectives, Round
from llmctl.bench.gate import parse_slos
from llmctl.bench.metrics import MetricOptions, RequestRecord, run_metrics


def search(edge: float, start: float, *, resolution: float = 0.05, whole: bool = False) -> Search:
    """Run to the end on a server that meets its objectives up to ``edge``."""
    found = Search(lambda load: Verdict(load <= edge, True, 10), resolution=resolution, whole=whole)
    found.run(start)
    return found


@given(edge=st.floats(0.02, 2000), start=st.floats(0.5, 50), resolution=st.floats(0.01, 0.5))
def test_an_edge_is_bracketed_within_the_resolution(edge: float, start: float, resolution: float) -> None:
    found = search(edge, start, resolution=resolution).found
    assert found.highest is not None
    assert found.missed is not None
    assert found.highest <= edge < found.missed
    assert found.resolution is not None
    assert found.resolution <= resolution
    assert found.settled


@given(edge=st.integers(1, 500), start=st.integers(1, 64))
def test_whole_loads_end_next_to_each_other_or_within_the_resolution(edge: int, start: int) -> None:
    found = search(edge, start, whole=True).found
    assert found.highest is not None
    assert found.missed is not None
    assert found.highest <= edge < found.missed
    assert found.missed - found.highest == 1 or found.missed / found.highest - 1 <= 0.05
    assert all(float(trial.load).is_integer() for trial in found.trials)


def test_no_edge_is_said_to_be_none() -> None:
    nothing = search(0, 4, whole=True).found
    assert (nothing.highest, nothing.missed, nothing.resolution, nothing.settled) == (None, 1, None, True)
    everything = search(1e9, 1).found
    assert (everything.highest, everything.missed, everything.resolution) == (4096, None, None)


def test_what_an_interrupted_search_knows_is_kept() -> None:
    def judge(load: float) -> Verdict:
        if load > 5:
            raise KeyboardInterrupt
        return Verdict(True, False, 10)

    found = Search(judge, resolution=0.05, whole=False)
    with pytest.raises(KeyboardInterrupt):
        found.run(1)
    assert [trial.load for trial in found.found.trials] == [1, 2, 4]
    assert found.found.highest == 4
    assert not found.found.settled


def rounds_of(ttfts: list[float], *, failed: int = 0, size: int | None = None) -> list[Round]:
    """Rounds of requests with these times to the first token, seconds, of which the first ``failed`` failed."""
    records = [
        RequestRecord(i, 1, 1, end=ttft, chunk_times=[ttft], error="no" if i < failed else None)
        for i, ttft in enumerate(ttfts)
    ]
    parts = [records[i : i + (size or len(records))] for i in range(0, len(records), size or len(records))]
    return [Round(part, run_metrics(part, sum(r.end for r in part), OPTIONS)) for part in parts]


OPTIONS = MetricOptions(percentiles=(50.0, 90.0, 99.0), goodput={"ttft": 100.0})


def judged(slo: str, ttfts: list[float], *, failed: int = 0, size: int | None = None) -> Verdict:
    objectives = Objectives(parse_slos([slo]), OPTIONS.goodput, 0.0)
    rounds = rounds_of(ttfts, failed=failed, size=size)
    records = [record for one in rounds for record in one.records]
    return objectives.judge(rounds, run_metrics(records, sum(r.end for r in records), OPTIONS))


@pytest.mark.parametrize(
    ("slo", "bad", "of", "meets", "settled"),
    [
        ("p99_ttft_ms<=100", 0, 50, True, False),  # 50 good ones say little of 1 in 100
        ("p99_ttft_ms<=100", 0, 437, True, True),
        ("p99_ttft_ms<=100", 30, 100, False, True),
        ("p99_ttft_ms<=100", 3, 100, False, False),
        ("median_ttft_ms<=100", 2, 20, True, True),
        ("median_ttft_ms<=100", 9, 20, True, False),
        ("goodput_ratio>=0.9", 0, 60, True, True),
        ("goodput_ratio>=0.9", 12, 30, False, True),
        ("failed_ratio<=0", 5, 20, True, True),
    ],
)
def test_shares_are_settled_by_how_many_requests_there_were(
    slo: str, bad: int, of: int, meets: bool, settled: bool
) -> None:
    verdict = judged(slo, [0.5] * bad + [0.05] * (of - bad))
    assert (verdict.meets, verdict.settled, verdict.requests) == (meets, settled, of)
    assert verdict.missed == (() if meets else (str(parse_slos([slo])[0]),))


def test_other_figures_are_settled_over_rounds() -> None:
    steady = [0.050, 0.051, 0.049, 0.050, 0.052, 0.048] * 4
    assert judged("mean_ttft_ms<=100", steady, size=6) == Verdict(True, True, 24)
    assert not judged("mean_ttft_ms<=100", steady).settled, "one round has no spread"
    wild = [0.01] * 6 + [0.15] * 6 + [0.02] * 6 + [0.19] * 6
    assert not judged("mean_ttft_ms<=100", wild, size=6).settled


def test_gaps_of_one_request_are_no_requests() -> None:
    """One slow request of 110 has hundreds of slow gaps: of chance, its being there is as much as any one request's."""

    def request(gap: float) -> RequestRecord:
        times = [gap * i for i in range(1, 251)]
        return RequestRecord(0, 1, 250, end=times[-1], chunk_times=times)

    def verdict(*rounds: list[float]) -> Verdict:
        records = [[request(gap) for gap in gaps] for gaps in rounds]
        made = [Round(part, run_metrics(part, 1.0, OPTIONS)) for part in records]
        objectives = Objectives(parse_slos(["p99_itl_ms<=50"]), {}, 0.0)
        return objectives.judge(made, run_metrics([record for part in records for record in part], 1.0, OPTIONS))

    assert verdict([0.01] * 2) == Verdict(True, False, 2)
    assert verdict([0.1, 0.1] + [0.01] * 108) == Verdict(False, False, 110, ("p99_itl_ms<=50",))
    assert verdict([0.01, 0.011], [0.011, 0.011], [0.01, 0.01]) == Verdict(True, True, 6)
    assert not verdict([0.01], [0.06], [0.01]).settled
    assert Objectives(parse_slos(["p99_itl_ms<=50"]), {}, 0.0).requests == 1


def test_failed_requests_miss_whatever_the_rest() -> None:
    verdict = judged("median_ttft_ms<=100", [0.05] * 10, failed=1)
    assert (verdict.meets, verdict.settled, verdict.missed) == (False, True, ("1 of 10 requests failed",))


def test_enough_requests_settle_a_load_that_never_misses() -> None:
    for slo in ("p99_ttft_ms<=100", "p90_ttft_ms<=100", "median_ttft_ms<=100", "goodput_ratio>=0.95"):
        enough = Objectives(parse_slos([slo]), OPTIONS.goodput, 0.0).requests
        assert judged(slo, [0.05] * enough).settled
        assert not judged(slo, [0.05] * (enough - 1)).settled
    assert Objectives((), {}, 0.0).requests == 1


def test_a_load_at_the_edge_is_seldom_settled() -> None:
    """A tenth of the requests is too late, p90 is the objective: four looks settle either way in at most 5% each."""
    rng = random.Random(0)
    settled = 0
    for _ in range(100):
        ttfts: list[float] = []
        for _ in range(LOOKS):
            ttfts += [0.5 if rng.random() < 0.1 else 0.05 for _ in range(30)]
            if judged("p90_ttft_ms<=100", ttfts).settled:
                settled += 1
                break
    assert settled <= 10
