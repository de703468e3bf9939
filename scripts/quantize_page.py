#!/usr/bin/env python3
"""The tables and the chart of docs/which-quantization.md, from what ``quantize_table.py`` kept.

    python scripts/quantize_table.py --text wiki.test.txt --calib wiki.train.txt --calib self --seeds 0,1,2 \\
        --results results.jsonl
    python scripts/quantize_page.py results.jsonl --costs costs.jsonl

How large a quantization is, on disk and in each target's memory, and how fast it decodes depend on its format, bits and
groups, not on what its numbers are. So every layout among the results is made once by rounding to nearest, measured and
removed; ``--costs FILE`` keeps that, a JSON object a line, and skips what it has. Of results of several versions of the
code the last in the file counts; the page names the version. No number on the page is from anywhere else.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from md_table import markdown_table, with_section
from quantize_table import HEAD, cells, keep, kept, machine
from trial_options import work_folder

from llmctl.bench.pareto import Point, chart, front
from llmctl.config import BuildConfig, QuantizeConfig
from llmctl.errors import ExitCode, LlmctlError
from llmctl.quantize.methods import method_of, scheme_of
from llmctl.quantize.plan import choose_format

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "which-quantization.md"
PICTURE = "images/which-quantization.svg"
CHOICE = ("<!-- what to choose from -->", "<!-- end of what to choose from -->")
SPREAD = ("<!-- calibrations and seeds -->", "<!-- end of calibrations and seeds -->")
TARGETS = ("cpu", "cuda:sm_90")
ORIGINAL = "original"
_COLUMNS = (
    *("quantization", "bits a weight", "on disk, MiB", *(f"in memory, {name}, MiB" for name in TARGETS)),
    *("perplexity", "KL", "ΔNLL", "tok/s", "made in, s"),
)


@dataclass(frozen=True)
class Cost:
    """What a layout takes.

    Attributes:
        size: bytes of the weights' files (of the original: at 16 bits). memory: target -> bytes of an engine's weights.
        speed: tokens a second, as ``llmctl quantize compare`` has it, on ``machine``.
    """

    size: int
    memory: Mapping[str, int]
    speed: float | None
    machine: str


@dataclass(frozen=True)
class Choice:
    """A row of the page: a case's results, all of one calibration, and what it costs; no results: the original."""

    case: str
    results: Sequence[Mapping[str, Any]]
    cost: Cost

    def mean(self, name: str) -> float:
        """Of a figure, over the seeds."""
        return statistics.fmean(row[name] for row in self.results)

    @property
    def point(self) -> Point:
        """Its place in the chart."""
        return Point(self.case, self.cost.size, self.mean("kl") if self.results else 0.0, self.cost.speed)

    def cells(self, on_front: bool) -> list[str]:
        """The row of a quantization."""
        first = self.results[0]
        return [
            f"**{self.case}**" if on_front else self.case,
            f"{first['bits_per_weight']:.2f}",
            *_sizes(self.cost),
            f"{math.exp(self.mean('nll')):.2f}",
            f"{self.mean('kl'):.4f} ± {first['kl_error']:.4f}",
            f"{self.mean('delta_nll'):+.4f}",
            _speed(self.cost),
            f"{self.mean('seconds'):.0f}",
        ]


def main() -> int:
    """Write the page; the process's exit code."""
    args = _parser().parse_args()
    try:
        rows = latest(kept(args.results))
        if not rows:
            raise ValueError(f"{args.results}: no results")
        with work_folder(args.keep, "llmctl-quantize-page-") as folder:
            costs = Costs(args.costs, folder, args.threads)
            choices = [Choice(row[0]["case"], row, costs.of(config_of(row[0]))) for row in first_calibration(rows)]
            original = Choice(ORIGINAL, (), costs.original(config_of(rows[0][0]).model))
        text = args.page.read_text(encoding="utf-8")
        text = with_section(args.page.name, text, CHOICE, choice_section(original, choices))
        text = with_section(args.page.name, text, SPREAD, spread_section(rows))
        picture = args.page.parent / PICTURE
        picture.parent.mkdir(exist_ok=True)
        points = [choice.point for choice in (original, *choices)]
        picture.write_text(chart(points, config_of(rows[0][0]).model), encoding="utf-8")
        args.page.write_text(text, encoding="utf-8")
    except LlmctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error!r}" if isinstance(error, KeyError) else f"error: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)
    print(f"wrote {args.page} and {picture}")
    return 0


