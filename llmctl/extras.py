"""Optional packages: which extra brings what, whether it is here, and the command that installs it.

The distribution is not called what the command and the package are: on the package index ``llmctl`` is a stranger's.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from llmctl.errors import MissingPackageError

DISTRIBUTION = "llmctl-engine"

MODULES: Mapping[str, tuple[str, ...]] = {
    "quantize": ("torch",),
    "cuda": ("torch", "cupy"),
    "otel": ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"),
    "autoawq": ("awq",),
    "auto-gptq": ("auto_gptq",),
    "gptqmodel": ("gptqmodel",),
}
"""Extra -> the modules that llmctl imports of it."""

_SPOKEN = {"torch": "PyTorch"}
_CPU_ALONE = (
    "without a GPU, and gigabytes smaller: with --extra-index-url and the URL that PyTorch's installation page gives "
    'for "CPU"'
)
_PACKAGE = Path(__file__).parent


def install_command(extra: str, *options: str) -> str:
    """The command that adds an extra to this llmctl, to be typed in the current folder.

    From a clone it installs the clone; else pip finds the distribution installed and adds what the extra needs. The pip
    is this Python's.

    Args:
        options: more of pip's.
    """
    clone = _PACKAGE.parent
    what = [f"{DISTRIBUTION}[{extra}]"]
    if (clone / "pyproject.toml").is_file():
        what = ["-e", f"{_from_here(clone)}[{extra}]"]
    return pip_install(*options, *what)


def install_hint(extra: str) -> str:
    """``install_command``, and for PyTorch alone how it comes without CUDA, which is in its usual build for Linux."""
    more = f"; {_CPU_ALONE}" if MODULES[extra] == ("torch",) and sys.platform == "linux" else ""
    return install_command(extra) + more


def pip_install(*words: str) -> str:
    """The command of this Python's pip, to be typed in the current folder."""
    return shlex.join([*_pip(), "install", *words])


def missing(extra: str) -> str | None:
    """The first module of an extra that is not installed; None when all are. Imports at most packages above them."""
    return next((name for name in MODULES[extra] if not _is_installed(name)), None)


def require(extra: str, what: str) -> None:
    """Refuse what an extra is needed for where that is not installed.

    Args:
        what: needs it; the message begins with it.

    Raises:
        MissingPackageError.
    """
    name = missing(extra)
    if name is not None:
        raise _error(what, name, extra)


def missing_package(error: BaseException) -> MissingPackageError | None:
    """An import that failed for want of an extra, as an error that says so; None for any other exception."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    root = error.name.partition(".")[0]
    for extra, modules in MODULES.items():
        if any(module.partition(".")[0] == root for module in modules):
            return _error("this", root, extra)
    return None


def _error(what: str, module: str, extra: str) -> MissingPackageError:
    name = _SPOKEN.get(module, module)
    return MissingPackageError(f"{what} needs {name}, which is not installed", fix=install_hint(extra))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of a package above it, which is not there or cannot be imported
        return False


def _pip() -> list[str]:
    """``pip`` alone only where a shell finds this Python's."""
    found, here = shutil.which("pip"), Path(sys.executable)
    if found is not None and Path(found).parent == here.parent:
        return ["pip"]
    python = _from_here(here)
    return [python if "/" in python else f"./{python}", "-m", "pip"]


def _from_here(path: Path) -> str:
    """A path, relative where it lies in the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
