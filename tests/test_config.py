"""Sizes and YAML options."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmctl.config import load_yaml_options, parse_bytes
from llmctl.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("512MiB", 512 << 20), ("4GB", 4 * 10**9), ("1.5g", 3 << 29), ("2 KiB", 2048), ("7b", 7)],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text, param="kv_cache_memory") == size


@pytest.mark.parametrize("text", ["", "abc", "12q", "-5MB", "0", "1e400", "MiB", "nan"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="--kv-cache-memory: expected a size"):
        parse_bytes(text, param="kv_cache_memory")


def test_yaml_keys_may_have_dashes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("group-size: 32\nbits: 4\n")
    assert load_yaml_options(path, ["group_size", "bits"]) == {"group_size": 32, "bits": 4}


def test_empty_yaml_is_no_options(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# nothing\n")
    assert load_yaml_options(path, ["bits"]) == {}
