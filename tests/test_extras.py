"""The commands that are printed for what is not installed, and that nobody prints one of his own."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from llmctl import extras
from llmctl.errors import MissingPackageError
from llmctl.extras import DISTRIBUTION, MODULES, install_command, install_hint, missing, missing_package, require

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
WRITTEN = (".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".txt", ".service", ".conf", ".cff")
OWN_HINTS = re.compile(
    r"\bllmctl\[|pip install [^\n]*\bllmctl(?![-\w/])|pip install [^\n]*\b(torch|cupy)\b|pip install \{"
)


@pytest.fixture
def own_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that finds this Python's pip."""
    monkeypatch.setattr(extras.shutil, "which", lambda _: str(Path(sys.executable).parent / "pip"))


def test_the_distribution_is_the_projects() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    assert MODULES.keys() <= PROJECT["optional-dependencies"].keys()
    assert list(PROJECT["scripts"]) == ["llmctl"]


@pytest.mark.usefixtures("own_pip")
def test_from_a_clone_the_clone_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert install_command("cuda") == "pip install -e '.[cuda]'"
    assert install_command("cuda", "--no-deps") == "pip install --no-deps -e '.[cuda]'"
    monkeypatch.chdir(REPOSITORY.parent)
    assert install_command("cuda") == f"pip install -e '{REPOSITORY.name}[cuda]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("cuda") == f"pip install -e '{REPOSITORY}[cuda]'"


@pytest.mark.usefixtures("own_pip")
def test_from_a_wheel_the_distribution_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extras, "_PACKAGE", tmp_path / "site-packages" / "llmctl")
    assert install_command("quantize") == f"pip install '{DISTRIBUTION}[quantize]'"


def test_the_build_without_cuda_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """In words that need no page of ours, and that name no host."""
    monkeypatch.setattr(sys, "platform", "linux")
    command, _, more = install_hint("quantize").partition("; ")
    assert command == install_command("quantize")
    assert "--extra-index-url" in more
    assert not re.search(r"https?:|\.org|\.com", more)
    assert install_hint("cuda") == install_command("cuda"), "which is there for CUDA"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert install_hint("quantize") == install_command("quantize"), "whose usual build has none"


@pytest.mark.parametrize("found", [None, "/elsewhere/pip"])
def test_the_pip_is_this_pythons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: str | None) -> None:
    monkeypatch.setattr(extras.shutil, "which", lambda _: found)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "a venv" / "bin" / "python"))
    assert install_command("otel").startswith(f"'{tmp_path}/a venv/bin/python' -m pip install ")
    monkeypatch.chdir(tmp_path)
    assert install_command("otel").startswith("'a venv/bin/python' -m pip install ")
    (tmp_path / "a venv" / "bin").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a venv" / "bin")
    assert install_command("otel").startswith("./python -m pip install ")


def test_what_is_missing_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "quantize", ("json",))  # type: ignore[misc]
    assert missing("quantize") is None
    require("quantize", "llmctl quantize")
    monkeypatch.setitem(MODULES, "quantize", ("json", "torch"))  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackageError, match="llmctl quantize needs PyTorch, which is not installed") as caught:
        require("quantize", "llmctl quantize")
    assert caught.value.fix == install_hint("quantize")
    monkeypatch.setitem(MODULES, "quantize", ("nowhere_at_all.inside",))  # type: ignore[misc]
    assert missing("quantize") == "nowhere_at_all.inside"


def test_a_package_that_cannot_be_imported_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_at_import").mkdir()
    (tmp_path / "broken_at_import" / "__init__.py").write_text("raise ImportError('a library is of another version')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MODULES, "otel", ("broken_at_import.inside",))  # type: ignore[misc]
    assert missing("otel") == "broken_at_import.inside"


def test_an_import_that_fails_is_told_by_its_extra() -> None:
    for name, extra in {"torch.nn": "quantize", "cupy": "cuda", "opentelemetry.sdk": "otel"}.items():
        said = missing_package(ModuleNotFoundError(f"No module named {name!r}", name=name))
        assert said is not None
        assert said.fix == install_hint(extra)
    assert missing_package(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    assert missing_package(ImportError("cannot import name 'x' from 'torch'", name="torch")) is None


def test_every_hint_is_made_by_one_function() -> None:
    """And none names what is somebody else's on the package index."""
    folders = [REPOSITORY / name for name in ("llmctl", "scripts", "configs", "docs", "tests")]
    files = [p for folder in folders for p in folder.rglob("*") if p.suffix in WRITTEN or p.name == "Dockerfile"]
    files += [REPOSITORY / "pyproject.toml", REPOSITORY / "Makefile", *REPOSITORY.glob("*.md")]
    assert len(files) > 400
    found = {
        f"{file.relative_to(REPOSITORY)}: {hint[0]}"
        for file in files
        if file != Path(__file__)
        for hint in OWN_HINTS.finditer(file.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("text", "is_hint"),
    [
        ("pip install 'llmctl[cuda]'", True),
        ("needs llmctl[cuda]", True),
        ("pip install llmctl", True),
        ("pip install -U torch", True),
        ("pip install {name}", True),
        ("pip install 'llmctl-engine[cuda]'", False),
        ("pip install -e '.[cuda]'", False),
        ("/opt/llmctl/bin/pip install .", False),
    ],
)
def test_hints_are_seen(text: str, is_hint: bool) -> None:
    assert bool(OWN_HINTS.search(text)) == is_hint
