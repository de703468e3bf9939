"""Folders published atomically: what a killed process left behind, and outputs that cannot be."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.checkpoint import folder
from llmctl.checkpoint.folder import check_parent, published_folder
from llmctl.errors import UsageError


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def publish(final: Path, text: str) -> None:
    with published_folder(final) as made:
        (made / "file").write_text(text)


@pytest.mark.parametrize("name", ["engine", "engine[1]", "a*b", "q?"])
@pytest.mark.parametrize("exchange", [True, False])
def test_leftovers_of_the_dead_are_removed(
    tmp_path: Path, dead_pid: int, name: str, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda *_: False)
    final = tmp_path / name
    publish(final, "first")
    for kind in ("tmp", "old"):
        (tmp_path / f".{name}.{kind}-{dead_pid}").mkdir()
    bystanders = [tmp_path / f".{name}.tmp-1", tmp_path / ".engine1.tmp-x", tmp_path / f".axb.old-{dead_pid}"]
    for path in bystanders:
        path.mkdir()
    publish(final, "second")
    assert (final / "file").read_text() == "second"
    assert sorted(tmp_path.iterdir()) == sorted([final, *bystanders])


def test_what_was_moved_aside_is_put_back(tmp_path: Path, dead_pid: int) -> None:
    """Killed between the two renames, and the next attempt fails as well: the old folder is there again."""
    final = tmp_path / "engine"
    publish(final, "good")
    final.rename(tmp_path / f".engine.old-{dead_pid}")
    with pytest.raises(RuntimeError), published_folder(final):
        raise RuntimeError
    assert (final / "file").read_text() == "good"
    assert list(tmp_path.iterdir()) == [final]


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "engine"
    publish(final, "good")
    monkeypatch.setattr(folder, "_exchange", lambda *_: False)
    rename = folder.os.rename

    def fail(source: Path, target: Path) -> None:
        if ".tmp-" in Path(source).name:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(folder.os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        publish(final, "new")
    assert (final / "file").read_text() == "good"
    assert list(tmp_path.iterdir()) == [final]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    final = tmp_path / "engine"
    with pytest.raises(OSError, match="No space left on device") as caught, published_folder(final):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(final)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="Broken pipe") as caught, published_folder(final):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    assert caught.value.filename is None


def test_outputs_below_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    for output in (Path("file/e"), Path("file/a/b"), tmp_path / "file" / "e", Path("nowhere/e")):
        with pytest.raises(UsageError, match="is not a folder"):
            check_parent(output)
    for output in (Path("e"), Path("a/b/c"), tmp_path / "x", Path("file")):
        check_parent(output)
