"""``llmctl list`` and ``rm``, and cached engines by their names."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from llmctl.artifact import cache as module
from llmctl.artifact.build_lock import build_lock, is_locked
from llmctl.artifact.cache import LEFTOVER, CacheEntry, remove_entry
from llmctl.checkpoint.demo import DEMO_MODELS
from llmctl.cli.cached import age
from llmctl.cli.main import app
from llmctl.errors import LlmctlError

GONE = 2**30
"""A number above any process's."""
DEMO = DEMO_MODELS["demo:smollm2-135m"].file


@pytest.fixture
def cache(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with an engine, a damaged one, a half-written one, a demo model's file and a kernel."""
    root = tmp_path / "cache"
    monkeypatch.setenv("LLMCTL_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    engines = root / "engines"
    shutil.copytree(tiny_engine, engines / "tiny-0123456789abcdef")
    (engines / "bad-0123456789abcdef").mkdir()
    (engines / "bad-0123456789abcdef" / "engine.json").write_text("{")
    (engines / ".tiny-x.tmp-1").mkdir()
    (engines / "tiny-x.lock").touch()  # that nobody holds, while a process of that number lives
    (engines / ".tiny-x.tmp-1" / "part").write_bytes(b"12345")
    (root / "demo").mkdir()
    (root / "demo" / DEMO).write_bytes(b"GGUF")
    (root / "kernels").mkdir()
    (root / "kernels" / "abc").write_bytes(b"123")
    return root


def run(*args: str, code: int = 0, typed: str | None = None) -> Result:
    made = CliRunner().invoke(app, args, input=typed, env={"COLUMNS": "80"})
    assert made.exit_code == code, made.output
    return made


def listed() -> dict[str, dict[str, object]]:
    document = json.loads(run("list", "--json").stdout)
    return {entry["name"]: entry for entry in document["entries"]}


def test_the_list_names_everything(cache: Path) -> None:
    found = listed()
    assert set(found) == {
        "tiny-0123456789abcdef",
        "bad-0123456789abcdef",
        ".tiny-x.tmp-1",
        "demo:smollm2-135m",
        "kernels",
    }
    engine = found["tiny-0123456789abcdef"]
    assert (engine["kind"], engine["model"], engine["target"]) == ("engine", "tiny-llama", "reference")
    files = (cache / "engines" / "tiny-0123456789abcdef").rglob("*")
    assert engine["bytes"] == sum(file.stat().st_size for file in files if file.is_file())
    assert (found["demo:smollm2-135m"]["kind"], found["demo:smollm2-135m"]["bytes"]) == ("demo model", 4)
    assert found["kernels"]["bytes"] == 3
    assert found["bad-0123456789abcdef"]["problem"]
    shown = run("list").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert all(name in shown for name in ("tiny-0123456789abcdef", "demo:smollm2-135m", "reference"))
    assert "…" not in shown
    long = cache / "engines" / "a-model-of-a-very-long-name-0123456789abcdef"
    (cache / "engines" / "tiny-0123456789abcdef").rename(long)
    shown = run("list").stdout
    assert re.search(rf"^ ?{long.name} +reference ", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) <= 80


def test_a_target_is_divided_between_its_parts_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a name that leaves it no room is folded."""
    shutil.rmtree(cache / "engines" / "bad-0123456789abcdef")
    (cache / "engines" / "tiny-0123456789abcdef").rename(cache / "engines" / f"{'a' * 44}-0123456789abcdef")
    parts = ["cpu:x86_64-avx512bf16", "x86_64-avx512vnni"]
    made = SimpleNamespace(source=SimpleNamespace(name="m"), target=",".join(parts))
    monkeypatch.setattr(module, "read_manifest", lambda _: made)
    shown = run("list").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert parts[0] + "," in shown
    assert re.search(rf"(?<![\w-]){parts[1]}(?![\w-])", shown)
    assert "a" * 20 in shown  # how many a line has depends on the other columns: "1 minute ago" is wider than "now"


@pytest.mark.usefixtures("cache")
def test_removing_asks_and_takes_patterns() -> None:
    assert "nobody to ask" in run("rm", "kernels", code=2).stderr
    assert "nothing in the cache is called 'kernel'" in run("rm", "kernel", "--yes", code=2).stderr
    assert set(listed()) >= {"kernels"}
    run("rm", "kernels", "*tiny-*", "--yes")
    assert set(listed()) == {"bad-0123456789abcdef", "demo:smollm2-135m"}
    run("rm", "demo:smollm2-135m", "bad-0123456789abcdef", "-y")
    assert listed() == {}
    assert "nothing is cached" in run("list").stdout


@pytest.mark.usefixtures("cache")
def test_one_unknown_name_removes_nothing() -> None:
    run("rm", "kernels", "nothing-like-it", "--yes", code=2)
    assert "kernels" in listed()


def test_an_engine_that_is_being_built_stays(cache: Path) -> None:
    with build_lock(cache / "engines" / "tiny-0123456789abcdef"):
        assert "is being built now" in run("rm", "tiny-0123456789abcdef", "--yes", code=1).stderr
    assert "tiny-0123456789abcdef" in listed()


def test_what_is_written_now_is_nobodys_to_remove(cache: Path) -> None:
    written = [cache / "engines" / f".new-y.tmp-{GONE}", cache / "demo" / f".fetch-ab.tmp-{os.getpid()}"]
    written.append(cache / f".kernels.tmp-{os.getppid()}")
    for path in written:
        path.mkdir()
    with build_lock(cache / "engines" / "new-y"):
        run("rm", "*", "--yes")
        assert all(path.is_dir() for path in written)
        assert listed() == {}
        half = CacheEntry(written[0].name, LEFTOVER, "", "", 0, 0.0, written[0])
        with pytest.raises(LlmctlError, match="is being built now"):
            remove_entry(half)
    assert set(listed()) == {written[0].name}
    run("rm", ".new-y*", "--yes")
    assert [path.name for path in (cache / "engines").iterdir()] == []


def test_what_was_left_behind_is_listed_wherever_it_lies(cache: Path) -> None:
    left = {f".kernels.tmp-{GONE}": cache, f".fetch-ab.tmp-{GONE}": cache / "demo", ".fetch-cd": cache / "demo"}
    for name, folder in left.items():
        (folder / name).mkdir()
    (cache / ".ssh").mkdir()
    assert set(listed()) >= set(left)
    run("rm", "*", "--yes")
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == [".ssh"]
    assert list((cache / "demo").iterdir()) == []


def test_what_vanishes_while_it_is_counted_is_not_listed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = os.walk

    def renamed_away(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for root, folders, files in walk(path):
            (Path(root) / "part").unlink(missing_ok=True)
            yield root, folders, files

    monkeypatch.setattr(module.os, "walk", renamed_away)
    assert listed()[".tiny-x.tmp-1"]["bytes"] == 0
    children = module._children
    monkeypatch.setattr(module, "_children", lambda folder: [*children(folder), folder / DEMO, folder / "gone"])
    shutil.rmtree(cache / "demo")
    assert "demo:smollm2-135m" not in listed()


def test_who_waits_for_the_lock_of_a_removed_engine_has_it_anew(cache: Path) -> None:
    engine = cache / "engines" / "tiny-0123456789abcdef"
    entered = threading.Event()

    def build() -> None:
        with build_lock(engine) as lock:
            assert lock.exists()
            entered.set()
            assert is_locked(engine)

    with build_lock(engine) as lock:
        waiting = threading.Thread(target=build)
        waiting.start()
        assert not entered.wait(0.1)
        lock.unlink()
    assert entered.wait(10)
    waiting.join()


@pytest.mark.usefixtures("cache")
def test_a_cached_engine_is_shown_by_its_name() -> None:
    document = json.loads(run("show", "tiny-0123456789abcdef", "--json").stdout)
    assert (document["kind"], document["source"]) == ("engine", "tiny-llama")


def test_ages() -> None:
    assert [age(s) for s in (-1, 5, 90, 7200, 200_000)] == ["0 s", "5 s", "2 min", "2 h", "2 d"]
