"""The tables of other servers in docs/benchmarks.md, and README's chart: written from docs/cpu/peers.json.

python scripts/peer_figures.py [--results report.json]     with results: that run of bench_peers.py is kept first
python scripts/peer_figures.py --check                     exit code 1 when page or chart is not what the file says
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from md_table import with_section
from peers.chart import chart
from peers.kept import Kept, kept
from peers.report import tables

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, DATA, CHART = DOCS / "benchmarks.md", DOCS / "cpu" / "peers.json", DOCS / "cpu" / "peers.svg"
MARKERS = ("<!-- peers: make peer-table -->", "<!-- end of peers -->")


def section(measured: Kept) -> str:
    """What stands between the markers."""
    picture = "![Output tokens a second of each server](cpu/peers.svg)"
    listed = tables(measured, measured.workloads, measured.titles, measured.own)
    return "\n".join([measured.header, "", picture, "", *listed]).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="FILE", help="of a run: becomes docs/cpu/peers.json first")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    if options.check and options.results is not None:
        parser.error("--check: writes nothing, and --results is to be written")
    document = json.loads((options.results or DATA).read_text(encoding="utf-8"))
    measured = Kept(document)
    page = PAGE.read_text(encoding="utf-8")
    wanted = {PAGE: with_section(PAGE.name, page, MARKERS, section(measured)), CHART: chart(measured)}
    if options.check:
        wrong = [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
        print(f"{' and '.join(wrong)}: run make peer-table" if wrong else "docs/benchmarks.md is what docs/cpu says")
        return 1 if wrong else 0
    if options.results is not None:
        DATA.write_text(json.dumps(kept(document), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
