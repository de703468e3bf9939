"""Loads and variants of a sweep, out of its options."""

from __future__ import annotations

import math
from dataclasses import Field, fields

import pytest
import typer

from llmctl.bench import sweep_plan
from llmctl.bench.config import BenchSweepConfig
from llmctl.bench.local_server import option_words
from llmctl.bench.sweep_plan import Level, Variant, axis_of, ordered, plan_sweep, variants_of
from llmctl.cli.main import app
from llmctl.config import ServeConfig
from llmctl.errors import UsageError


def test_loads() -> None:
    axis = axis_of(BenchSweepConfig())
    assert (axis.name, axis.loads) == ("max_concurrency", (1, 2, 4, 8, 16, 32))
    assert axis.level(4) == Level(math.inf, 4)
    axis = axis_of(BenchSweepConfig(request_rates="4,0.5,4,inf", concurrencies="8"))
    assert (axis.name, axis.loads) == ("request_rate", (0.5, 4, math.inf))
    assert axis.level(4) == Level(4, 8)
    assert axis.level(4).label == "4 req/s, 8 at once"
    assert axis_of(BenchSweepConfig(request_rates="2", concurrencies="1,3")).level(3) == Level(2, 3)
    assert axis_of(BenchSweepConfig(find_max=True)).loads == (1,)
    assert axis_of(BenchSweepConfig(find_max=True, concurrencies="8")).name == "max_concurrency"


def test_variants_are_every_combination() -> None:
    found = variants_of(BenchSweepConfig(engine="e", vary=("max_num_seqs=8,32", "--enable-prefix-caching=true,false")))
    assert [variant.label for variant in found] == [
        f"max-num-seqs={seqs}, enable-prefix-caching={cached}" for seqs in (8, 32) for cached in ("true", "false")
    ]
    assert found[0].options == ["--max-num-seqs", "8"]
    assert found[3].options == ["--max-num-seqs", "32", "--no-enable-prefix-caching"]
    assert variants_of(BenchSweepConfig()) == (Variant(),)
    other = variants_of(BenchSweepConfig(vary=("model=a,b",)))
    assert [(variant.model("e"), variant.options) for variant in other] == [("a", []), ("b", [])]
    assert Variant().model("e") == "e"


SERVED = {param.name: param for param in typer.main.get_command(app).commands["serve"].params}  # type: ignore[attr-defined]


@pytest.mark.parametrize("field", [f for f in fields(ServeConfig) if f.name != "model"], ids=lambda f: f.name)
def test_the_words_of_an_option_are_those_that_serve_has(field: Field[object]) -> None:
    """Whatever can vary is written as ``llmctl serve`` reads it; what cannot is said to be the sweep's own."""
    option = SERVED[field.name]
    named = option.opts[0].removeprefix("--")
    if field.name in sweep_plan._OURS:
        with pytest.raises(UsageError, match=f"{named} is the sweep's own to decide"):
            variants_of(BenchSweepConfig(engine="e", vary=(f"{named}=1",)))
        return
    values = ("true", "false") if isinstance(field.default, bool) else ("17", "a,b;")
    written = []
    for value in values:
        (variant,) = variants_of(BenchSweepConfig(engine="e", vary=(f"{named}={value}",)))
        written += variant.options
    if isinstance(field.default, bool):
        assert written == (option.secondary_opts if field.default else option.opts[:1])
    else:
        assert written == [option.opts[0], "17", option.opts[0], "a,b"]


def test_words_of_settings() -> None:
    assert option_words("served_model_name", ("a", "b")) == ["--served-model-name", "a", "--served-model-name", "b"]
    assert option_words("threads", 2) == ["--threads", "2"]
    assert option_words("max_restarts", 3) == [], "it is so by default"
    assert option_words("ui", False) == ["--no-ui"]
    assert option_words("as_family", "llama") == ["--as", "llama"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"request_rates": "0"}, "--request-rate '0'"),
        ({"request_rates": "a"}, "numbers above 0"),
        ({"concurrencies": "1.5"}, "whole numbers of at least 1"),
        ({"request_rates": "1,2", "concurrencies": "1,2"}, "both vary"),
        ({"find_max": True, "request_rates": "1,2", "slo": ("p99_ttft_ms<=5",)}, "begins at one load"),
        ({"find_max": True}, "add --slo"),
        ({"find_max": True, "slo": ("p99_ttft_ms<=5",), "repeats": 3}, "a search decides"),
        ({"num_prompts": 10}, "--max-concurrency 32: of --num-prompts 10 so many are never under way"),
        ({"resolution": "0"}, "--resolution"),
        ({"vary": ("max-num-seqs=1,2",)}, "add --engine"),
        ({"vary": ("max-num-seqs",), "engine": "e"}, "expected OPTION=VALUE"),
        ({"vary": ("max-num-seqs=1,",), "engine": "e"}, "expected OPTION=VALUE"),
        ({"vary": ("max-num-sequences=1,2",), "engine": "e"}, "did you mean 'max-num-seqs'"),
        ({"vary": ("port=1,2",), "engine": "e"}, "the sweep's own to decide"),
        ({"vary": ("api-key=a,b",), "engine": "e"}, "the sweep's own to decide"),
        ({"vary": ("threads=1", "threads=2"), "engine": "e"}, "named twice"),
        ({"vary": ("shed=yes",), "engine": "e"}, "expected true or false"),
        ({"vary": ("as-family=llama",), "engine": "e"}, "'as-family' is no option of llmctl serve"),
        ({"engine": "e", "base_url": "http://127.0.0.1:1"}, "not both"),
        ({"vary": ("model=a,b",), "base_url": "http://127.0.0.1:1"}, "not both"),
        ({"html": "."}, "--html .: expected a file"),
        ({"price_per_hour": 0.0}, "--price-per-hour"),
        ({"max_duration": 0.0}, "--max-duration"),
        ({"load_seconds": -1.0}, "--load-seconds"),
        ({"load_seconds": 1.0, "request_rates": "0.1,9"}, "at --request-rate 0.1 the first request arrives after"),
        ({"svg": "."}, "expected a file"),
        ({"quality": "nowhere.yaml", "engine": "e"}, "--quality nowhere.yaml"),
    ],
)
def test_what_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as error:
        plan_sweep(BenchSweepConfig(**options))  # type: ignore[arg-type]
    assert said in str(error.value)


def test_turns_go_there_and_back() -> None:
    assert [list(ordered(3, repeat)) for repeat in range(3)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]
