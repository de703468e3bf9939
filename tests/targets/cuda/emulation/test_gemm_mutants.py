"""Every barrier of the GEMM kernels is needed, and so is every wait for a copy: each is taken out in turn.

One is left: the emulator takes a fence and an atomic of one thread as publishing what its whole block wrote, so it does
not miss the barrier in front of the count that announces a split's sums.
"""

from __future__ import annotations

import re

import gemm_cases
import machine
import pytest
import test_experts_kernels
import test_gemm_stream
import test_gemm_tile
from emulator import EmulationError, kernels, kernels_from_text, missing

from llmctl.targets.cuda.compile import SOURCE_DIR
from llmctl.targets.cuda.layout import CudaFormat

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

_SYNC = re.compile(r"(?<!device_fence\(\);\n    )((block|warp)_sync|cp_async_wait<[^>]*>)\(\);")


def _stream() -> None:
    test_gemm_stream._check("f16", 3, CudaFormat(4, (40, 2056), group=64), 4)


def _tile() -> None:
    # 9 and 10 steps: the last of them read the two slots that the sums are written over, so that the barrier between
    # is missed. With 11 steps the last one reads a slot behind the sums.
    test_gemm_tile._check("f16", 17, CudaFormat(4, (133, 1800), group=64), 3)


def _grouped() -> None:
    test_experts_kernels.test_a_slot_has_the_same_bits_in_any_batch("f16", "dense_gated")


_CHECKS = {
    ("w4a16_stream.cu", "gemm_stream.cuh"): _stream,
    ("w4a16_stream.cu", "gemm_tail.cuh"): _stream,
    ("w4a16_gemm.cu", "gemm_tile.cuh"): _tile,
    ("grouped_dense.cu", "grouped.cuh"): _grouped,
}


def _places() -> list[tuple[str, str, int]]:
    return [
        (source, header, match.start())
        for source, header in _CHECKS
        for match in _SYNC.finditer((SOURCE_DIR / header).read_text())
    ]


def _inlined(name: str, header: str, at: int) -> str:
    """A source with its own headers in place of their includes, one of them without the barrier at ``at``."""
    text = (SOURCE_DIR / name).read_text()
    if name == header:
        text = text[:at] + text[at:].partition(";")[2]
    text = text.replace("#pragma once", "")
    return re.sub(r'#include "((?:gemm_\w+|grouped)\.cuh)"', lambda include: _inlined(include[1], header, at), text)


def _launch_from(made, source, monkeypatch):
    for module in (gemm_cases, machine):
        monkeypatch.setattr(module, "kernels", lambda name: made if name == source else kernels(name))


@pytest.mark.parametrize(("source", "header", "at"), _places())
def test_a_gemm_without_one_of_its_barriers_fails(source, header, at, monkeypatch):
    _launch_from(kernels_from_text(_inlined(source, header, at), source), source, monkeypatch)
    with pytest.raises(EmulationError):
        _CHECKS[source, header]()


@pytest.mark.parametrize("source", ["w4a16_stream.cu", "w4a16_gemm.cu", "grouped_dense.cu"])
def test_the_unchanged_kernel_passes(source, monkeypatch):
    _launch_from(kernels_from_text(_inlined(source, "", 0), source), source, monkeypatch)
    next(check for (name, _), check in _CHECKS.items() if name == source)()
