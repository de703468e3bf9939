"""The cuda target where no GPU is needed: what is published, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmctl.errors import CompileError
from llmctl.targets.table import parse_target

TARGET = parse_target("cuda:sm_90")


@pytest.mark.parametrize(
    ("name", "content"), [("norm.cubin", b""), ("norm.cubin", b"\0" * 64), ("norm.ptx", b""), ("norm.ptx", b" \n ")]
)
def test_a_broken_module_is_not_published(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompileError, match=f"{name}: expected a compiled module, found b'"):
        TARGET.try_modules([tmp_path / name])


def test_whole_modules_are(tmp_path: Path) -> None:
    (tmp_path / "norm.cubin").write_bytes(b"\x7fELF" + bytes(60))
    (tmp_path / "norm.ptx").write_bytes(b".version 8.0")
    TARGET.try_modules([tmp_path / "norm.cubin", tmp_path / "norm.ptx"])
