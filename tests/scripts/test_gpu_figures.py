"""The page's figures from a GPU are those of docs/gpu, whatever that holds."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_figures
import pytest
from engine_check_cases import RESULTS

FACTS = {
    "date": "2026-12-01 10:00 UTC", "card": "NVIDIA H100 80GB HBM3", "driver": "580.1", "CUDA": "13.0", "torch": "2.11",
    "cupy": "14.0", "python": "3.12.3", "commit": "0123456789abcdef", "measured": True,
}  # fmt: skip


def write(folder: Path, **changes: object) -> None:
    document = {"version": 1, "facts": FACTS, "results": RESULTS, "problems": [], "left out": [], "seconds": {}}
    (folder / "gpu_engine.json").write_text(json.dumps({**document, **changes}))


def test_the_page_is_what_the_file_says() -> None:
    assert gpu_figures.main(["--check"]) == 0, "run make gpu-table"


def test_without_a_file_it_says_that_nothing_was_measured(tmp_path: Path) -> None:
    assert gpu_figures.section(tmp_path) == gpu_figures.NOTHING


def test_a_section_says_when_and_on_what_and_only_what_was_measured(tmp_path: Path) -> None:
    write(tmp_path)
    text = gpu_figures.section(tmp_path)
    assert text.startswith("Last run 2026-12-01 10:00 UTC on one NVIDIA H100 80GB HBM3 (driver 580.1, CUDA 13.0, ")
    assert "commit 0123456789ab;" in text
    assert "| Llama-3-8B 4-bit | 64 | 512 | 11.000 | 5,818 | 67% |" in text
    assert "trial" not in text.replace("the trial's time", "")  # a program that a reader does not have
    assert "\n6 of 9 targets measured were reached.\n" in text
    assert "* missed: idle in a decode step: ≤ 3%: 4.0% (batch 64, 4-bit)" in text
    assert "Qwen" not in text
    assert "not measured" not in text
    assert "bf16" not in text
    assert ".svg" not in text


def test_charts_are_shown_where_they_are(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "gpu_engine.svg").write_text("<svg/>")
    assert "gpu_engine.svg)" in gpu_figures.section(tmp_path)
    assert "gpu_engine_prefill.svg" not in gpu_figures.section(tmp_path)


def test_failures_are_not_kept_quiet(tmp_path: Path) -> None:
    write(tmp_path, problems=["decode x: gone"])
    assert "That run reported 1 failures, the first: decode x: gone." in gpu_figures.section(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"version": 0}, "expected version 1, found 0"), ({"facts": {**FACTS, "measured": False}}, "of a dry run")],
)
def test_what_is_no_measurement_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        gpu_figures.section(tmp_path)


def test_only_what_stands_between_the_markers_changes() -> None:
    page = f"before\n{gpu_figures.BEGIN}\nold\n{gpu_figures.END}\nafter\n"
    found = gpu_figures.written(page, "new")
    assert found == f"before\n{gpu_figures.BEGIN}\n\nnew\n\n{gpu_figures.END}\nafter\n"
    assert gpu_figures.written(found, "new") == found
    with pytest.raises(ValueError, match="once each"):
        gpu_figures.written(page + gpu_figures.END, "new")
