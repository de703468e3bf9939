"""What is handed out: sdist and wheel hold every file of the package, and the wheel alone runs outside the tree."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from fixtures import ServerProcess

from llmctl import __version__
from llmctl.artifact.builder import build_engine
from llmctl.config import BuildConfig
from llmctl.extras import DISTRIBUTION
from llmctl.targets.cpu.toolchain import find_compiler

REPOSITORY = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")


@functools.cache
def tracked() -> tuple[str, ...]:
    """Files of the repository as git knows them, or is about to."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return tuple(path for path in listed.splitlines() if (REPOSITORY / path).is_file())


def of_package() -> set[str]:
    """Those of the package; what is hidden is for tools."""
    return {path for path in tracked() if path.startswith("llmctl/") and "/." not in path}


def test_every_file_of_the_package_is_declared() -> None:
    """What is not Python is matched by pyproject's globs, and no glob is left over."""
    globs = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    matched: set[str] = set()
    for package, patterns in globs.items():
        folder = REPOSITORY / package.replace(".", "/")
        for pattern in patterns:
            files = {path.relative_to(REPOSITORY).as_posix() for path in folder.glob(pattern) if path.is_file()}
            assert files, f"{package}: {pattern} matches nothing"
            matched |= files
    assert matched == {path for path in of_package() if not path.endswith(".py")}


def test_every_folder_of_the_package_is_a_package() -> None:
    """Else setuptools leaves its modules out."""
    folders = {path.rpartition("/")[0] for path in of_package() if path.endswith(".py")}
    assert {folder for folder in folders if f"{folder}/__init__.py" not in of_package()} == set()


@dataclass(frozen=True)
class Built:
    """The two files, built from a copy of what git knows."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / path, source / path)
    quietly([sys.executable, "-m", "build", "--outdir", str(output), str(source)], source)
    name = f"{DISTRIBUTION.replace('-', '_')}-{__version__}"
    return Built(output / f"{name}.tar.gz", output / f"{name}-py3-none-any.whl")


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engine") / "cpu"
    return build_engine(BuildConfig(model=str(tiny_llama), target="cpu", output=str(output)))


def quietly(command: Sequence[str], cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command outside the tree: nothing of this Python's paths reaches it."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["LLMCTL_CACHE"] = str(cwd / "cache")
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def interpreter(version: str) -> str:
    """An interpreter of a version: this process's own, one of PYTHONS, on the path, or pyenv's. Skips without one."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return str(getattr(sys, "_base_executable", sys.executable))
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [*os.environ.get("PYTHONS", "").split(), f"python{version}"]
    for python in [*candidates, *map(str, pyenv.glob(f"versions/{version}.*/bin/python"))]:
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        except OSError:
            continue
        if done.stdout.strip() == version:
            return python
    pytest.skip(f"no Python {version} here")


@pytest.mark.slow
def test_both_hold_the_whole_package(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
    info = f"{DISTRIBUTION.replace('-', '_')}-{__version__}.dist-info"
    assert {name for name in names if not name.startswith(f"{info}/")} == of_package()
    assert f"{info}/licenses/LICENSE" in names
    with tarfile.open(built.sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert of_package() | {"LICENSE", "README.md", "pyproject.toml"} <= packed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_runs_outside_the_tree(built: Built, engine: Path, tmp_path: Path, version: str) -> None:
    """Base install: no torch; an engine is shown and served, and what makes one says what to install."""
    programs = tmp_path / "venv" / "bin"
    quietly([interpreter(version), "-m", "venv", "--without-pip", "venv"], tmp_path)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(programs / "python")]
    # Not compiled: that takes longer than all the rest, and what is run is compiled then.
    flags = shlex.split(os.environ.get("PIP_FLAGS", ""))  # make's
    install = ["install", "--quiet", "--no-compile", *flags, "-c", str(REPOSITORY / "constraints.txt")]
    quietly([*pip, *install, str(built.wheel)], tmp_path)
    llmctl = str(programs / "llmctl")
    assert quietly([llmctl, "--version"], tmp_path).stdout == f"llmctl {__version__}\n"
    assert "runs here" in quietly([llmctl, "inspect", str(engine), "--verify"], tmp_path).stdout
    hint = quietly([llmctl, "build", "--model", "m", "--output", "e"], tmp_path, code=1).stderr
    assert f"(fix: venv/bin/python -m pip install '{DISTRIBUTION}[quantize]'; without a GPU" in hint
    assert hint.count("\n") == 1
    with ServerProcess(str(engine), llmctl=[llmctl], env={"PYTHONPATH": ""}) as server:
        server.wait_ready()
        body = {"model": "tiny-llama", "prompt": "x é", "max_tokens": 8}
        status, answer = server.post("/v1/completions", body)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 8)
        status, page = server.get("/")
        assert (status, "<html" in page) == (200, True)
    installed = sum(path.stat().st_size for path in (tmp_path / "venv").rglob("*") if path.is_file())
    assert installed < 300e6, f"the base install takes {installed / 1e6:.0f} MB"
