"""A whole run of scripts/bench_peers.py: OpenVINO's server on a stand-in for its library, which deals out the tokens
5, 6, 7, …
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_peers  # noqa: E402
from peers import contest, measure  # noqa: E402

PIPELINE = """
    import enum, time

    class GenerationStatus(enum.Enum):
        RUNNING, FINISHED = 0, 1

    class SchedulerConfig:
        pass

    class GenerationConfig:
        pass

    class Output:
        def __init__(self, token):
            self.generated_ids = [token]

    class Handle:
        def __init__(self, config):
            self.left, self.ready, self.token = config.max_new_tokens, [], 4

        def can_read(self):
            return bool(self.ready)

        def read(self):
            return {0: Output(self.ready.pop())}

        def get_status(self):
            return GenerationStatus.RUNNING if self.left else GenerationStatus.FINISHED

    class ContinuousBatchingPipeline:
        def __init__(self, path, scheduler, device, properties):
            self.handles = []

        def add_request(self, number, ids, config):
            assert not config.do_sample
            self.handles.append(Handle(config))
            return self.handles[-1]

        def step(self):
            time.sleep(0.002)
            self.handles = [h for h in self.handles if h.left]
            for handle in self.handles:
                handle.left -= 1
                handle.token += 1
                handle.ready.append(handle.token)
"""


@pytest.fixture
def stand_in(tmp_path: Path, tiny_llama: Path) -> Callable[..., contest.Contestant]:
    """A contestant on OpenVINO's server; a broken one ends when it is started."""

    def make(name: str, broken: bool = False, installed: bool = True) -> contest.Contestant:
        library = tmp_path / f"lib-{name}"
        library.mkdir()
        code = textwrap.dedent(PIPELINE)
        (library / "openvino_genai.py").write_text("raise SystemExit(9)" if broken else code)
        (library / "openvino.py").write_text("def Tensor(values):\n    return values\n")
        server = str(SCRIPTS / "peers" / "ov_server.py")

        def launch(_: contest.Setup, model: Path, port: int) -> contest.Launch:
            argv = (sys.executable, server, "--model", str(model), "--port", str(port), "--threads", "1")
            return contest.Launch(argv, {"PYTHONPATH": str(library)})

        wanted = contest.Install("none", (), ("none",))
        return contest.Contestant(
            name, name.upper(), (lambda _: wanted) if installed else None, lambda _: tiny_llama, launch
        )

    return make


@pytest.fixture
def run(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[..., contest.Contestant]
) -> Callable[..., int]:
    """The script with small workloads, stand-ins in the places of llmctl and of the peers, nothing to install."""
    work = measure.Workload("c2", "small", 4, 2, "8-12", 6)
    monkeypatch.setattr(bench_peers, "WORKLOADS", {"c2": work})
    monkeypatch.setattr(bench_peers.own, "contestant", lambda **_: stand_in("llmctl", installed=False))
    monkeypatch.setattr(bench_peers, "PEERS", {"good": stand_in("good"), "bad": stand_in("bad", broken=True)})
    monkeypatch.setattr(bench_peers, "install", lambda *_: {"none": "1.0"})
    monkeypatch.setattr(measure, "_IDLE_SAMPLE", 0.05)

    def call(*args: str) -> int:
        common = ("--work", str(tmp_path / "work"), "--model", str(tiny_llama), "--workloads", "c2", "--idle-wait", "0")
        monkeypatch.setattr(sys, "argv", ["bench_peers.py", *common, *args])
        return bench_peers.main()

    return call


def test_a_run(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--peers", "good,bad", "--repeats", "2") == 1
    shown = capsys.readouterr()
    assert shown.err.count("ended with code 9 before it was ready") == 3  # two tries, and the reason at the end
    assert shown.err.count("once more with its plainest options") == 1
    assert "* not measured: BAD: the server ended with code 9" in shown.out
    assert str(tmp_path) not in shown.out
    document = json.loads((tmp_path / "work" / "report.json").read_text())
    order = [(v["contestant"], v["repeat"]) for v in document["visits"]]
    assert order == [("llmctl", 0), ("good", 0), ("llmctl", 1), ("good", 1)]
    for seen in document["visits"]:
        assert seen["peak_memory"] > 2**20
        assert seen["figures"]["c2"]["ttft"] > 0
    assert set(document["llmctl_over_peer"]["c2"]) == {"good"}
    assert document["versions"]["good"] == {"none": "1.0"}
    names = {process.name() for process in psutil.Process().children(recursive=True)}
    assert not any("ov_server" in name for name in names)


def test_a_server_that_ends_while_it_starts_is_started_plainly(
    run: Callable[..., int],
    stand_in: Callable[..., contest.Contestant],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sound = stand_in("odd")
    odd = replace(sound, launch=stand_in("odd-broken", broken=True).launch, plain=sound.launch)
    monkeypatch.setattr(bench_peers, "PEERS", {"odd": odd})
    assert run("--peers", "odd", "--repeats", "2") == 0
    assert capsys.readouterr().err.count("once more with its plainest options") == 1
    visited = [v["contestant"] for v in json.loads((tmp_path / "work" / "report.json").read_text())["visits"]]
    assert sorted(visited) == ["llmctl", "llmctl", "odd", "odd"]


def test_install_only_measures_nothing(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--peers", "good", "--install-only") == 0
    assert json.loads(capsys.readouterr().out)["versions"] == {"good": {"none": "1.0"}}


def test_what_cannot_be_prepared_or_started_is_reported(
    run: Callable[..., int],
    stand_in: Callable[..., contest.Contestant],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: contest.Setup) -> Path:
        raise FileNotFoundError(2, "No such file or directory", "optimum-cli")

    broken = replace(stand_in("broken", installed=False), prepare=fail)
    gone = replace(stand_in("gone"), launch=lambda *_: contest.Launch(("/nowhere/server",)))
    monkeypatch.setattr(bench_peers.own, "contestant", lambda **_: broken)
    monkeypatch.setattr(bench_peers, "PEERS", {"gone": gone})
    assert run("--peers", "") == 1
    assert "error: llmctl: [Errno 2] No such file or directory: 'optimum-cli'" in capsys.readouterr().err
    assert run("--peers", "gone", "--repeats", "1") == 1
    assert "error: gone: [Errno 2] No such file or directory: '/nowhere/server'" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "nowhere.gguf") == 1
    assert "error: no such file or folder: nowhere.gguf" in capsys.readouterr().err
