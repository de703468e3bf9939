"""Commands that the documents mark to be run, run in their order on the demo model; pipelines, step by step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs.command_checks import check
from docs.documents import PAGES, ROOT, RUN, all_blocks, blocks, simple_commands
from docs.typist import Typist

slow = pytest.mark.slow
RUN_PAGES = sorted({block.page for block in all_blocks() if block.mark == RUN})
PIPELINES = sorted((ROOT / "docs" / "ci").glob("*.yml"))
EACH_PIPELINE = pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)


@slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("curl") is None, reason="the documents ask with curl, which is not installed")
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_a_page_runs_from_its_first_command_to_its_last(page: Path, tmp_path: Path) -> None:
    with Typist(tmp_path) as typist:
        for block in blocks(page):
            if block.mark == RUN:
                for line in block.text.replace("\\\n", " ").splitlines():
                    typist.type(line)


def test_pages_are_run_at_all() -> None:
    assert [page.name for page in RUN_PAGES] == ["README.md", "guide.md", "run.md"]
    assert set(RUN_PAGES) <= set(PAGES)


def scripts(path: Path) -> tuple[dict[str, str], list[str]]:
    """A pipeline's variables, and what its steps run."""
    document: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "jobs" in document:
        job = document["jobs"]["gate"]
        return job.get("env", {}), [step["run"] for step in job["steps"] if "run" in step]
    job = document["model"]
    variables = {name: value for name, value in job["variables"].items() if "$CI" not in value}
    return variables, [*job["before_script"], *job["script"]]


def commands(script: str) -> Iterator[list[str]]:
    for line in script.replace("\\\n", " ").splitlines():
        yield from simple_commands(line)


@EACH_PIPELINE
def test_a_pipelines_commands_could_be_typed(path: Path) -> None:
    variables, steps = scripts(path)
    assert "MODEL" in variables
    found = [words for script in steps for words in commands(script)]
    for words in found:
        check(words)
    assert {words[1] for words in found if words[0] == "llmctl"} >= {"build", "serve", "eval", "bench"}


@slow
@pytest.mark.timeout(1800)
@EACH_PIPELINE
def test_a_pipeline_passes(path: Path, tmp_path: Path) -> None:
    """On the demo model, in a fresh folder; what installs is left out, for it is installed."""
    variables, steps = scripts(path)
    summary = tmp_path / "summary.md"
    with Typist(tmp_path / "work", {**variables, "GITHUB_STEP_SUMMARY": str(summary)}) as typist:
        for script in steps:
            if not script.startswith("pip install"):
                typist.type(script)
        assert (typist.folder / "bench.xml").read_text().startswith("<?xml")
        assert summary.read_text()


def test_both_pipelines_ask_for_the_same() -> None:
    """One is not forgotten when the other is changed."""
    found = []
    for path in PIPELINES:
        _, steps = scripts(path)
        found.append([words for script in steps for words in commands(script) if words[0] == "llmctl"])
    assert found[0] == found[1]
