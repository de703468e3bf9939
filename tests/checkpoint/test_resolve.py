"""From a name to a path, and every way that can fail, in one line each."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_samples import write_folder

from llmctl.checkpoint.resolve import cache_dir, local_name, resolve_model
from llmctl.errors import CheckpointError, ExitCode, LlmctlError, ModelNotFoundError


def refusal(name: str, **options: bool) -> LlmctlError:
    with pytest.raises(LlmctlError) as caught:
        resolve_model(name, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_local_folder_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "org" / "name", {}, {"x": torch.ones(1)})
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve_model(str(folder)) == folder
    assert resolve_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")  # what exists wins over a hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/m.gguf") == tmp_path / "m.gguf"


@pytest.mark.parametrize("name", ["./none", "/none/here", "~/none", "none.gguf", "../up"])
def test_path_like_names_never_reach_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    error = refusal(name)
    assert isinstance(error, ModelNotFoundError)
    assert name in error.message
    assert error.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("name", ["", "  ", "two words", "a/b/c", "demo:none"])
def test_names_that_are_nothing(name: str) -> None:
    assert isinstance(refusal(name), ModelNotFoundError)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    assert "no config.json" in refusal(str(tmp_path)).message
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "no safetensors files" in refusal(str(tmp_path)).message
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    error = refusal(str(tmp_path))
    assert isinstance(error, CheckpointError)
    assert "only pickle weights (pytorch_model.bin)" in error.message
    assert "safe_serialization" in error.fix
    (tmp_path / "engine.json").write_text("{}")
    assert "is an engine folder" in refusal(str(tmp_path)).message
    assert "not .gguf" in refusal(str(tmp_path / "engine.json")).message


def cache_root(folder: Path, *revisions: str, main: str | None = None) -> Path:
    root = folder / "models--org--some-name"
    for revision in revisions:
        write_folder(root / "snapshots" / revision, {}, {"x": torch.ones(1)})
    if main is not None:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main + "\n")
    return root


@pytest.mark.parametrize(("revisions", "main"), [(("aa", "bb"), "bb"), (("bb",), None), (("bb",), "bb")])
def test_a_hub_caches_root_is_its_snapshot(tmp_path: Path, revisions: tuple[str, ...], main: str | None) -> None:
    root = cache_root(tmp_path, *revisions, main=main)
    found = resolve_model(str(root))
    assert found == root / "snapshots" / "bb"
    assert local_name(found) == "org/some-name"
    assert local_name(tmp_path) == tmp_path.name


@pytest.mark.parametrize(
    ("revisions", "main", "said"),
    [
        (("aa", "bb"), None, "no refs/main; snapshots: aa, bb"),
        (("aa",), "cc", "no snapshot 'cc', which refs/main names; snapshots: aa"),
        (("aa",), "../..", r"no snapshot '../..'"),
    ],
)
def test_a_hub_cache_without_the_snapshot(
    tmp_path: Path, revisions: tuple[str, ...], main: str | None, said: str
) -> None:
    error = refusal(str(cache_root(tmp_path, *revisions, main=main)))
    assert isinstance(error, ModelNotFoundError)
    assert said in error.message


def test_hub_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict = {}

    def snapshot(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "pickle weights" in refusal("org/name").message
    write_folder(tmp_path, {}, {"x": torch.ones(1)})
    assert resolve_model("org/name", allow_download=False) == tmp_path
    assert asked["name"] == "org/name"
    assert asked["local_files_only"] is True
    assert {"*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"} == set(asked["allow_patterns"])


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def broken(*_: object, **__: object) -> str:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    assert "RuntimeError: first line second line" in refusal("org/name").message


@pytest.mark.parametrize("offline", ["1", "0"])
def test_the_real_hub_client_without_a_hub(offline: str, tmp_path: Path) -> None:
    code = (
        "from llmctl.checkpoint.resolve import resolve_model\n"
        "from llmctl.errors import ModelNotFoundError\n"
        "try: resolve_model('some-org/some-model')\n"
        "except ModelNotFoundError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    (line,) = done.stdout.splitlines()
    assert "no local file or folder 'some-org/some-model'" in line
    assert "not in the hub cache" in line


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LLMCTL_CACHE")
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/somewhere/.cache/llmctl")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_dir() == Path("/caches/llmctl")
    for ignored in ("", "caches"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_dir() == Path("/somewhere/.cache/llmctl")
