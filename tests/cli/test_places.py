"""Folders that take nothing: named, with what to do."""

from __future__ import annotations

import errno
import os

import pytest
import typer

from llmctl.cli.common import guarded


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_folder_that_takes_nothing_is_named_with_a_way_out(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def command() -> None:
        raise OSError(number, os.strerror(number), "/cache/kernels")

    with pytest.raises(typer.Exit) as caught:
        command()
    assert caught.value.exit_code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {os.strerror(number)}: /cache/kernels (fix: ")
    assert "LLMCTL_CACHE=DIR" in said
