"""What this machine's CPU can do, as the system tells it."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


@functools.cache
def cpu_features() -> frozenset[str]:
    """Instruction-set features as Linux names them (avx2, avx512_bf16, …) and the machine name (x86_64)."""
    features = {platform.machine().lower()}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                features.update(value.split())
                break
    except OSError:
        pass
    return frozenset(features)
