"""A chat's state and what can be typed into it."""

from __future__ import annotations

import pytest

from llmctl.cli.chat.commands import COMMANDS, Leave, completions, run_command
from llmctl.cli.chat.conversation import SAMPLING_FIELDS, Conversation, parse_field
from llmctl.cli.chat.terminal import printable
from llmctl.config import RunConfig
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import UsageError


def test_turns_are_remembered_and_forgotten() -> None:
    chat = Conversation("m", system="S")
    chat.add("a", "b")
    chat.add("lost", "")
    assert [turn["content"] for turn in chat.body("c")["messages"]] == ["S", "a", "b", "c"]
    assert run_command(chat, "/clear") == "the conversation is forgotten"
    assert [turn["content"] for turn in chat.body("c")["messages"]] == ["S", "c"]


def test_fields_are_set_and_left_to_the_server_again() -> None:
    chat = Conversation("m")
    for line, said in (
        ("/set", "nothing is set: the server's own"),
        ("/set temperature 0.2", "temperature 0.2"),
        ("/set top-k 5", "top-k 5"),
        ("/set stop two words", "stop two words"),
        ("/set", "temperature 0.2, top_k 5, stop two words"),
        ("/set temperature default", "temperature default"),
    ):
        assert run_command(chat, line) == said
    assert chat.sampling == {"top_k": 5, "stop": "two words"}
    assert chat.body("x")["top_k"] == 5


def test_the_system_prompt() -> None:
    chat = Conversation("m")
    assert run_command(chat, "/system") == "no system prompt"
    assert run_command(chat, "/system Be brief.") == "system prompt set"
    assert run_command(chat, "/system") == "system prompt: Be brief."
    assert run_command(chat, '/system ""') == "no system prompt"
    assert chat.body("x")["messages"] == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temperature warm", "temperature: expected a number, found 'warm'"),
        ("/set temperature nan", "temperature: expected a number, found 'nan'"),
        ("/set top_k 0.5", "top_k: expected a whole number, found '0.5'"),
        ("/set temperature", "/set temperature: expected a value"),
        ("/sytem x", "did you mean /system?"),
        ("/etc/passwd is a file", "no command /etc/passwd"),
    ],
)
def test_what_is_typed_wrong_is_said(line: str, said: str) -> None:
    chat = Conversation("m")
    with pytest.raises(UsageError) as error:
        run_command(chat, line)
    assert said in str(error.value)
    assert chat.sampling == {}


@pytest.mark.parametrize("line", ["/bye", "/exit", "/quit"])
def test_leaving(line: str) -> None:
    with pytest.raises(Leave):
        run_command(Conversation("m"), line)


def test_help_lists_every_command_in_80_columns() -> None:
    text = run_command(Conversation("m"), "/help")
    assert all(command.names[0] in text for command in COMMANDS)
    assert max(map(len, text.splitlines())) <= 80
    assert {name for command in COMMANDS for name in command.names} < set(completions())


def test_every_field_is_one_of_the_engines() -> None:
    samples = {"stop": ["x"], "top_k": 2, "max_tokens": 3, "seed": 4}
    for name in SAMPLING_FIELDS:
        SamplingParams(**{name: samples.get(name, 0.5)})
        assert parse_field(name, "1")
    assert {name for name in SAMPLING_FIELDS if not hasattr(RunConfig, name)} == {
        "presence_penalty",
        "frequency_penalty",
    }


def test_raw_has_no_turns() -> None:
    chat = Conversation("m", raw=True)
    chat.add("a", "b")
    assert chat.body("c")["prompt"] == "c"
    assert chat.messages == []
    with pytest.raises(UsageError, match="--raw"):
        run_command(chat, "/system x")


def test_a_model_cannot_command_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\n\tç🎉") == "a\\x1b]0;title\\x07b\n\tç🎉"
    assert printable("a\x9b\u202e\u2066\ud800\r") == "a\\x9b\\u202e\\u2066\\ud800\\r"


@pytest.mark.parametrize("text", ["Bonjour\xa0!", "l\u202feau", "می\u200cخواهم", "👨\u200d👩\u200d👧"])
def test_what_languages_write_is_shown_as_it_is(text: str) -> None:
    assert printable(text + "\x07") == text + "\\x07"