def latest(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Results by case and calibration, those of one seed once, of the version of the code that came last.

    Raises:
        ValueError: they are of several models or protocols.
    """
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    version: dict[tuple[str, str], str] = {}
    for row in results:
        case = (row["case"], row["calibration"])
        if version.get(case) != row["key"][1]:
            found[case], version[case] = {}, row["key"][1]
        found[case][config_of(row).seed] = row
    protocols = {(config_of(row).model, *row["key"][3:]) for seeds in found.values() for row in seeds.values()}
    if len(protocols) > 1:
        raise ValueError(f"results of several models or protocols: {sorted(map(str, protocols))}")
    return [list(seeds.values()) for seeds in found.values()]


def first_calibration(rows: Sequence[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Of every case the calibration that was measured first; by bits a weight, then by KL."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row[0]["case"], row)
    return sorted(by_case.values(), key=lambda row: (round(row[0]["bits_per_weight"], 1), row[0]["kl"]))


def config_of(result: Mapping[str, Any]) -> QuantizeConfig:
    """The options a result was made with."""
    known = {field.name for field in fields(QuantizeConfig)}
    return QuantizeConfig(**{name: value for name, value in json.loads(result["key"][2]).items() if name in known})


def layout_of(config: QuantizeConfig) -> QuantizeConfig:
    """The quickest way to the same layout: what a method finds out changes numbers, not planes.

    Bits that a budget gives do not depend on the method either, but on the text.
    """
    method, scheme = method_of(config), scheme_of(config)
    if method.book:
        return replace(config, output="", threads=None)
    plain = QuantizeConfig(
        model=config.model,
        method="rtn",
        bits=None if config.has_budget else scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        format=choose_format(config, {scheme}),
        ignore=tuple(config.ignore),
        override=tuple(config.override),
        target_bpw=config.target_bpw,
        target_size=config.target_size,
    )
    if not config.has_budget:
        return plain
    calibration = {name: getattr(config, name) for name in ("calib", "calib_samples", "calib_length", "seed")}
    return replace(plain, **calibration)


class Costs:
    """Costs by layout: from the file where it has them, measured and kept otherwise."""

    def __init__(self, path: Path | None, folder: Path, threads: int | None) -> None:
        self._path, self._folder, self._threads = path, folder, threads
        self._known = {row["layout"]: _cost(row) for row in kept(path)}

    def of(self, config: QuantizeConfig) -> Cost:
        """Of a quantization with these options."""
        layout = layout_of(config)
        key = json.dumps(asdict(layout), sort_keys=True)
        if key not in self._known:
            self._keep(key, self._measured(layout))
        return self._known[key]

    def original(self, model: str) -> Cost:
        """Of the model itself."""
        from llmctl.checkpoint.opening import open_checkpoint
        from llmctl.checkpoint.resolve import resolve_model

        key = f"{ORIGINAL} {model}"
        if key not in self._known:
            checkpoint = open_checkpoint(resolve_model(model), widen=True)
            size = sum(2 * prod(checkpoint.describe(name).shape) for name in checkpoint.names())
            self._keep(key, self._cost(model, size))
        return self._known[key]

    def _measured(self, layout: QuantizeConfig) -> Cost:
        import shutil

        from llmctl.quantize.driver import quantize_checkpoint

        output = self._folder / "layout"
        report = quantize_checkpoint(replace(layout, output=str(output), threads=self._threads))
        try:
            return self._cost(str(output), report.size_after)
        finally:
            shutil.rmtree(output)

    def _cost(self, model: str, size: int) -> Cost:
        from llmctl.artifact.plan import plan_build
        from llmctl.bench.progress import Progress
        from llmctl.bench.quantizations import decode_speed

        memory = {name: plan_build(BuildConfig(model=model, target=name)).memory.weights for name in TARGETS}
        speed = decode_speed(BuildConfig(model=model), self._folder / "engine", self._threads, Progress())
        return Cost(size, memory, speed, machine())

    def _keep(self, key: str, cost: Cost) -> None:
        self._known[key] = cost
        keep(self._path, {"layout": key, **asdict(cost)})
        print(f"{key}: {cost.size / 2**20:.1f} MiB", file=sys.stderr, flush=True)


def _cost(row: Mapping[str, Any]) -> Cost:
    return Cost(**{field.name: row[field.name] for field in fields(Cost)})


def choice_section(original: Choice, choices: Sequence[Choice]) -> str:
    """The table to choose from, with what it was measured by."""
    everything = [original, *choices]
    on_front = front([choice.point for choice in everything])
    first = choices[0].results[0]
    own = ["16.00", *_sizes(original.cost), f"{math.exp(first['original_nll']):.2f}", "0", "0", _speed(original.cost)]
    rows = [[ORIGINAL, *own, ""], *(c.cells(on) for c, on in zip(choices, on_front[1:], strict=True))]
    text, windows, context = first["key"][3:]
    versions = sorted({row["key"][1] for choice in choices for row in choice.results})
    machines = sorted({choice.cost.machine for choice in everything})
    made_on = sorted({row["machine"] for choice in choices for row in choice.results if "machine" in row})
    said = (
        f"{config_of(first).model}; quality on {windows} windows of {context} tokens of {text}, calibrated on "
        f"{', '.join(dict.fromkeys(c.results[0]['calibration'] for c in choices))}; llmctl {', '.join(versions)}. "
        f"Tokens a second of 8 greedy requests at once, 64 + 64 tokens, target `cpu`, on {', '.join(machines)}"
        f"{f'; made on {made_on[0]}' if len(made_on) == 1 and made_on != machines else ''}. "
        "Bold: nothing else is at least as small, as near and as fast."
    )
    return "\n\n".join([said, markdown_table(_COLUMNS, rows), f"![size, KL and speed]({PICTURE})"])


def spread_section(rows: Sequence[list[dict[str, Any]]]) -> str:
    """Every case with every calibration and the range over its seeds."""
    return markdown_table(HEAD, [cells(row) for row in rows])


def _sizes(cost: Cost) -> list[str]:
    return [f"{size / 2**20:.1f}" for size in (cost.size, *(cost.memory[name] for name in TARGETS))]


def _speed(cost: Cost) -> str:
    return "-" if cost.speed is None else f"{cost.speed:.0f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON lines that quantize_table.py --results kept")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="JSON lines to keep sizes and speeds in")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the page (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make layouts there")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser


if __name__ == "__main__":
    sys.exit(main())
