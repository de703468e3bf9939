"""scripts/gpu_check.sh --sanitize where there is no GPU: what is run, how what the tool says is read, what it says."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import gpu_sanitize
import pytest
from gpu_sanitize import Found, Run

SCRIPTS = Path(__file__).parents[2] / "scripts"
CLEAN = (
    "....\n4 passed, 2 deselected in 3.21s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
)
HAZARD = (
    "========= Error: Race reported between Write access at norm\n4 passed in 3.21s\n"
    "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
)


def test_every_module_is_run_and_those_that_share_memory_under_every_tool() -> None:
    modules = gpu_sanitize.modules()
    assert set(gpu_sanitize._SHARING) < set(modules)
    assert "emulator" not in modules
    assert "signatures" not in modules
    found = gpu_sanitize.runs(["racecheck", "memcheck"])
    assert [run.module for run in found if run.tool == "memcheck"] == modules
    assert {run.module for run in found if run.tool == "racecheck"} == set(gpu_sanitize._SHARING)


def test_a_run_names_its_tool_and_its_tests() -> None:
    words = gpu_sanitize.command("/bin/cs", Run("racecheck", "gemm_tile"))
    assert words[:3] == ["/bin/cs", "--tool", "racecheck"]
    assert words[-2:] == ["-k", "__gemm_tile"]


@pytest.mark.parametrize(
    ("text", "tests", "errors"),
    [
        (CLEAN, 4, 0),
        (HAZARD, 4, 2),
        ("1 failed, 3 passed in 2.00s\n========= ERROR SUMMARY: 0 errors\n", 3, 1),
        ("4 passed in 0:01:02.00s\n========= ERROR SUMMARY: 1 error\n", 4, 1),
        ("4 passed in 2.00s\n", 4, None),  # the tool said nothing: it was not on
        ("7 deselected in 2.00s\n========= ERROR SUMMARY: 0 errors\n", 0, None),
        ("", 0, None),
    ],
)
def test_what_a_run_says(text: str, tests: int, errors: int | None) -> None:
    found = gpu_sanitize.read(Run("racecheck", "norm_kernels"), text)
    assert (found.tests, found.errors) == (tests, errors)


def test_report() -> None:
    run = Run("memcheck", "gemm_tile")
    text = gpu_sanitize.report([Found(run, 4, 0), Found(run, 2, 1, ("a race",)), Found(Run("synccheck", "x"), 0, None)])
    assert text.splitlines() == [
        "memcheck: 6 tests, 1 errors", "  gemm_tile:", "    a race",
        "synccheck: 0 tests, 0 errors, 1 of 1 runs not finished", "  x:",
    ]  # fmt: skip


def test_runs_end_at_the_deadline(tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\nif [ $2 = memcheck ]; then sleep 60; fi\necho '4 passed in 1.00s'\n"
                    "echo '========= ERROR SUMMARY: 0 errors'\n")  # fmt: skip
    tool.chmod(0o755)
    assert gpu_sanitize.find_sanitizer({"PATH": str(tmp_path)}) == str(tool)
    began = time.monotonic()
    assert gpu_sanitize.execute(str(tool), Run("synccheck", "x"), began + 30) == Found(Run("synccheck", "x"), 4, 0)
    assert gpu_sanitize.execute(str(tool), Run("memcheck", "x"), time.monotonic() + 0.3).errors is None
    assert gpu_sanitize.execute(str(tool), Run("memcheck", "x"), began).lines == ("not begun: no time left",)
    assert time.monotonic() - began < 20


def test_a_missing_sanitizer_is_said_in_one_line() -> None:
    done = subprocess.run(
        [str(SCRIPTS / "gpu_check.sh"), "--sanitize"], capture_output=True, text=True,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "CUDA_HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == gpu_sanitize.NOT_HERE
    assert done.stderr.count("\n") == 1
    assert "compute-sanitizer is missing" in done.stderr or "no usable GPU" in done.stderr
