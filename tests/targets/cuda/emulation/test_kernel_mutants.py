"""Every barrier in a kernel is needed, and its absence is caught: each is taken out in turn."""

from __future__ import annotations

import re
from collections.abc import Callable

import machine
import pytest
import test_experts_kernels
import test_rope_kv_kernels
import test_sampling_kernels
from emulator import EmulationError, kernels_from_text, missing

from llmctl.targets.cuda.compile import SOURCE_DIR

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def _sampling() -> None:
    for filters in ({}, {"top_k": 40, "top_p": 0.9}):
        test_sampling_kernels.test_draws_equal_the_reference_sampler("f32", 3001, filters)


def _rope() -> None:
    test_rope_kv_kernels.test_only_the_cache_and_only_q_in_place("f16")


def _experts() -> None:
    test_experts_kernels.test_slots_by_expert(8, 70, 2, 3)
    for top_groups in (4, 2):
        test_experts_kernels.test_routes_are_the_reference_s("f16", "softmax", True, 12, 4, top_groups, True)


_CHECKS: dict[str, Callable[[], None]] = {"sampling.cu": _sampling, "rope_kv.cu": _rope, "experts.cu": _experts}


def _barriers() -> list[tuple[str, int]]:
    return [
        (name, match.start())
        for name in _CHECKS
        for match in re.finditer(r"(block|warp)_sync\(\);", (SOURCE_DIR / name).read_text())
    ]


@pytest.mark.parametrize(("source", "at"), _barriers())
def test_a_kernel_without_one_of_its_barriers_fails(source, at, monkeypatch):
    text = (SOURCE_DIR / source).read_text()
    mutant = kernels_from_text(text[:at] + re.sub(r"^\w+\(\)", "", text[at:], count=1), source)
    monkeypatch.setattr(machine, "kernels", lambda _: mutant)
    with pytest.raises(EmulationError):
        _CHECKS[source]()
