"""The frame of the CLI: version, help, light imports, ``--config``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmctl import __version__

SUBCOMMANDS = ["quantize", "build", "inspect", "serve"]
BENCH = [["bench", "serve"], ["bench", "throughput"], ["bench", "latency"]]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmctl.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "120", "HOME": str(Path.home())},
    )


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"llmctl {__version__}\n")


@pytest.mark.parametrize("command", [["quantize"], ["build"], ["inspect"], ["serve"], *BENCH], ids=" ".join)
def test_help_has_panels_and_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"llmctl {' '.join(command)} " in result.stdout.split("Usage:")[1].split("\n", 1)[1], "no example"
    assert result.stdout.count("╭─") >= 2, "options are not grouped into panels"


@pytest.mark.parametrize("command", [[], ["quantize"], ["build"], ["inspect"], ["serve"], *BENCH], ids=" ".join)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from llmctl.cli.main import app\n"
        f"app({[*command, '--help']!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'cupy', 'numpy', 'fastapi', 'aiohttp', 'huggingface_hub'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [["quantize"], ["build"], ["serve"], *BENCH], ids=" ".join)
def test_config_with_an_unknown_key_names_the_nearest(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("modle: demo:smollm2-135m\n")
    result = run(*command, "--config", str(path))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "unknown option 'modle'" in result.stderr
    assert "did you mean 'model'" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n- b\n", "expected a mapping"), ("model: [", "not valid YAML")],
)
def test_a_config_that_is_no_mapping(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    result = run("build", "--config", str(path))
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_config_is_one_line() -> None:
    result = run("build", "--config", "nowhere.yaml")
    assert result.returncode == 2
    assert "nowhere.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def test_command_line_wins_over_config(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: ./from-config\ntarget: reference\n")
    result = run("build", "--config", str(path), "--model", "./from-command-line", "--output", str(tmp_path / "e"))
    assert result.returncode == 2
    assert "from-command-line" in result.stderr
    assert not (tmp_path / "e").exists()
