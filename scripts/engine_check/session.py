"""A worker's tasks by name, over one device; the model that was opened last stays open for the next task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_check import http_serve, kernel_trace, loads, right, speed
from engine_check.models import Model, model
from engine_check.place import Place
from engine_check.supervise import Budget, Emit, LeftOut
from engine_check.tiny import Variant
from engine_check.trial import run_trial

VARIANT_SECONDS, CASE_SECONDS = 6.0, 2.0
"""About what a variant of the right part, and a case of decode or prefill, may take."""
TRACED_REPLAYS, TRACED_STEPS = 4, 24


@dataclass
class Setting:
    """What a run was asked for, as far as its tasks must know.

    Attributes:
        models: the model of a name. variants, scale: of the right part. decodes, prefills: the cases.
        one, many: what is served in process. gap_context: positions at which replays are traced.
        folder: the engine folder of a model's name. trial: the command, "" for none.
    """

    place: Callable[[], Place]
    arch: Callable[[], str]
    output: Path
    folder: Callable[[str], Path]
    trial: str = ""
    models: Callable[[str, str, str], Model] = model
    variants: tuple[Variant, ...] = right.VARIANTS
    scale: right.Scale = field(default_factory=right.Scale)
    decodes: tuple[tuple[int, int], ...] = speed.DECODES
    prefills: tuple[int, ...] = speed.PREFILLS
    one: loads.Load = loads.ONE
    many: loads.Load = loads.MANY
    gap_context: int = 512
    rates: Callable[[], dict[str, float]] = speed.device_rates


class Session:
    """Carries out a worker's tasks."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._place: Place | None = None
        self._opened: speed.Opened | None = None

    @property
    def place(self) -> Place:
        """The device, taken when it is first needed: some tasks leave it to the processes that they start."""
        if self._place is None:
            self._place = self.setting.place()
        return self._place

    def run(self, task: str, budget: Budget, emit: Emit) -> None:
        """A task: its part's name, and the model's where it is about one."""
        part, _, rest = task.partition(" ")
        getattr(self, f"_{part}")(rest, budget, emit)

    def lost(self) -> bool:
        """Whether the device no longer answers."""
        if self._place is None:
            return False
        try:
            self._place.synchronize()
        except Exception:
            return True
        return False

    # -- the parts --------------------------------------------------------------------------------------------

    def _facts(self, _: str, __: Budget, emit: Emit) -> None:
        for name, value in self.place.facts().items():
            emit(["facts", name], value)

    def _right(self, which: str, budget: Budget, emit: Emit) -> None:
        """``first`` half of the variants or the ``rest``."""
        half = -(-len(self.setting.variants) // 2)
        variants = self.setting.variants[half:] if which == "rest" else self.setting.variants[:half]
        for done, variant in enumerate(variants):
            if not budget.holds(VARIANT_SECONDS):
                emit(["right left out", which], [v.name for v in variants[done:]])
                return
            emit(["right", variant.name], self._checked(variant))

    def _checked(self, variant: Variant) -> dict[str, Any]:
        """One variant; what it raises costs the others nothing, unless the device is lost with it."""
        try:
            return right.check(self.place, variant, self.setting.scale, self.setting.arch())
        except Exception as error:
            if self.lost():
                raise
            return {"wrong": [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"], "wrong in all": 1}

    def _rates(self, _: str, __: Budget, emit: Emit) -> None:
        self._close()
        for name, value in self.setting.rates().items():
            emit(["rates", name], value)
        self.place.free()

    def _decode(self, name: str, budget: Budget, emit: Emit) -> None:
        opened = self.opened(name, emit)
        emit(["models", name, "launches"], speed.launches_of_a_step(opened, 1))
        for batch, context in self.setting.decodes:
            if not budget.holds(CASE_SECONDS):
                raise LeftOut(f"no time for {batch} × {context} and what follows")
            emit(["models", name, "decode", f"B{batch} L{context}"], speed.decode_case(opened, batch, context))
        emit(["models", name, "launch cost"], speed.launch_cost(opened))

    def _prefill(self, name: str, budget: Budget, emit: Emit) -> None:
        opened = self.opened(name, emit)
        for tokens in self.setting.prefills:
            if not budget.holds(CASE_SECONDS):
                raise LeftOut(f"no time for {tokens} tokens and what follows")
            emit(["models", name, "prefill", str(tokens)], speed.prefill_case(opened, tokens))

    def _served(self, name: str, budget: Budget, emit: Emit) -> None:
        runtime = self.opened(name, emit).runtime
        for load in (self.setting.one, self.setting.many):
            if not budget.holds(2 * CASE_SECONDS):
                raise LeftOut(f"no time for {load.name}")
            emit(["models", name, "served", str(load.at_once)], loads.run_load(runtime, load))

    def _gaps(self, name: str, budget: Budget, emit: Emit) -> None:
        """In a worker of its own, for the profiler must be up before graphs are captured."""
        if not self.place.real:
            raise LeftOut("there is no device to trace")
        kernel_trace.warm_up()
        opened = self.opened(name, emit)
        for load in (self.setting.one, self.setting.many):
            if not budget.holds(2 * CASE_SECONDS):
                raise LeftOut(f"no time for {load.at_once} at once")
            emit(["models", name, "gaps", str(load.at_once)], self._traced(opened, load))

    def _traced(self, opened: speed.Opened, load: loads.Load) -> dict[str, Any]:
        runtime = opened.runtime
        replay = runtime.decode_replay(load.at_once, self.setting.gap_context)
        replay()

        def replays() -> None:
            for _ in range(TRACED_REPLAYS):
                replay()
                self.place.synchronize()

        found = {"in a step": kernel_trace.replay_gaps(kernel_trace.trace(replays), TRACED_REPLAYS)}
        engine = loads.decoding(runtime, load)
        spans = kernel_trace.trace(lambda: [engine.step() for _ in range(TRACED_STEPS)])
        found["engine"] = kernel_trace.engine_gaps(spans, TRACED_STEPS)
        loads.drop(engine)
        return found

    def _http(self, name: str, budget: Budget, emit: Emit) -> None:
        http_serve.serve_over_http(name, self.setting.folder(name), budget, emit)

    def _trial(self, _: str, budget: Budget, emit: Emit) -> None:
        for name, value in run_trial(self.setting.trial, self.setting.output / "trial", budget.left).items():
            emit(["trial", name], value)

    # -- models -----------------------------------------------------------------------------------------------

    def opened(self, name: str, emit: Emit) -> speed.Opened:
        """The model, open; whichever was before it is closed."""
        if self._opened is not None and self._opened.model.name == name:
            return self._opened
        self._close()
        shape, _, kind = name.rpartition(" ")
        self._opened = opened = speed.Opened(self.place, self.setting.models(shape, kind, self.setting.arch()))
        facts = {"weights made in s": opened.planes_seconds, "runtime opened in s": opened.open_seconds}
        emit(["models", name, "opened"], {**facts, "KV blocks": opened.blocks})
        return opened

    def _close(self) -> None:
        if self._opened is not None:
            opened, self._opened = self._opened, None
            opened.close()
