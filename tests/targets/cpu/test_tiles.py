"""Where the system refuses AMX tiles, who loads no library says so too: the target, ``inspect``, ``doctor``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmctl.artifact import describe
from llmctl.artifact.loader import EngineChecks
from llmctl.targets.cpu import findings, target
from llmctl.targets.cpu.target import CpuTarget, parse
from llmctl.targets.cpu.toolchain import VARIANTS

REFUSAL = "AMX: the system refused the use of tiles: Operation not permitted"
SAID = f"avx512bf16 ({REFUSAL})"


@pytest.fixture(autouse=True)
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with every instruction, whose system refuses tiles."""
    features = frozenset(feature for variant in VARIANTS for feature in variant.features)
    for module in (target, findings):
        monkeypatch.setattr(module, "cpu_features", lambda: features)
        monkeypatch.setattr(module, "tile_refusal", lambda: REFUSAL)
    monkeypatch.setattr("llmctl.targets.cpu.toolchain.platform.machine", lambda: "x86_64")


def test_a_target_says_what_runs_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("amx").kernel_build() == SAID
    assert parse("amx,avx2").kernel_build() == SAID
    assert parse("avx512vnni").kernel_build() == ""  # its library asks for no tiles
    monkeypatch.setattr(target, "tile_refusal", lambda: "")
    assert parse("amx").kernel_build() == ""


def test_inspect_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuTarget, "check_runs_here", lambda _: None)
    nothing = SimpleNamespace(path=Path("e"), target=parse("amx"), machine=lambda: None, kernels=lambda: None)
    assert describe._runs_here(cast(EngineChecks, cast(Any, nothing))) == f"yes, as {SAID}"


def test_doctor_says_it() -> None:
    found = {finding.name: finding for finding in findings.findings()}
    assert found["AMX tiles"].found == f"{REFUSAL}; engines for them run the code of avx512bf16"
    assert not found["AMX tiles"].problem
