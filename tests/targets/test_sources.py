"""Which files a native source is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmctl.errors import CompileError
from llmctl.targets.sources import digest, included_files


def test_includes_are_followed_through_the_folders_in_order(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    near.mkdir()
    far.mkdir()
    (near / "a.cpp").write_text('#include <vector>\n  #  include "b.h"\n// #include "no.h"\n#include "host.h"\n')
    (near / "b.h").write_text("near")
    (far / "b.h").write_text("far")
    assert included_files(["a.cpp"], (near, far), absent=("host.h",))["b.h"] == "near"
    (near / "b.h").write_text('#include "c.h"\n#include "a.cpp"\n')
    (far / "c.h").write_text("far")
    assert list(included_files(["a.cpp"], (near, far), absent=("host.h",))) == ["a.cpp", "b.h", "c.h"]
    with pytest.raises(CompileError, match=r"near/host\.h: No such file"):
        included_files(["a.cpp"], (near, far))


def test_the_digest_is_of_names_and_texts() -> None:
    parts = {"a": "b", "c": "d"}
    assert digest(parts) == digest({"c": "d", "a": "b"})
    others = (
        {"a": "b"},
        {"a": "d", "c": "b"},
        {"a": "bc", "": "d"},
        {"ab": "", "c": "d"},
        {"a": "b", "c": "d", "": ""},
    )
    assert len({digest(parts), *map(digest, others)}) == 6
