"""The rooms' dependency order: each may import only what stands to its left (see docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import llmctl
from llmctl.targets.table import ROOMS

PACKAGE = Path(llmctl.__file__).parent
ORDER = (
    "errors extras secret_options config affinity niceness text structured graph checkpoint engine targets artifact "
    "evaluate quantize serving bench distributed cli __main__"
).split()
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported_names(source: str) -> set[str]:
    """Full names under llmctl that a module imports, anywhere in it (lazy imports and those for types count)."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full module name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("llmctl.")}


def imported_rooms(source: str) -> set[str]:
    """Rooms of llmctl that a module imports."""
    return {name.split(".")[1] for name in imported_names(source)} - {"__version__"}


def circles(sources: Mapping[str, str]) -> set[frozenset[str]]:
    """Groups of modules that import one another, by whatever way round. ``sources``: module -> its text."""
    reach: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = imported_names(source)
        reach[module] = {name if name in sources else name.rpartition(".")[0] for name in names} & sources.keys()
    for via, further in reach.items():  # Warshall: in place, so in order
        for found in reach.values():
            if via in found:
                found |= further
    return {frozenset(n for n in found if module in reach[n]) for module, found in reach.items() if module in found}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.relative_to(PACKAGE).as_posix())
def test_imports_only_leftwards(module: Path) -> None:
    room = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    allowed = set(ORDER[: ORDER.index(room) + 1])
    assert imported_rooms(module.read_text()) <= allowed


def test_engine_never_imports_a_runtime() -> None:
    for module in (PACKAGE / "engine").glob("*.py"):
        assert "targets" not in imported_rooms(module.read_text())


def target_room(name: str) -> str | None:
    """The target whose room a module stands in; None for what the targets share and what is no target's."""
    parts = name.split(".")
    return parts[2] if parts[1] == "targets" and len(parts) > 2 and parts[2] in ROOMS else None


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.relative_to(PACKAGE).as_posix())
def test_only_the_table_knows_every_target(module: Path) -> None:
    name = ".".join(module.relative_to(PACKAGE.parent).with_suffix("").parts)
    imported = {target_room(found) for found in imported_names(module.read_text())} - {None}
    room = target_room(name)
    if room is not None:
        assert imported <= {room, "reference"}
    elif name.startswith(("llmctl.evaluate.", "llmctl.quantize.")):
        assert imported <= {"reference"}
    elif name != "llmctl.targets.table":
        assert imported == set()


def test_nobody_else_asks_which_target_it_is() -> None:
    asked = re.compile(r"native_cpu|target_kind|target\.kind|name\.kind|kind [!=]= [\"'](cpu|cuda|reference)")
    for module in MODULES:
        if module.relative_to(PACKAGE).parts[0] != "targets":
            assert asked.findall(module.read_text()) == [], module
    assert asked.search("if plan.target.kind == 'cuda':")


def test_no_circle_of_imports() -> None:
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES}
    found = circles({name.removesuffix(".__init__"): path.read_text() for path, name in names.items()})
    assert sorted(sorted(circle) for circle in found) == []


def test_circles_are_seen() -> None:
    lazy = "def f():\n    from llmctl.x.a import A\n"
    typed = "if TYPE_CHECKING:\n    import llmctl.x.c\n"
    sources = {
        "llmctl.x.a": "from llmctl.x import b, NAME\n",
        "llmctl.x.b": lazy,
        "llmctl.x.c": "from llmctl.x.d import D\n",
        "llmctl.x.d": "from llmctl.x.e import E\n" + lazy,
        "llmctl.x.e": typed,
        "llmctl.x": "",
    }
    assert circles(sources) == {frozenset({"llmctl.x.a", "llmctl.x.b"}), frozenset({f"llmctl.x.{m}" for m in "cde"})}
    assert circles({**sources, "llmctl.x.b": "", "llmctl.x.e": ""}) == set()


def test_the_check_sees_a_violation() -> None:
    assert imported_rooms("def f():\n    from llmctl.serving.app import x\n") == {"serving"}
    assert imported_rooms("from llmctl import cli") == {"cli"}
