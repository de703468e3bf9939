"""The script that writes a random mixture: what it writes is read, what it cannot write is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import random_mixture

from llmctl.checkpoint.assemble import accounted_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.text.tokenizer import Tokenizer

SMALL = ("--hidden", "64", "--width", "32", "--layers", "1", "--experts", "4", "--chosen", "2", "--vocab", "256")


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["random_mixture.py", str(output), *SMALL, *options])
    return random_mixture.main()


def test_what_is_written_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "mixture"
    assert run(monkeypatch, folder) == 0
    made = open_checkpoint(folder)
    graph, unused = accounted_graph(made)
    assert not unused
    assert graph.weights["layers.0.experts.down_proj.weight"].shape == (4 * 64, 32)
    ids = Tokenizer.from_files(made.aux_files()).encode("\x00 é", add_special_tokens=False)
    assert len(ids) == 4
    assert max(ids) < graph.vocab_size


def test_what_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "a", "--chosen", "5") != 0
    assert "num_experts_per_tok: expected at most 4 experts, found 5" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(monkeypatch, tmp_path / "file" / "b") == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "c", "--vocab", "255")
    assert "--vocab: expected 256 or more" in capsys.readouterr().err
