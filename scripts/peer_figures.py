"""The tables of other servers in docs/benchmarks.md, a kind of processor after the other, their charts, and README's
table of all: written from docs/cpu/peers-KIND.json.

python scripts/peer_figures.py [--results report.json --processor amx]     with results: that run of bench_peers.py is
                                                                           kept first, for that kind of processor
python scripts/peer_figures.py --check                                     exit code 1 when pages or charts are not what
                                                                           the files say
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from md_table import markdown_table, with_section
from peers.chart import chart
from peers.kept import Kept, kept
from peers.measure import Workload
from peers.report import TTFT, Metric, main_metric, show_ratio, tables

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
FOLDER = ROOT / "docs" / "cpu"
MARKERS = ("<!-- peers: make peer-table -->", "<!-- end of peers -->")
PROCESSORS = {"amx": "Xeon with AMX", "vnni": "Xeon with AVX-512 VNNI, without AMX"}
"""By what decides which kernels run, the best first, as headings say it."""


def data(kind: str) -> Path:
    """What is kept of the run on a kind of processor."""
    return FOLDER / f"peers-{kind}.json"


def picture(kind: str) -> Path:
    """Its chart."""
    return FOLDER / f"peers-{kind}.svg"


def section(runs: Mapping[str, Kept]) -> str:
    """What stands between the page's markers."""
    lines: list[str] = []
    for kind, run in runs.items():
        image = f"![Output tokens a second of each server, {PROCESSORS[kind]}](cpu/{picture(kind).name})"
        lines += [f"### {PROCESSORS[kind]}", "", run.header, *versions(run), "", image, ""]
        lines += tables(run, run.workloads, run.titles, run.own, heading="####")
    return "\n".join(lines).rstrip()


def versions(run: Kept) -> list[str]:
    """A line of what was installed, if that was kept."""
    found = {package: version for peer in run.versions.values() for package, version in peer.items()}
    return ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in found.items()) + "."] if found else []


def summary(runs: Mapping[str, Kept]) -> str:
    """What stands between README's markers: the first processor's chart, and a table of all."""
    kind = next(iter(runs))
    said = f"Output tokens a second on two cores of a {PROCESSORS[kind]}: llmctl, {', '.join(products(runs[kind]))}"
    image = f"![{said}](docs/cpu/{picture(kind).name})"
    head = ["llmctl ÷ the best of", *(f"{PROCESSORS[kind]}: {', '.join(products(run))}" for kind, run in runs.items())]
    works = {work.name: work for run in runs.values() for work in run.workloads}
    rows = [
        [label(work, metric), *(against_best(run, work.name, metric) for run in runs.values())]
        for work in works.values()
        for metric in (main_metric(work), TTFT)
    ]
    return f"{image}\n\n{markdown_table(head, rows)}"


def products(run: Kept) -> list[str]:
    """The peers of a run without their variants: the first words of their names."""
    return list(dict.fromkeys(title.split()[0] for label, title in run.titles.items() if label not in run.own))


def label(work: Workload, metric: Metric) -> str:
    """A row's first cell."""
    streams = "one stream" if work.concurrency == 1 else f"{work.concurrency} at once"
    return f"{streams}: {metric.heading.partition(',')[0]}, {'more' if metric.more else 'less'} is better"


def against_best(run: Kept, work: str, metric: Metric) -> str:
    """The ratio to the best peer, and which that is."""
    best = run.best_peer(run.own, work, metric) if work in {known.name for known in run.workloads} else None
    if best is None:
        return "–"
    return f"{show_ratio(run.ratio(run.own[0], best, work, metric))} ({run.titles[best]})"


def wanted(runs: Mapping[str, Kept]) -> dict[Path, str]:
    """Every file, as the runs have it."""
    pages = {PAGE: section(runs), README: summary(runs)}
    made = {
        page: with_section(page.name, page.read_text(encoding="utf-8"), MARKERS, text) for page, text in pages.items()
    }
    return made | {picture(kind): chart(run, f", {PROCESSORS[kind]}") for kind, run in runs.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="FILE", help="of a run: becomes docs/cpu/peers-KIND.json first")
    parser.add_argument("--processor", choices=tuple(PROCESSORS), help="the kind that --results was measured on")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    if options.check and options.results is not None:
        parser.error("--check: writes nothing, and --results is to be written")
    if (options.results is None) != (options.processor is None):
        parser.error("--results and --processor: expected both or neither")
    documents = {kind: json.loads(data(kind).read_text(encoding="utf-8")) for kind in PROCESSORS if data(kind).exists()}
    if options.results is not None:
        documents[options.processor] = kept(json.loads(options.results.read_text(encoding="utf-8")))
    runs = {kind: Kept(documents[kind]) for kind in PROCESSORS if kind in documents}
    files = wanted(runs)
    if options.check:
        wrong = [path.name for path, text in files.items() if _now(path) != text]
        print(f"{' and '.join(wrong)}: run make peer-table" if wrong else "pages and charts are what docs/cpu says")
        return 1 if wrong else 0
    if options.results is not None:
        text = json.dumps(documents[options.processor], indent=1, ensure_ascii=False) + "\n"
        data(options.processor).write_text(text, encoding="utf-8")
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return 0


def _now(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
