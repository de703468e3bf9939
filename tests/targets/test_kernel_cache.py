"""The kernel cache gives back what was kept, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmctl.targets.kernel_cache import read_entry, write_entry

CODE = b"\x7fELF\n\x00code\n"


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    cache = tmp_path / "made" / "now"
    assert read_entry(cache, "key") is None
    write_entry(cache, "key", {"arch": "sm_90", "flags": ["-a\n"]}, CODE)
    write_entry(cache, "other", {}, b"")
    assert read_entry(cache, "key") == ({"arch": "sm_90", "flags": ["-a\n"]}, CODE)
    assert read_entry(cache, "other") == ({}, b"")
    write_entry(cache, "key", {}, b"again")
    assert read_entry(cache, "key") == ({}, b"again")
    assert sorted(path.name for path in cache.iterdir()) == ["key", "other"]


def test_no_cache_keeps_nothing() -> None:
    write_entry(None, "key", {}, CODE)
    assert read_entry(None, "key") is None


def test_damage_anywhere_is_an_absent_entry(tmp_path: Path) -> None:
    write_entry(tmp_path, "key", {"arch": "sm_90"}, CODE)
    entry = tmp_path / "key"
    whole = entry.read_bytes()
    for at in range(len(whole)):
        entry.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert read_entry(tmp_path, "key") is None, at
        entry.write_bytes(whole[:at])
        assert read_entry(tmp_path, "key") is None, at
    entry.write_bytes(whole)
    assert read_entry(tmp_path, "key") == ({"arch": "sm_90"}, CODE)


def test_an_entry_under_another_name_is_no_entry(tmp_path: Path) -> None:
    write_entry(tmp_path, "avx2", {}, CODE)
    (tmp_path / "avx512").write_bytes((tmp_path / "avx2").read_bytes())
    assert read_entry(tmp_path, "avx512") is None


@pytest.mark.parametrize("fields", ["null", "[]", '"x"', "1"])
def test_what_does_not_describe_code_is_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: str) -> None:
    monkeypatch.setattr("llmctl.targets.kernel_cache.json.dumps", lambda *_, **__: fields)
    write_entry(tmp_path, "key", {}, CODE)
    assert read_entry(tmp_path, "key") is None


@pytest.mark.parametrize("place", ["cache", "cache/folder"])
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "cache").write_text("a file")
    write_entry(tmp_path / place, "key", {}, CODE)
    assert read_entry(tmp_path / place, "key") is None


def test_an_entry_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    write_entry(tmp_path, "key", {}, CODE)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert read_entry(tmp_path, "key") is None
