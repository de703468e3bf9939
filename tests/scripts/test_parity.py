"""Parity with other tools: the comparison, what is said of it, and that the catalog and the tools' scripts agree."""

from __future__ import annotations

import re
from pathlib import Path

import parity
import pytest
import tiny_checkpoint
from parity_trials.catalog import OURS, TOOLS, Tool
from parity_trials.report import to_markdown, to_text
from parity_trials.trials import Trial, TrialError, Trials, compare
from peers.contest import Setup

from llmctl.checkpoint.opening import open_checkpoint


def seen_by_a_tool(folder: Path, output: Path, **changed: float) -> Path:
    """The weights of a GPTQ checkpoint as a tool that computes in float16 has them, some moved by so much."""
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(folder)
    weights = {}
    for name in tiny_checkpoint.linear_shapes():
        weight = checkpoint.weight(f"{name}.weight").dequantize().half()
        weight[0, 0] += changed.get(name.rpartition(".")[2], 0)
        weights[name] = weight
    save_file(weights, output)
    return output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint.write_gptq(tmp_path / "gptq")


def test_the_same_weights_are_equal(folder: Path, tmp_path: Path) -> None:
    found = compare("a tool", "tool", "gptq", folder, seen_by_a_tool(folder, tmp_path / "seen"))
    assert found.equal
    assert found.linears == len(tiny_checkpoint.linear_shapes())


@pytest.mark.parametrize("by", [0.5, float("nan")])
def test_one_entry_that_differs_is_found_and_named(folder: Path, tmp_path: Path, by: float) -> None:
    found = compare("a tool", "tool", "gptq", folder, seen_by_a_tool(folder, tmp_path / "seen", up_proj=by))
    assert not found.equal
    assert found.differing == tiny_checkpoint.LAYERS
    assert found.worst_name.endswith("up_proj")


def test_another_shape_is_no_comparison(folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"model.layers.0.mlp.up_proj": torch.zeros(3, 4)}, tmp_path / "seen")
    with pytest.raises(TrialError, match=r"\(3, 4\)"):
        compare("a tool", "tool", "gptq", folder, tmp_path / "seen")


@pytest.mark.slow
def test_a_tool_that_cannot_be_installed_is_said_for_each_of_its_kinds(tmp_path: Path) -> None:
    tool = Tool("none", "none.py", (("no-such-package==0",),), ("no-such-package",), ("awq-4",), ("x",))
    setup = Setup(tmp_path, "none", (0,), pip_flags=("--no-index",))
    versions, trials = Trials(setup, tmp_path, lambda _: None).of(tool)
    assert not versions
    assert [(trial.maker, trial.kind, trial.equal) for trial in trials] == [
        ("llmctl", "awq-4", False),
        ("tool", "x", False),
    ]
    assert all("no-such-package" in trial.reason for trial in trials)


def test_what_is_said() -> None:
    trials = [
        Trial("t", "llmctl", "awq-4", 14),
        Trial("t", "tool", "nf4", 14, 2, 0.25, "model.layers.0.mlp.up_proj"),
        Trial("t", "tool", "fp4", reason="t: exit code 1: ValueError: a|b " + "long " * 30),
    ]
    text = to_text(trials)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("ok  llmctl -> t, awq-4: 14 weights equal\nERR t -> llmctl, nf4: 2 of 14 weights differ")
    page = to_markdown({"t": {"tool": "1.0"}}, trials)
    assert "t: tool 1.0" in page
    assert "| llmctl | t | awq-4 | 14 weights equal |" in page
    assert r"a\|b" in page


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_the_catalog_names_what_there_is(tool: Tool) -> None:
    script = tool.path.read_text(encoding="utf-8")
    assert set(tool.loads) <= set(OURS)
    assert all(re.search(rf'"{re.escape(kind)}"', script) for kind in tool.makes)


def test_the_docs_have_the_table() -> None:
    document = parity.DOCS.read_text(encoding="utf-8")
    begin, end = (document.index(marker) for marker in parity.MARKERS)
    section = document[begin:end]
    for tool in TOOLS:
        for kind in (*tool.loads, *tool.makes):
            assert f"| {kind} |" in section, (tool.name, kind)
