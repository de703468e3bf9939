"""The figures from a GPU in docs/benchmarks.md: written from docs/gpu, a run of ``scripts/gpu_check.sh --engine``.

    python scripts/gpu_figures.py [--results FOLDER]     with results: those of that folder become docs/gpu first
    python scripts/gpu_figures.py --check                exit code 1 when the page is not what docs/gpu says

Nothing is in the section that docs/gpu/gpu_engine.json does not hold, and that holds what was measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_check.goals import judge
from engine_check.report import VERSION, decode_rows, failed, prefill_rows, served_rows, start_rows, table
from md_table import with_section

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "benchmarks.md"
BEGIN, END = "<!-- gpu figures: make gpu-table -->", "<!-- end of gpu figures -->"
NOTHING = "Nothing has been measured on a GPU with this version yet (`scripts/gpu_check.sh --engine` does)."
FILES = ("gpu_engine.json", "gpu_engine.svg", "gpu_engine_prefill.svg", "gpu_engine.md")
_FACTS = ("card", "driver", "CUDA", "torch", "cupy", "python")


def section(folder: Path) -> str:
    """What stands between the markers.

    Raises:
        ValueError: a file of another version, or of a dry run.
    """
    path = folder / FILES[0]
    if not path.exists():
        return NOTHING
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("version") != VERSION:
        raise ValueError(f"{path.name}: expected version {VERSION}, found {document.get('version')}")
    if not document["facts"]["measured"]:
        raise ValueError(f"{path.name}: of a dry run, which measures nothing")
    images = [name for name in FILES if name.endswith(".svg") and (folder / name).exists()]
    return "\n".join([*_head(document), *_tables(document["results"]), *_images(images, folder)])


def _head(document: Mapping[str, Any]) -> list[str]:
    facts = document["facts"]
    known = ", ".join(f"{name} {facts[name]}" for name in _FACTS[1:] if facts.get(name))
    when = (
        f"Last run {facts['date']} on one {facts.get('card', 'unknown card')} ({known}), commit {facts['commit'][:12]}"
    )
    rates = document["results"].get("rates", {})
    bounds = ", ".join(f"{name} {value:,.0f}" for name, value in rates.items() if name != "memory GB")
    verdicts = [v for v in judge(document["results"]) if v.reached is not None]
    missed = [f"{v.goal.name}: {v.found}" for v in verdicts if not v.reached]
    lines = [f"{when}{f'; the device: {bounds}' if bounds else ''}. Random weights; `scripts/gpu_check.sh --engine`."]
    if bounds:
        lines += [
            "",
            "`of read`, `of matmul`: share of the device's rate. All of it: [gpu_engine.md](gpu/gpu_engine.md).",
        ]
    wrong = failed(document)
    if wrong:
        lines += ["", f"That run reported {len(wrong)} failures, the first: {wrong[0]}."]
    if verdicts:
        lines += ["", f"{len(verdicts) - len(missed)} of {len(verdicts)} targets measured were reached."]
    return [*lines, *(f"* missed: {line}" for line in missed)]


def _tables(results: Mapping[str, Any]) -> list[str]:
    """What most readers ask for; docs/gpu has the rest."""
    lines: list[str] = []
    decode = ("decode", "sequences", "context", "ms", "±", "tok/s", "GB/s", "of read", "÷ trial")
    prompts = ("prompts", "tokens", "ms", "tok/s", "TFLOP/s", "of matmul", "host ms", "÷ trial")
    served = ("served", "load", "way", "tok/s", "range", "TTFT ms", "range", "between tokens ms")
    ready = [row for row in start_rows(results) if "to ready" in row[1]]
    for head, rows, left_out in (
        (served, served_rows(results), ()),
        (decode, decode_rows(results), ("±", "GB/s", "÷ trial")),
        (prompts, prefill_rows(results), ("TFLOP/s", "host ms", "÷ trial")),
        (("start", "what", "seconds"), ready, ()),
    ):
        if rows:
            kept = [i for i, name in enumerate(head) if name not in left_out and any(row[i] for row in rows)]
            lines += ["", *table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])]
    return lines


def _images(names: Sequence[str], folder: Path) -> list[str]:
    place = folder.relative_to(DOCS) if folder.is_relative_to(DOCS) else folder
    return ["", *(f"![{name}]({place}/{name})" for name in names)] if names else []


def written(page: str, text: str) -> str:
    """The page with the section in it.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    return with_section(PAGE.name, page, (BEGIN, END), text)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="of a run: becomes docs/gpu first")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    folder = DOCS / "gpu"
    if options.results is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
            if (options.results / name).exists():
                shutil.copyfile(options.results / name, folder / name)
    page = PAGE.read_text(encoding="utf-8")
    wanted = written(page, section(folder))
    if options.check:
        print(
            "docs/benchmarks.md is what docs/gpu says" if page == wanted else "docs/benchmarks.md: run make gpu-table"
        )
        return 0 if page == wanted else 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
