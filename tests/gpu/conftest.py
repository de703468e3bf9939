"""The tests of this folder are those of kernels/emulation, on a device."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels" / "emulation"))
