"""text/ and engine/ stay light: the API process starts without torch and transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llmctl

PACKAGE = Path(llmctl.__file__).parent


def test_text_and_engine_import_neither_torch_nor_transformers() -> None:
    modules = [
        f"llmctl.{room}.{path.stem}"
        for room in ("text", "engine")
        for path in sorted((PACKAGE / room).glob("[!_]*.py"))
    ]
    assert len(modules) > 8
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
