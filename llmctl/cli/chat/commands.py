"""What may be typed at the prompt of ``llmctl run`` beside messages: a table of commands that begin with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from llmctl.cli.chat.conversation import DEFAULT, SAMPLING_FIELDS, Conversation
from llmctl.errors import UsageError

Run = Callable[[Conversation, str], str]
"""What a command does with what stands behind it; returns what is said about it."""


class Leave(Exception):
    """The chat is over."""


@dataclass(frozen=True)
class Command:
    """One command: its names, the first of which help shows; what stands behind it; what it does."""

    names: tuple[str, ...]
    arguments: str
    help: str
    run: Run


def _set(chat: Conversation, words: str) -> str:
    name, _, value = words.partition(" ")
    if not name:
        return ", ".join(f"{key} {value}" for key, value in chat.sampling.items()) or "nothing is set: the server's own"
    if not value.strip():
        raise UsageError(
            f"/set {name}: expected a value", fix=f"/set temperature 0.2, or /set temperature {DEFAULT}", param=name
        )
    chat.set(name, value.strip())
    return f"{name} {value.strip()}"


def _system(chat: Conversation, text: str) -> str:
    if chat.raw:
        raise UsageError("/system: with --raw texts go to the model as they are", fix="put it into the text")
    if not text:
        return f"system prompt: {chat.system}" if chat.system else "no system prompt"
    chat.system = "" if text in ('""', "''") else text
    return "system prompt set" if chat.system else "no system prompt"


def _clear(chat: Conversation, _: str) -> str:
    chat.clear()
    return "the conversation is forgotten"


def _help(_: Conversation, __: str) -> str:
    rows = [(f"{command.names[0]} {command.arguments}".strip(), command.help) for command in COMMANDS]
    rows += [('"""', "begins and ends a message of several lines"), ("Ctrl-C", "stops the answer under way")]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _leave(_: Conversation, __: str) -> str:
    raise Leave


COMMANDS = (
    Command(("/set",), "NAME VALUE", "a sampling field; default: the server's; alone: what is set", _set),
    Command(("/system",), "TEXT", 'the system prompt from now on; "" for none; alone: what it is', _system),
    Command(("/clear",), "", "forget the conversation; what is set stays", _clear),
    Command(("/help", "/?"), "", "this list", _help),
    Command(("/bye", "/exit", "/quit"), "", "leave; Ctrl-D does so too", _leave),
)


def run_command(chat: Conversation, line: str) -> str:
    """Do what a line that begins with a slash says; what to tell about it.

    Raises:
        UsageError: no such command, or not what it takes. Leave: the chat is over.
    """
    name, _, rest = line.strip().partition(" ")
    known = {alias: command for command in COMMANDS for alias in command.names}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        near = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"no command {name}", fix=f'{near}/help lists them; a message with a slash goes between """')
    return known[name].run(chat, rest.strip())


def completions() -> list[str]:
    """What a line may begin with: commands, and the fields that can be set."""
    return [name for command in COMMANDS for name in command.names] + [f"/set {name} " for name in SAMPLING_FIELDS]
