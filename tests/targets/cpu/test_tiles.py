"""Where the system refuses AMX tiles, who loads no library says so too: the target, ``inspect``, ``doctor``."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmctl.artifact import describe
from llmctl.artifact.loader import EngineChecks
from llmctl.targets.cpu import findings, target, tiles
from llmctl.targets.cpu.target import CpuTarget, parse
from llmctl.targets.cpu.toolchain import SOURCE_DIR, VARIANTS

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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPERM])
def test_the_library_asks_the_same_in_the_same_words(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``amx.h`` as it is written: only a CPU with AMX runs it (``test_cpu_amx``)."""
    asked: list[int] = []

    def refuse(*request: int) -> int:
        asked.extend(request[1:])
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(tiles.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syscall=refuse))
    refusal = tiles.tile_refusal()
    source = (SOURCE_DIR / "amx.h").read_text()
    constants = re.search(r"kRequestPermission = (\w+), kTileData = (\w+);", source)
    why = re.search(r'why = errno == ENOSPC \? "(.+)" : std::strerror\(errno\);', source)
    words = re.search(r'snprintf\(answer.refusal, sizeof answer.refusal, "(.+)", why\)', source)
    assert constants
    assert why
    assert words
    assert asked == [int(constant, 0) for constant in constants.groups()]
    assert refusal == words[1] % (why[1] if number == errno.ENOSPC else os.strerror(number))
