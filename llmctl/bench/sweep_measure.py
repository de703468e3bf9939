"""A sweep under way: loads sent to a server, or to variants of ours in turns; what was measured stays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from llmctl.artifact.step_progress import step_progress
from llmctl.bench.baseline import OtherWorkError
from llmctl.bench.capacity import Search, Verdict
from llmctl.bench.client import Target
from llmctl.bench.decide import LOOKS, Round
from llmctl.bench.endpoint import make_endpoint
from llmctl.bench.gate import Gate
from llmctl.bench.metrics import run_metrics
from llmctl.bench.quality import quality_gates
from llmctl.bench.readiness import ServerFacts
from llmctl.bench.serve import (
    RepeatRun,
    connect,
    find_counter,
    make_head,
    make_result,
    note_chunks,
    nothing_sent,
    run_once,
    warm_up,
)
from llmctl.bench.serve_plan import Plan, make_items
from llmctl.bench.sweep_baseline import identity_of
from llmctl.bench.sweep_plan import Level, SweepPlan, Variant, ordered, stream_of
from llmctl.bench.sweep_view import SweepView
from llmctl.bench.workloads import TokenCounter
from llmctl.errors import LlmctlError

_NOT_OF_A_POINT = frozenset(
    "date endpoint_type backend label model_id tokenizer_id num_prompts burstiness schema_version kind workload server "
    "environment definitions interrupted".split()
)

_WAVES = 3
"""Requests of a round of a search for each that is under way at once, at least."""
_ARRIVAL_SECONDS = 10
"""How long the requests of a round of a search arrive, at least."""

Serve = Callable[[str, Sequence[str]], AbstractContextManager[str]]
"""Starts our server on an engine or model with options; the context's value is its URL."""


@dataclass(frozen=True)
class Session:
    """A server that is ready, and all that loads on it share.

    Attributes:
        model: the one that is asked for. counter: of prompts' tokens, None where nothing counts them; counted_by: what
            does.
    """

    plan: Plan
    server: ServerFacts
    model: str
    counter: TokenCounter | None
    counted_by: str
    target: Target

    @property
    def head(self) -> dict[str, Any]:
        """What identifies a run of it."""
        return make_head(self.plan, self.model, self.server, self.counted_by)


@dataclass
class Point:
    """A load on a variant, and its runs so far. ``session``: the last that it was run in."""

    variant: Variant
    level: Level
    session: Session
    runs: list[RepeatRun] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Figures of all runs, ``vllm bench serve``'s names."""
        plan = self.session.plan
        result = make_result(plan, self.session.head, self.runs, {})
        return {key: value for key, value in result.items() if key not in _NOT_OF_A_POINT}


class _TimeUpError(Exception):
    """``--max-duration`` is over."""


