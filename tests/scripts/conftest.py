"""Scripts are imported by their names here; so is the emulator, whose modules lie with its tests."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parents[2] / "scripts", Path(__file__).parents[1] / "targets" / "cuda" / "emulation"):
    sys.path.insert(0, str(folder))
