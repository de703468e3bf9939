"""The QLoRA trial: what it compares, and that what it installs is what it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import qlora_trial
import torch
from adapter_files import products, settings, write
from parity_trials.catalog import OURS
from safetensors.torch import save_file
from tiny_checkpoint import VOCAB, write_gptq

from llmctl.checkpoint.adapters.opening import open_merged
from llmctl.evaluate.distributions import CheckpointDistributions

TOKENS = [5, 9, 2, 77, 31]


@pytest.mark.parametrize("by", [0.0, 0.5])
def test_log_probabilities_are_compared(by: float, tmp_path: Path) -> None:
    base = write_gptq(tmp_path / "base")
    adapter = write(tmp_path / "a", settings(), products("q_proj"))
    merged = open_merged(str(base), [str(adapter)], "x").checkpoint
    found = torch.cat(list(CheckpointDistributions(merged, [(TOKENS, len(TOKENS) - 1)])))
    found = torch.cat([found, torch.zeros(1, VOCAB)])  # the last token's, which nothing is compared with
    found[0, 0] += by
    save_file({"tokens": torch.tensor(TOKENS, dtype=torch.int32), "logits": found}, tmp_path / "theirs")
    apart, changed = qlora_trial.compare(base, adapter, tmp_path / "theirs")
    assert (apart <= qlora_trial.TOLERANCE) is (by == 0)
    assert changed > qlora_trial.TOLERANCE


def test_the_tool_and_the_kinds() -> None:
    assert qlora_trial.TOOL.path.is_file()
    assert set(qlora_trial.KINDS) <= OURS.keys()
    assert any(requirement.startswith("peft==") for group in qlora_trial.TOOL.groups for requirement in group)
