"""``llmctl list`` and ``rm``, and cached engines by their names."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llmctl.checkpoint.demo import DEMO_MODELS
from llmctl.cli.cached import age
from llmctl.cli.main import app

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
    assert long.name in shown
    assert max(map(len, shown.splitlines())) <= 80


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
    with (cache / "engines" / "tiny-0123456789abcdef.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is being built now" in run("rm", "tiny-0123456789abcdef", "--yes", code=1).stderr
    assert "tiny-0123456789abcdef" in listed()


@pytest.mark.usefixtures("cache")
def test_a_cached_engine_is_shown_by_its_name() -> None:
    document = json.loads(run("show", "tiny-0123456789abcdef", "--json").stdout)
    assert (document["kind"], document["source"]) == ("engine", "tiny-llama")


def test_ages() -> None:
    assert [age(s) for s in (-1, 5, 90, 7200, 200_000)] == ["0 s", "5 s", "2 min", "2 h", "2 d"]
