"""Trying clients: what a client's process says and how it ends, the table, the proxy that records."""

from __future__ import annotations

import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import try_clients
from client_trials.catalog import CLIENTS, SCENARIOS, Client
from client_trials.environments import Environment, folder_name
from client_trials.outcomes import Outcome, Trial
from client_trials.playing import Endpoint, play, untried
from client_trials.recording import Recorder
from client_trials.report import to_markdown, to_text

HERE = Environment((sys.executable,), "1.0")
SCRIPTS = Path(try_clients.__file__).parent / "clients"


def tried(tmp_path: Path, source: str, seconds: float = 60, key: str | None = "k") -> Trial:
    """A client whose scenarios are this Python."""
    script = tmp_path / "with_it.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(SCRIPTS)!r})\n{source}")
    endpoint = Endpoint("http://127.0.0.1:9/{scenario}", key, "m", tmp_path)
    return play(Client("it", str(script), ("it==1.0",)), HERE, endpoint, seconds, tmp_path)


def test_scenarios_are_ok_or_say_why_not_and_the_others_are_none(tmp_path: Path) -> None:
    source = """
from scenarios import expect, play
def chat(at):
    print("noise of a client")
    expect(at.url == "http://127.0.0.1:9/chat/v1" and at.key == "k" and at.model == "m", f"another than {at}")
def stream(at):
    raise ValueError(f"{at.root}\\nfails")
play(chat, stream)
"""
    found = tried(tmp_path, source)
    assert (found.client, found.version) == ("it", "1.0")
    assert list(found.outcomes) == list(SCENARIOS)
    assert found.outcomes["chat"] == Outcome("ok")
    assert found.outcomes["stream"] == Outcome("failed", "ValueError: http://127.0.0.1/stream fails")
    assert {found.outcomes[name].verdict for name in set(SCENARIOS) - {"chat", "stream"}} == {"none"}


def test_what_a_process_leaves_out_has_failed_with_its_last_words(tmp_path: Path) -> None:
    announced = 'print(\'{"scenarios": ["chat"]}\')\n'
    cut = tried(tmp_path, announced + "sys.exit('out of words')")
    assert cut.outcomes["chat"] == Outcome("failed", "exit code 1: out of words")
    assert cut.outcomes["stream"] == Outcome("none")
    assert tried(tmp_path, announced).outcomes["chat"] == Outcome("failed", "it ended before this one")
    silent = tried(tmp_path, "import nothing_of_this_name")
    assert {o.verdict for o in silent.outcomes.values()} == {"failed"}
    assert "nothing_of_this_name" in silent.outcomes["chat"].reason


def test_a_client_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    source = f"""
import json, subprocess, time
print(json.dumps({{"scenarios": ["chat"]}}), flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    found = tried(tmp_path, source, seconds=2)
    assert found.outcomes["chat"] == Outcome("failed", "not done within 2 s")
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_clients_see_nothing_of_this_user_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the user's own")
    source = """
import os
from pathlib import Path
from scenarios import expect, play
def chat(at):
    expect("OPENAI_API_KEY" not in os.environ, "no key of the user")
    Path.home().joinpath("settings").write_text(os.environ["TMPDIR"])
    expect(Path(os.environ["TMPDIR"]).parent == Path.home(), "temporary files of its own")
play(chat)
"""
    assert tried(tmp_path, source).outcomes["chat"] == Outcome("ok")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "what it wrote is gone with it"


def test_without_a_key_none_can_be_wrong(tmp_path: Path) -> None:
    source = "from scenarios import play\ndef wrong_key(at): pass\nplay(wrong_key)"
    assert tried(tmp_path, source, key=None).outcomes["wrong_key"].verdict == "not tried"
    assert tried(tmp_path, source).outcomes["wrong_key"].verdict == "ok"


def some_trials() -> list[Trial]:
    """All clients: one that fails twice for one reason, one that was not tried, the others well."""
    made = []
    for client in CLIENTS:
        outcomes = {name: Outcome("ok") for name in SCENARIOS}
        if client.name == "litellm":
            outcomes |= dict.fromkeys(("chat", "tools"), Outcome("failed", "Error: 500 | so " + "long " * 60))
        version = client.packages[0].replace("==", "@").rpartition("@")[2]
        made.append(untried(client, "no npm on PATH") if client.is_npm else Trial(client.name, version, outcomes))
    return made


def test_the_table_is_whole_at_80_columns() -> None:
    text = to_text(some_trials())
    assert max(len(line) for line in text.splitlines()) <= 80
    (row,) = [line for line in text.splitlines() if line.startswith("litellm 1")]
    assert row.split()[2:] == ["ERR", "ok", "ok", "ok", "ok", "ERR", *["ok"] * 8]
    assert "litellm: chat, tools: Error: 500" in text
    assert "openai (npm): all: no npm on PATH" in text


def test_markdown_names_each_reason_once() -> None:
    text = to_markdown(some_trials(), "on a day")
    assert text.startswith("on a day\n\n| client | chat |")
    assert text.count("* litellm: chat, tools: Error: 500 \\| so long") == 1
    assert text.count("**fails**") == 2


def test_documents_hold_every_client_and_scenario_in_the_versions_of_the_table() -> None:
    document = try_clients.DOCS.read_text(encoding="utf-8")
    begin, end = try_clients.MARKERS
    rows = [line for line in document.partition(begin)[2].partition(end)[0].splitlines() if line.startswith("| ")]
    assert rows[0] == f"| client | {' | '.join(SCENARIOS.values())} |"
    titles = [row.split(" | ")[0].removeprefix("| ") for row in rows[1:]]
    assert [title.rpartition(" ")[0] for title in titles] == [client.name for client in CLIENTS]
    for title, client in zip(titles, CLIENTS, strict=True):
        assert client.packages[0].endswith(title.rpartition(" ")[2])


def test_every_client_has_its_scenarios_and_a_name_for_the_command_line() -> None:
    assert all(client.path.is_file() for client in CLIENTS)
    assert len({folder_name(client) for client in CLIENTS}) == len(CLIENTS)


class Echo(BaseHTTPRequestHandler):
    """Answers in two pieces: the path and the key, then the body."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(418)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body) + len(self.path)))
        self.end_headers()
        self.wfile.write(self.path.encode())
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_proxy_forwards_all_and_writes_down_all_but_keys(echo: str, tmp_path: Path) -> None:
    recorder = Recorder(echo)
    with recorder.listening() as address:
        for _ in range(2):  # repeats are written once
            request = urllib.request.Request(
                f"{address}/it/chat/v1/x?a=1",
                data=b'{"a": [1]}',
                headers={"Authorization": "Bearer secret", "X-Api-Key": "secret", "User-Agent": "it/1"},
            )
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=10)
            assert caught.value.code == 418
            assert caught.value.read() == b'/v1/x?a=1{"a": [1]}'
            caught.value.close()
    recorder.write(tmp_path / "made")
    text = (tmp_path / "made" / "it.json").read_text()
    (note,) = json.loads(text)
    assert "secret" not in text
    assert {k: v for k, v in note.items() if k != "headers"} == {
        "scenario": "chat", "method": "POST", "path": "/v1/x?a=1", "status": 418, "body": {"a": [1]},
    }  # fmt: skip
    assert note["headers"]["user-agent"] == "it/1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--only", "nobody"], "unknown 'nobody'"), (["--docs", "--only", "llm"], "not with --only"),
     (["--url", "http://127.0.0.1:9", "--max-num-seqs", "4"], "unknown option --max-num-seqs")],
)  # fmt: skip
def test_usage_errors_are_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["try_clients.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        try_clients.main()
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
