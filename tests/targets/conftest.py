"""What runs on every target runs on the cuda runtime as well, over the emulator that its own tests have."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "cuda" / "emulation"))
