"""``llmctl run``: one answer and the chat, against a scripted server; a real engine in the slow tests."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.scripted_chat_server import ScriptedServer, scripted_server
from typer.testing import CliRunner, Result

from llmctl.cli.chat.terminal import piped_text, say
from llmctl.cli.main import app
from llmctl.errors import LlmctlError


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as script:
        yield script


def run(server: ScriptedServer, *args: str, piped: str | None = None, code: int = 0) -> Result:
    made = CliRunner().invoke(app, ["run", "--base-url", server.url, *args], input=piped)
    assert made.exit_code == code, made.output
    return made


def test_the_answer_is_alone_on_stdout(server: ScriptedServer) -> None:
    made = run(server, "second", "why", "blue?", "--system", "Be brief.", "--temperature", "0.2", "--max-tokens", "9")
    assert made.stdout == "Blue light scatters.\n"
    assert re.fullmatch(r"3 tokens, ([\d.]+ tok/s, )?first after [\d.]+ s, prompt 7 tokens\n", made.stderr)
    (body,) = server.bodies
    assert body == {
        "model": "second",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why blue?"}],
        "temperature": 0.2,
        "max_tokens": 9,
    }


def test_a_single_word_that_is_no_model_of_the_server_is_the_question(server: ScriptedServer) -> None:
    run(server, "why is the sky blue?")
    run(server, "sum this up", piped="it is blue")
    asked = [(body["model"], body["messages"][0]["content"]) for body in server.bodies]
    assert asked == [("first", "why is the sky blue?"), ("first", "sum this up\n\nit is blue")]
    run(server, "second", piped="why?")
    assert (server.bodies[2]["model"], server.bodies[2]["messages"][0]["content"]) == ("second", "why?")
    for args in (("third", "why?"), ("--model", "third", "why?")):  # nothing says that this is no model
        assert "no model 'third'" in run(server, *args, code=2).stderr


def test_a_single_text_for_a_server_that_does_not_tell_its_models(server: ScriptedServer) -> None:
    server.untold = (401, json.dumps({"error": {"message": "wrong API key"}}))
    said = run(server, "why is the sky blue?", piped="", code=1).stderr
    assert said.startswith(f"error: {server.url}/v1/models: HTTP 401: wrong API key; so a single text may be a model")
    assert "--api-key KEY" in said
    assert not server.bodies
    run(server, "second", piped="why?")
    assert server.bodies[0]["model"] == "second"


def test_chat_is_another_name(server: ScriptedServer) -> None:
    made = CliRunner().invoke(app, ["chat", "--base-url", server.url, "--model", "first", "hello"])
    assert (made.exit_code, made.stdout) == (0, "Blue light scatters.\n")
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("words", "piped", "sent"),
    [
        (["first"], "from a pipe\n", "from a pipe"),
        (["first", "Summarize:"], "a\nb\n", "Summarize:\n\na\nb"),
        ([], "no model named\n", "no model named"),
    ],
)
def test_what_is_piped_in_is_the_prompt(words: list[str], piped: str, sent: str, server: ScriptedServer) -> None:
    run(server, *words, piped=piped)
    assert server.bodies[0]["messages"][-1]["content"] == sent
    assert server.bodies[0]["model"] == "first"


def test_an_empty_pipe_is_no_prompt(server: ScriptedServer) -> None:
    assert "the prompt is empty" in run(server, "first", piped=" \n", code=2).stderr
    assert server.bodies == []


def test_raw_goes_without_a_template(server: ScriptedServer) -> None:
    assert run(server, "first", "Once", "--raw").stdout == "Blue light scatters.\n"
    assert server.paths == ["/v1/completions"]
    assert server.bodies[0]["prompt"] == "Once"


def test_reasoning_is_not_the_answer(server: ScriptedServer) -> None:
    server.thoughts = ["Let me ", "think."]
    made = run(server, "first", "why?")
    assert made.stdout == "Blue light scatters.\n"
    assert made.stderr.startswith("Let me think.\n")


def test_json_is_one_document(server: ScriptedServer) -> None:
    server.thoughts = ["Hm."]
    made = run(server, "first", "why?", "--json")
    document = json.loads(made.stdout)
    assert (document["model"], document["text"], document["reasoning"]) == ("first", "Blue light scatters.", "Hm.")
    assert (document["completion_tokens"], document["prompt_tokens"], document["finish_reason"]) == (3, 7, "stop")
    assert made.stderr == ""


def test_a_server_that_does_not_count(server: ScriptedServer) -> None:
    server.usage = None
    assert run(server, "first", "why?").stderr.startswith("about 3 tokens, ")


def test_an_answer_that_was_cut_says_so(server: ScriptedServer) -> None:
    server.finish = "length"
    assert "cut at the longest output" in run(server, "first", "why?").stderr


def test_the_key_is_sent_and_never_shown(server: ScriptedServer) -> None:
    made = run(server, "first", "why?", "--api-key", "sk-secret")
    assert server.keys == ["Bearer sk-secret"]
    assert "secret" not in made.output


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((400, '{"error": {"message": "temperature: expected 0 to 2"}}'), "error: temperature: expected 0 to 2"),
        ((500, ""), "error: the server answered with status 500"),
        ((502, "<html>bad gateway"), "error: <html>bad gateway"),
    ],
)
def test_a_refusal_is_one_line(refusal: tuple[int, str], said: str, server: ScriptedServer) -> None:
    server.refusal = refusal
    made = run(server, "first", "why?", code=1)
    assert (made.stdout, made.stderr) == ("", said + "\n")


def test_a_stream_that_ends_early_is_an_error(server: ScriptedServer) -> None:
    server.cut = True
    made = run(server, "first", "why?", code=1)
    assert made.stdout == "Blue light scatters.\n"
    assert "the answer ended early" in made.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nobody", "why?"], "no model 'nobody': it has first, second (fix: --model first)"),
        (["first", "why?", "--target", "cpu"], "--target: is of an engine of this machine"),
        (["first", "why?", "--raw", "--system", "x"], "--system: with --raw"),
        (["first", "why?", "--raw", "--chat-template", "x"], "--chat-template: with --raw"),
        (["first", "why \udcff?"], "the prompt is not UTF-8 text"),
        (["first", "--json"], "the prompt is empty"),
    ],
)
def test_what_nothing_could_come_of_is_refused(args: list[str], said: str, server: ScriptedServer) -> None:
    assert said in run(server, *args, piped="", code=2).stderr
    assert server.bodies == []


@pytest.mark.parametrize("piped", [b"\x89PNG", "é".encode("latin-1")])
def test_what_is_piped_in_is_utf_8(piped: bytes, server: ScriptedServer) -> None:
    made = CliRunner().invoke(app, ["run", "--base-url", server.url, "first", "what is this?"], input=piped)
    assert (made.exit_code, "what is piped in is not UTF-8 text: found byte 0x" in made.stderr) == (2, True)
    assert server.bodies == []


def test_a_pipe_that_stays_open_is_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmctl.cli.chat.terminal._SILENT_SECONDS", 0.05)
    reading, writing = os.pipe()
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)

    def end_it() -> None:
        end = time.monotonic() + 30
        while not said.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        os.close(writing)

    with open(reading, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        ending = threading.Thread(target=end_it)
        ending.start()
        assert piped_text(awaited=False) == ""
        ending.join()
    assert said.getvalue().startswith("reading what is piped in")


def test_a_files_model_that_the_server_lacks_is_no_prompt(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: third\n")
    assert "no model 'third'" in run(server, "--config", str(tmp_path / "r.yaml"), piped="hi", code=2).stderr


def test_a_word_that_may_have_been_meant_as_a_model_is_said_to_be_taken_as_the_prompt(server: ScriptedServer) -> None:
    said = "'thrid' is none of the server's models: taken as a prompt, for 'first'\n"
    assert run(server, "thrid", piped="hi").stderr.startswith(said)
    assert "none of the server's" not in run(server, "why is it blue?", piped="").stderr


def test_the_word_wins_over_a_files_model(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: first\n")
    run(server, "--config", str(tmp_path / "r.yaml"), "second", "hi")
    run(server, "--config", str(tmp_path / "r.yaml"), piped="hi")
    run(server, "--model", "second", "hi", "there")
    asked = [(body["model"], body["messages"][-1]["content"]) for body in server.bodies]
    assert asked == [("second", "hi"), ("first", "hi"), ("second", "hi there")]


@pytest.mark.parametrize("file", ["api-key: sk-secret\n", None])
def test_a_key_is_for_another_server(file: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text(file or "")
    options = ["--config", str(tmp_path / "r.yaml")] if file else ["--api-key", "sk-secret"]
    made = CliRunner().invoke(app, ["run", "nowhere.gguf", "hi", *options])
    assert made.stderr == "error: --api-key: is of --base-url (fix: leave it out)\n"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert "nowhere.gguf" in CliRunner().invoke(app, ["run", "nowhere.gguf", "hi"]).stderr


def test_what_cannot_be_shown_is_not_the_servers_fault(server: ScriptedServer) -> None:
    command = [sys.executable, "-m", "llmctl", "run", "--base-url", server.url, "first", "why?"]
    with open("/dev/full", "wb") as full:
        made = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, check=False)
    assert made.returncode != 0
    assert b"error: No space left on device\n" in made.stderr
    assert b"http" not in made.stderr


def test_a_server_of_ours_may_load_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def running(command: list[str], **more: Any) -> None:
        given.update(more, command=command)
        raise LlmctlError("seen")

    monkeypatch.setattr("llmctl.bench.local_server.running", running)
    monkeypatch.setattr("llmctl.serving.launch.check_config", lambda _: None)
    monkeypatch.setattr("llmctl.artifact.builder.ensure_engine", lambda model, _: Path(model))
    made = CliRunner().invoke(app, ["run", "./engine", "hi", "--target", "cpu"])
    assert made.stderr == "error: seen\n"
    assert (given["ready_timeout"], given["tell"]) == (math.inf, say)
    assert given["command"][3:8] == ["serve", "--model", "engine", "--target", "cpu"]


def test_an_answer_without_a_text_is_told(server: ScriptedServer) -> None:
    server.pieces, server.usage = [], {"prompt_tokens": 7, "completion_tokens": 0}
    made = run(server, "first", "why?")
    assert (made.stdout, made.stderr) == ("", "0 tokens, prompt 7 tokens\n")


def test_an_answer_that_ends_its_line_is_not_given_another(server: ScriptedServer) -> None:
    server.pieces = ["Blue.", "\n"]
    assert run(server, "first", "why?").stdout == "Blue.\n"


def test_a_server_cannot_command_the_terminal(server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.refusal = (400, json.dumps({"error": {"message": "\x1b]0;title\x07"}}))
    assert run(server, "first", "why?", code=1).stderr == "error: \\x1b]0;title\\x07\n"
    say("\x1b]0;title\x07")
    assert capsys.readouterr().err == "\\x1b]0;title\\x07\n"


def test_no_server_and_no_model() -> None:
    made = CliRunner().invoke(app, ["run", "--base-url", "http://127.0.0.1:9", "--model", "m", "x"])
    assert made.exit_code == 1
    assert "no server answers" in made.stderr
    made = CliRunner().invoke(app, ["run"])
    assert (made.exit_code, "no model named" in made.stderr) == (2, True)


class Terminal:
    """``llmctl run`` at a terminal."""

    def __init__(self, *args: str, home: Path) -> None:
        self._end, theirs = pty.openpty()
        environment = {**os.environ, "HOME": str(home), "TERM": "dumb", "COLUMNS": "80", "XDG_STATE_HOME": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmctl", "run", *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: _controlling(theirs),
        )
        os.close(theirs)
        self.shown = ""

    def until(self, text: str, seconds: float = 30.0, again: str = "") -> str:
        """Everything shown until there is ``text``, which is taken away. ``again``: is typed every second till then."""
        end = time.monotonic() + seconds
        typed = -math.inf
        while text not in self.shown:
            assert time.monotonic() < end, f"expected {text!r}, found {self.shown!r}"
            if again and time.monotonic() > typed + 1:
                self.type(again)
                typed = time.monotonic()
            if select.select([self._end], [], [], 0.1)[0]:
                self.shown += os.read(self._end, 4096).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._end)


def _controlling(terminal: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_a_chat_at_a_terminal(server: ScriptedServer, tmp_path: Path) -> None:
    server.names = ("first",)
    terminal = Terminal("--base-url", server.url, home=tmp_path)
    try:
        terminal.until("first: /help lists")
        terminal.until(">>> ")
        terminal.type("/set temperature 0.2\n")
        terminal.until("temperature 0.2\x1b[0m")
        terminal.type("/system Be brief.\n")
        terminal.until("system prompt set")
        terminal.type("why?\n")
        terminal.until("Blue light scatters.")
        terminal.until("prompt 7 tokens")
        terminal.type('"""one\ntwo"""\n')
        terminal.until("... ")
        terminal.until("Blue light scatters.")
        terminal.until(">>> ")
        server.pieces, server.gap = ["never ", "ending "] * 200, 0.05
        terminal.type("go on\n")
        terminal.until("never ending ")
        terminal.type("\x03")  # Ctrl-C: the terminal's SIGINT to the whole group
        terminal.until("unfinished")
        terminal.until(">>> ")
        assert server.broken.wait(10), "the request goes on although nobody reads it"
        server.pieces = ["Again."]
        terminal.type("and now?\n")
        terminal.until("Again.")
        terminal.type("/nothing\n")
        terminal.until("no command /nothing")
        terminal.until(">>> ")
        # A signal that comes before Python waits at its prompt is not seen there until another key is.
        terminal.until("/bye or Ctrl-D leaves", again="\x03")
        terminal.type("/bye\n")
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()
    last = server.bodies[-1]
    assert last["temperature"] == 0.2
    said = [(turn["role"], turn["content"]) for turn in last["messages"]]
    assert said[0] == ("system", "Be brief.")
    assert said[1:5:2] == [("user", "why?"), ("user", "one\ntwo")]
    assert said[5] == ("user", "go on")
    assert said[6][1].startswith("never ending ")
    history = tmp_path / ".local" / "state" / "llmctl" / "run_history"
    assert "why?" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_an_engine_is_served_for_as_long_as_it_takes(tiny_engine: Path) -> None:
    made = CliRunner().invoke(
        app, ["run", str(tiny_engine), "hello", "--max-tokens", "8", "--temperature", "0", "--json"]
    )
    assert made.exit_code == 0, made.output
    document: dict[str, Any] = json.loads(made.stdout)
    assert document["completion_tokens"] == 8
    assert document["tokens_per_second"] > 0


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tiny_engine: Path) -> None:
    made = CliRunner().invoke(app, ["run", str(tiny_engine), "hello", "--max-model-len", "999999"])
    assert made.exit_code == 1
    (line,) = made.stderr.splitlines()
    assert line.startswith("error: --max-model-len: expected at most ")
    assert line.count("(fix: ") == 1


@pytest.mark.slow
def test_a_closed_terminal_leaves_no_server(tiny_engine: Path, tmp_path: Path) -> None:
    import psutil

    terminal = Terminal(str(tiny_engine), home=tmp_path)
    try:
        terminal.until("/help lists", 60)
        children = psutil.Process(terminal.process.pid).children(recursive=True)
        assert children
        os.kill(terminal.process.pid, signal.SIGHUP)
        terminal.process.wait(30)
        _, alive = psutil.wait_procs(children, 10)
        assert alive == []
    finally:
        terminal.close()
