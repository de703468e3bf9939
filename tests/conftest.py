"""What all tests share: a cache of their own, the tiny model, its engine, one real server."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import threading

# Tests run in several processes: torch's threads would only wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Hundreds of processes are started, each of which would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell ignores SIGINT for what it runs in the background, and children inherit that: tests of Ctrl-C would wait.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures import ServerProcess, make_tiny_llama, share_compiled_kernels

from llmctl.checkpoint.user_folders import cache_dir


def pytest_configure(config: pytest.Config) -> None:
    """A cache for this run, with the compiled kernels and demo models of the user's, in which no engine is left behind.

    What pytest-xdist starts inherits it.
    """
    if hasattr(config, "workerinput"):
        return
    models = cache_dir() / "demo"
    models.mkdir(parents=True, exist_ok=True)
    cache = share_compiled_kernels(Path(tempfile.mkdtemp(prefix="llmctl-tests-")))
    (cache / "demo").symlink_to(models)
    os.environ["LLMCTL_CACHE"] = str(cache)
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """Thousands of tests are millions of objects that stay. The garbage collector need not look at them, neither while
    they are made (it took five sixths of that time) nor afterwards."""
    gc.disable()


def pytest_collection_finish() -> None:
    """See ``pytest_collection``."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """One thread again: a runtime sets torch's for the whole process, and tests after it would take up to 50 times as
    long while another process has the processors."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder, see ``fixtures.make_tiny_llama``."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an engine for the reference target."""
    from llmctl.artifact.builder import build_engine
    from llmctl.config import BuildConfig

    output = tmp_path_factory.mktemp("engines") / "tiny"
    return build_engine(BuildConfig(model=str(tiny_llama), target="reference", output=str(output)))


@pytest.fixture(scope="session")
def server(tiny_engine: Path) -> Iterator[ServerProcess]:
    """``llmctl serve`` on the tiny engine, ready; shared, so leave it idle."""
    with ServerProcess("--model", str(tiny_engine), "--max-num-seqs", "128") as process:
        process.wait_ready()
        yield process
