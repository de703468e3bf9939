"""One checkpoint seen by llmctl and by a tool: made, loaded by both, compared weight by weight."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peers.contest import PeerError, Setup
from peers.venvs import install

from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.resolve import resolve_model
from llmctl.errors import LlmctlError
from parity_trials.catalog import OURS, Tool

Maker = Literal["llmctl", "tool"]
REASON_CHARS = 300


class TrialError(Exception):
    """A checkpoint that was not made or not loaded; one line that says by whom and why."""


@dataclass(frozen=True)
class Trial:
    """What came of a kind of checkpoint.

    Attributes:
        maker: who made it; the other read it.
        linears: how many weights both have. differing: how many are not equal.
        worst: the largest difference of two entries, and of which weight.
        reason: why there was nothing to compare; "" when there was.
    """

    tool: str
    maker: Maker
    kind: str
    linears: int = 0
    differing: int = 0
    worst: float = 0.0
    worst_name: str = ""
    reason: str = ""

    @property
    def equal(self) -> bool:
        """Whether every weight is the same."""
        return not self.reason and self.linears > 0 and not self.differing


@dataclass
class Trials:
    """Trials of tools, below one folder of work; checkpoints are made once.

    Attributes:
        dense: the checkpoint, 16 bits, that all others are made from.
        llmctl: the command of it. seconds: the most that a step may take.
    """

    setup: Setup
    dense: Path
    say: Callable[[str], None]
    seconds: float = 900
    llmctl: tuple[str, ...] = (sys.executable, "-m", "llmctl")
    _made: set[str] = field(default_factory=set)

    def of(self, tool: Tool) -> tuple[dict[str, str], list[Trial]]:
        """Versions of a tool's distributions, and all its trials."""
        try:
            versions = install(self.setup, tool.install, self.say)
        except PeerError as error:
            reason = str(error)
            return {}, [Trial(tool.name, maker, kind, reason=reason) for maker, kind in _pairs(tool)]
        trials = []
        for maker, kind in _pairs(tool):
            trials.append(trial := self._tried(tool, maker, kind))
            self.say(f"{tool.name}: {kind} of {maker}: {said(trial)}")
        return versions, trials

    def ours(self, kind: str) -> Path:
        """The checkpoint of a kind that llmctl makes, made if it is not there.

        Raises:
            TrialError: it was not made.
        """
        folder = self.setup.work / "ours" / kind
        if kind not in self._made:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
            output = folder
            if "gguf" in OURS[kind]:
                folder.mkdir()
                output = folder / "model.gguf"
            command = [*self.llmctl, *OURS[kind], "--model", str(self.dense), "--output", str(output)]
            self._heard("llmctl", command)
            self._made.add(kind)
        return folder

    def run(self, tool: Tool, *arguments: str) -> None:
        """A tool's script in its environment.

        Raises:
            TrialError: it came to no good end.
        """
        self._heard(tool.name, [self.setup.binary(tool.name, "python"), str(tool.path), *arguments])

    def _tried(self, tool: Tool, maker: Maker, kind: str) -> Trial:
        try:
            folder = self.ours(kind) if maker == "llmctl" else self._theirs(tool, kind)
            output = self.setup.work / f"{tool.name}-{maker}-{kind}.safetensors"
            self.run(tool, "load", str(folder), str(output))
            return compare(tool.name, maker, kind, folder, output)
        except (TrialError, LlmctlError) as error:
            return Trial(tool.name, maker, kind, reason=str(error))

    def _theirs(self, tool: Tool, kind: str) -> Path:
        folder = self.setup.work / "theirs" / f"{tool.name}-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        self.run(tool, "make", kind, str(self.dense), str(folder))
        return folder

    def _heard(self, who: str, command: list[str]) -> None:
        """Run to a good end, in the folder of work: some tools leave files where they are."""
        try:
            done = subprocess.run(
                command, cwd=self.setup.work, capture_output=True, text=True, check=False, timeout=self.seconds,
                errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise TrialError(f"{who}: not done within {self.seconds:g} s") from error
        if done.returncode:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
            reason = next((line for line in reversed(lines) if re.match(r"\w*(Error|Exception)\b", line)), lines[-1])
            raise TrialError(f"{who}: exit code {done.returncode}: {reason.strip()[:REASON_CHARS]}")


def said(trial: Trial) -> str:
    """In a few words."""
    if trial.reason:
        return trial.reason
    if trial.equal:
        return f"{trial.linears} weights equal"
    return f"{trial.differing} of {trial.linears} weights differ, by {trial.worst:.3g} in {trial.worst_name}"


def compare(tool: str, maker: Maker, kind: str, folder: Path, theirs: Path) -> Trial:
    """What llmctl reads in ``folder`` (a checkpoint, or a folder of one GGUF file) against a tool's weights.

    Equal: every entry, once ours is rounded to the dtype that the tool computes in.
    """
    from safetensors import safe_open

    files = sorted(folder.glob("*.gguf"))
    checkpoint = open_checkpoint(resolve_model(str(files[0] if files else folder)))
    differing, worst, worst_name = 0, 0.0, ""
    with safe_open(theirs, "pt") as tensors:
        names = sorted(tensors.keys())
        for name in names:
            weight, found = checkpoint.weight(f"{name}.weight"), tensors.get_tensor(name)
            dense = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
            if dense.shape != found.shape:
                raise TrialError(f"{name}: llmctl has {tuple(dense.shape)}, {tool} {tuple(found.shape)}")
            apart = float((dense.to(found.dtype).float() - found.float()).abs().max())
            if apart != 0:  # NaN is a difference too
                differing += 1
                if not apart <= worst:
                    worst, worst_name = apart, name
    return Trial(tool, maker, kind, len(names), differing, worst, worst_name)


def _pairs(tool: Tool) -> list[tuple[Maker, str]]:
    return [*(("llmctl", kind) for kind in tool.loads), *(("tool", kind) for kind in tool.makes)]


def write_dense(model: str, folder: Path) -> Path:
    """A Llama of random float16 weights with ``model``'s tokenizer: widths that groups of 128 divide."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source = open_checkpoint(resolve_model(model))
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=int(source.config["vocab_size"]), hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        **{key: source.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    for name, content in source.aux_files().items():
        target = folder / name
        target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(written | {"torch_dtype": "float16"}, indent=2), encoding="utf-8")
    return folder
