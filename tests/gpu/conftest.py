"""The tests of this folder are those of targets/cuda/emulation, on a device."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "targets" / "cuda" / "emulation"))
