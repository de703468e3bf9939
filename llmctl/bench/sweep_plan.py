"""What a sweep measures: its loads, the variants of our server that they are sent to, what they must meet. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

from llmctl.bench import gate
from llmctl.bench.baseline import load_baseline
from llmctl.bench.config import BenchSweepConfig
from llmctl.bench.decide import Objectives
from llmctl.bench.local_server import ADDRESS, option_words
from llmctl.bench.outcome import ReadBaseline
from llmctl.bench.quality import read_settings
from llmctl.bench.serve_plan import Plan, check_arrivals, make_plan
from llmctl.config import EvalConfig, ServeConfig, option_of
from llmctl.errors import UsageError
from llmctl.secret_options import SECRET_OPTIONS

RATE, CONCURRENCY = "request_rate", "max_concurrency"
_DEFAULT_CONCURRENCIES = "1,2,4,8,16,32"
_OURS = ADDRESS | SECRET_OPTIONS | {"api_key_file"}
"""Options of serve that the sweep itself decides, or that its client could not follow."""
_FIELDS = {option_of(field.name).removeprefix("--"): field.name for field in fields(ServeConfig)}


@dataclass(frozen=True)
class Level:
    """A load: arrivals a second (inf: all at once), and how many requests may be under way at once (None: any)."""

    request_rate: float = math.inf
    max_concurrency: int | None = None

    @property
    def label(self) -> str:
        """For people."""
        at_once = "" if self.max_concurrency is None else f"{self.max_concurrency} at once"
        if math.isinf(self.request_rate):
            return at_once or "all at once"
        return f"{self.request_rate:.4g} req/s" + (f", {at_once}" if at_once else "")


@dataclass(frozen=True)
class Axis:
    """What varies, ``RATE`` or ``CONCURRENCY``; its loads in ascending order; what the other one is kept at."""

    name: str
    loads: tuple[float, ...]
    other: Level

    @property
    def whole(self) -> bool:
        """Whether loads are whole numbers."""
        return self.name == CONCURRENCY

    def level(self, load: float) -> Level:
        """The level of a load."""
        if self.whole:
            return Level(self.other.request_rate, int(load))
        return Level(load, self.other.max_concurrency)


@dataclass(frozen=True)
class Variant:
    """One setting of the options that vary: (option with dashes, value) pairs."""

    settings: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """``max-num-seqs=8, itl-target=0``; empty when nothing varies."""
        return ", ".join(f"{name}={value}" for name, value in self.settings)

    def model(self, engine: str) -> str:
        """The engine or model that it serves."""
        return dict(self.settings).get("model", engine)

    @property
    def options(self) -> list[str]:
        """Of ``llmctl serve``, the model left out."""
        return [word for name, value in self.settings if name != "model" for word in _words(name, value)]


def axis_of(config: BenchSweepConfig) -> Axis:
    """The loads of a sweep, or where a search begins.

    Raises:
        UsageError: no numbers, both lists vary, or a search with more than one load to begin at.
    """
    rates = _numbers(config.request_rates, "request_rate", whole=False)
    counts = _numbers(config.concurrencies, "max_concurrency", whole=True)
    if len(rates) > 1 and len(counts) > 1:
        raise UsageError(
            "--request-rate, --max-concurrency: both vary, expected one list",
            fix="one number for the other",
            param="max_concurrency",
        )
    other = Level(rates[0] if rates else math.inf, int(counts[0]) if counts else None)
    if config.find_max and max(len(rates), len(counts)) > 1:
        raise UsageError(
            "--find-max: begins at one load, found several",
            fix="one number, such as --request-rate 1",
            param="find_max",
        )
    if len(rates) > 1 or (rates and not math.isinf(rates[0]) and len(counts) < 2):
        return Axis(RATE, tuple(rates), other)
    if not counts:
        if config.find_max:
            return Axis(RATE, (1.0,), other)
        counts = _numbers(_DEFAULT_CONCURRENCIES, "max_concurrency", whole=True)
    return Axis(CONCURRENCY, tuple(counts), other)


def _numbers(text: str | None, param: str, *, whole: bool) -> list[float]:
    """Ascending numbers above 0 from ``1,2,4``; without repetitions."""
    if text is None:
        return []
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    bad = [n for n in found if not n > 0 or (whole and not n.is_integer())]
    if bad:
        wanted = "whole numbers of at least 1" if whole else "numbers above 0, or inf,"
        option = "--" + param.replace("_", "-")
        raise UsageError(f"{option} '{text}': expected {wanted} after commas such as 1,2,4", param=param)
    return sorted(set(found))


def variants_of(config: BenchSweepConfig) -> tuple[Variant, ...]:
    """Every combination of the values of ``--vary``; one without settings when nothing varies.

    Raises:
        UsageError: not OPTION=VALUES, an option that serve does not have or the sweep decides, one that is named twice,
            or no engine of ours to vary.
    """
    known = set(_FIELDS) - {name for name, field in _FIELDS.items() if field in _OURS}
    axes: dict[str, list[str]] = {}
    for text in config.vary:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("_", "-")
        parts = [part.strip() for part in _values(values)]
        if not equals or not all(parts):
            raise UsageError(f"--vary '{text}': expected OPTION=VALUE,VALUE such as max-num-seqs=8,32", param="vary")
        if name not in known:
            raise UsageError(f"--vary '{text}': {_why_not(name, known)}", param="vary")
        if name in axes:
            raise UsageError(f"--vary '{text}': {name} is named twice", fix=f"{name}=ALL,ITS,VALUES", param="vary")
        axes[name] = list(dict.fromkeys(parts))
        for part in axes[name]:
            _words(name, part)  # refused here
    if axes and not config.engine and "model" not in axes:
        raise UsageError("--vary: of which server?", fix="add --engine ENGINE, which is then served", param="vary")
    combinations = product(*([(name, value) for value in values] for name, values in axes.items()))
    return tuple(Variant(settings) for settings in combinations)


def _values(text: str) -> list[str]:
    """``A,B``; or ``A;B`` where a value has commas, ``A;`` when there is one."""
    return text.removesuffix(";").split(";") if ";" in text else text.split(",")


def _why_not(name: str, known: set[str]) -> str:
    if _FIELDS.get(name) in _OURS:
        return f"{name} is the sweep's own to decide"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"'{name}' is no option of llmctl serve" + (f"; did you mean '{close[0]}'?" if close else "")


def _words(name: str, value: str) -> list[str]:
    """The words of a command line that set an option of ``llmctl serve``.

    Raises:
        UsageError: a switch that is neither true nor false.
    """
    field = _FIELDS[name]
    default = getattr(ServeConfig, field)
    if isinstance(default, tuple):
        return option_words(field, (value,))
    if not isinstance(default, bool):
        return option_words(field, value)
    if value not in ("true", "false"):
        raise UsageError(f"--vary {name}: expected true or false, found '{value}'", param="vary")
    return option_words(field, value == "true")


def ordered(count: int, repeat: int) -> Sequence[int]:
    """Places 0 to ``count`` - 1, there and back in turns (ABBA): a drift of the machine meets all alike."""
    return range(count) if repeat % 2 == 0 else range(count - 1, -1, -1)


def stream_of(repeat: int, load: int) -> int:
    """Which words and arrivals a load has: other ones each time."""
    return repeat * 1000 + load


@dataclass(frozen=True)
class SweepPlan:
    """Checked options: what can be refused before any server is asked anything."""

    config: BenchSweepConfig
    serve: Plan
    axis: Axis
    variants: tuple[Variant, ...]
    resolution: float
    objectives: Objectives
    quality: EvalConfig | None

    @property
    def points(self) -> list[tuple[Variant, Level]]:
        """Every load on every variant; of a search, which makes up its loads, the first of each."""
        return [(variant, self.axis.level(load)) for variant in self.variants for load in self.axis.loads]


def plan_sweep(config: BenchSweepConfig, read: ReadBaseline = load_baseline) -> SweepPlan:
    """Check the options.

    Args:
        read: reads the baseline.

    Raises:
        UsageError: on the first that cannot be honoured.
    """
    if config.find_max and config.baseline:
        raise UsageError(
            "--find-max, --baseline: a search makes up its loads, and no two searches the same",
            fix="sweep the loads of --request-rate or --max-concurrency",
            param="baseline",
        )
    axis, variants = axis_of(config), variants_of(config)
    serve = make_plan(config, read)
    if not config.find_max:
        for repeat, (i, load) in product(range(config.num_repeats), enumerate(axis.loads)):
            check_arrivals(replace(config, request_rate=axis.level(load).request_rate), stream_of(repeat, i))
    objectives = Objectives(serve.judge.slos, serve.options.goodput, config.max_failed_ratio)
    if config.base_url and any(variant.model(config.engine) for variant in variants):
        raise UsageError("--engine, --base-url: our own server or another one, not both", param="engine")
    if config.price_per_hour is not None and not 0 < config.price_per_hour < math.inf:
        raise UsageError(
            f"--price-per-hour: expected an amount above 0, found {config.price_per_hour}", param="price_per_hour"
        )
    if config.max_duration is not None and not config.max_duration > 0:
        raise UsageError(f"--max-duration: expected seconds above 0, found {config.max_duration}", param="max_duration")
    most = axis.loads[-1] if axis.whole else axis.other.max_concurrency or 0
    if not config.find_max and most > config.num_prompts:
        raise UsageError(
            f"--max-concurrency {most:g}: of --num-prompts {config.num_prompts} so many are never under way",
            fix=f"--num-prompts {3 * most:g}",
            param="num_prompts",
        )
    if config.find_max and not serve.judge.slos:
        raise UsageError(
            "--find-max: the highest load that meets what?", fix="add --slo 'p99_ttft_ms<=500'", param="find_max"
        )
    if config.find_max and config.num_repeats > 1:
        raise UsageError("--find-max, --repeats: a search decides how often it measures a load", param="repeats")
    resolution = gate.parse_share(config.resolution, "resolution")
    if not resolution > 0:
        raise UsageError("--resolution: expected a share above 0", fix="such as 5%", param="resolution")
    quality = read_settings(Path(config.quality)) if config.quality else None
    if quality is not None and not all(variant.model(config.engine) for variant in variants):
        raise UsageError("--quality: of which model?", fix="add --engine ENGINE, which is then served", param="quality")
    return SweepPlan(config, serve, axis, variants, resolution, objectives, quality)