class Sweep:
    """One sweep under way; what it has measured stays when it is interrupted."""

    def __init__(self, plan: SweepPlan, view: SweepView, serve: Serve) -> None:
        self.plan, self.view, self._serve = plan, view, serve
        self.points: dict[tuple[Variant, Level], Point] = {}
        self.searches: dict[Variant, Search] = {}
        self.refused: dict[Variant, LlmctlError] = {}
        self.quality: dict[str, tuple[dict[str, Any], list[Gate]]] = {}
        self.session: Session | None = None
        self.time_up = False
        self._streams = 0
        self._end = math.inf

    def measure(self) -> None:
        """All loads on all variants, there and back in turns."""
        config = self.plan.config
        try:
            for repeat in range(1 if config.find_max else config.num_repeats):
                for i in ordered(len(self.plan.variants), repeat):
                    variant = self.plan.variants[i]
                    if variant not in self.refused:
                        self._visit(variant, repeat)
        except _TimeUpError:
            self.time_up = True

    def measure_quality(self) -> None:
        """What ``--quality`` asks for, of every model that was served."""
        settings = self.plan.quality
        if settings is None:
            return
        from llmctl.targets.address_space import check_torch

        check_torch("--quality")
        from llmctl.evaluate.evaluation import evaluate  # imports torch

        for variant in self.plan.variants:
            model = variant.model(self.plan.config.engine)
            if model not in self.quality:
                mine = replace(settings, model=model)
                with step_progress() as show:  # its bars are gone before the table of loads is drawn
                    found = evaluate(mine, show)
                self.quality[model] = found.to_json(), quality_gates(mine, found)

    def _visit(self, variant: Variant, repeat: int) -> None:
        config = self.plan.config
        try:
            with self._url(variant) as url:
                session = self._connect(url)
                if config.find_max:
                    self._search(variant, session)
                    return
                for i in ordered(len(self.plan.axis.loads), repeat):
                    level = self.plan.axis.level(self.plan.axis.loads[i])
                    self._load(variant, level, session, config.num_prompts, stream=stream_of(repeat, i))
        except LlmctlError as error:
            if isinstance(error, OtherWorkError) and not self.points:
                raise  # so it would be with every other variant
            self.refused[variant] = error

    @contextmanager
    def _url(self, variant: Variant) -> Iterator[str | None]:
        model = variant.model(self.plan.config.engine)
        if not model:
            yield None
            return
        self.view.log(f"starting llmctl serve {' '.join([model, *variant.options])}")
        with self._serve(model, variant.options) as url:
            yield url

    def _connect(self, url: str | None) -> Session:
        plan, config = self.plan.serve, self.plan.config
        if url is not None:
            endpoint = make_endpoint(url, config.endpoint, config.backend, None, config.header, verify_tls=True)
            plan = replace(plan, endpoint=endpoint)
        server, target = connect(plan, self.view)
        counter, counted_by = find_counter(plan, target.model, self.view)
        self._check_same_work(make_head(plan, target.model, server, counted_by))
        target = warm_up(plan, target, counter, self.view)
        self.session = Session(plan, server, target.model, counter, counted_by, target)
        return self.session

    def _check_same_work(self, head: Mapping[str, Any]) -> None:
        judge = self.plan.serve.judge
        if judge.previous is not None:
            judge.check_same_work(identity_of(head, judge.previous, self.plan.variants))

    def _load(self, variant: Variant, level: Level, session: Session, requests: int, stream: int) -> Point:
        """One run of a load, added to its point."""
        if self.plan.config.max_duration is not None and not self.points:
            self._end = time.monotonic() + self.plan.config.max_duration  # from the first load on: there is one
        left = self._end - time.monotonic()
        if left <= 0:
            raise _TimeUpError
        limits = [seconds for seconds in (session.plan.config.load_seconds, left) if seconds is not None]
        config = replace(
            session.plan.config,
            load_seconds=min(limits) if math.isfinite(min(limits)) else None,
            request_rate=level.request_rate,
            max_concurrency=level.max_concurrency,
            num_prompts=requests,
        )
        session = replace(session, plan=replace(session.plan, config=config))
        items = make_items(session.plan, stream, session.counter)
        self.view.start(", ".join(filter(None, (variant.label, level.label))), len(items))
        run = run_once(session.plan, session.target, items, stream, self.view)
        self.view.stop()
        if run.load.interrupted:
            raise KeyboardInterrupt
        if not run.load.records:  # nothing was measured: no point
            raise _TimeUpError if left <= min(limits) else nothing_sent(config)
        note_chunks([run], self.view)
        point = self.points.setdefault((variant, level), Point(variant, level, session))
        point.session = session
        point.runs.append(run)
        self.view.point(variant, level, self.describe(point))
        return point

    def _search(self, variant: Variant, session: Session) -> None:
        axis, objectives = self.plan.axis, self.plan.objectives
        least = max(self.plan.config.num_prompts, -(-objectives.requests // LOOKS))

        def judge(load: float) -> Verdict:
            # Fewer would not be that load: never so many under way, or all there before the first is answered.
            size = max(least, math.ceil(load * (_WAVES if axis.whole else _ARRIVAL_SECONDS)))
            verdict = Verdict(False, False, 0)
            for _ in range(LOOKS):
                self._streams += 1
                point = self._load(variant, axis.level(load), session, size, stream=self._streams)
                verdict = self._verdict(point)
                if verdict.settled:
                    break
            return verdict

        search = Search(judge, resolution=self.plan.resolution, whole=axis.whole)
        self.searches[variant] = search
        search.run(axis.loads[0])

    def _verdict(self, point: Point, figures: Mapping[str, Any] | None = None) -> Verdict:
        options = self.plan.serve.options
        rounds = [
            Round(run.load.records, run_metrics(run.load.records, run.load.duration, options)) for run in point.runs
        ]
        return self.plan.objectives.judge(rounds, point.figures() if figures is None else figures)

    def describe(self, point: Point) -> dict[str, Any]:
        """A point of the result."""
        figures = point.figures()
        verdict = self._verdict(point, figures)
        price = self.plan.config.price_per_hour
        return {
            "variant": dict(point.variant.settings),
            **figures,
            "meets": verdict.meets,
            "settled": verdict.settled,
            "missed": list(verdict.missed),
            "cost_per_million_tokens": None if price is None else costs(figures, price),
            "knee": False,
        }


def costs(figures: Mapping[str, Any], price_per_hour: float) -> dict[str, float | None]:
    """Cost of a million tokens of each kind, the whole price laid on it; None where there were none."""
    hours = float(figures["duration"]) / 3600
    tokens = {"input": figures["total_input_tokens"], "output": figures["total_output_tokens"]}
    tokens["total"] = tokens["input"] + tokens["output"]
    return {kind: price_per_hour * hours / count * 1e6 if count else None for kind, count in tokens.items()}
