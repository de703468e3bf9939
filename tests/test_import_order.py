"""The rooms' dependency order: each may import only what stands to its left (see README, Layout)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import llmctl

PACKAGE = Path(llmctl.__file__).parent
ORDER = ("errors config text graph checkpoint engine targets artifact quantize serving bench distributed cli").split()
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported_rooms(source: str) -> set[str]:
    """Rooms of llmctl that a module imports, anywhere in it (lazy imports count)."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full module name"
            names = [node.module or ""]
            if node.module == "llmctl":
                names = [f"llmctl.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("llmctl.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.relative_to(PACKAGE).as_posix())
def test_imports_only_leftwards(module: Path) -> None:
    room = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    allowed = set(ORDER[: ORDER.index(room) + 1])
    if room == "targets":  # until the Target protocol stands between the two
        allowed |= {"artifact"}
    assert imported_rooms(module.read_text()) <= allowed


def test_engine_never_imports_a_runtime() -> None:
    for module in (PACKAGE / "engine").glob("*.py"):
        assert "targets" not in imported_rooms(module.read_text())


def test_the_check_sees_a_violation() -> None:
    assert imported_rooms("def f():\n    from llmctl.serving.app import x\n") == {"serving"}
    assert imported_rooms("from llmctl import cli") == {"cli"}
