"""One question, or a chat: messages in, answers out, until it is left."""

from __future__ import annotations

from llmctl.cli.chat.answers import Answer, AnswerStream
from llmctl.cli.chat.commands import Leave, completions, run_command
from llmctl.cli.chat.conversation import Conversation
from llmctl.cli.chat.terminal import AnswerPrinter, LineReader, history_file, say
from llmctl.cli.common import report
from llmctl.errors import LlmctlError


def ask(stream: AnswerStream, chat: Conversation, text: str, *, show: bool = True) -> Answer:
    """One turn: the answer, shown as it comes and taken into the conversation.

    Raises:
        LlmctlError: as ``AnswerStream.ask``. KeyboardInterrupt: what had come is taken in.
    """
    answer, printer = Answer(), AnswerPrinter()
    whole = False
    try:
        stream.ask(chat.path, chat.body(text), answer, printer.show if show else _unseen)
        whole = True
    finally:
        if show:
            printer.end()
            if whole or answer.pieces:  # an answer without a text is one, too
                say(answer.speed_line())
        chat.add(text, answer.text)
    return answer


def converse(stream: AnswerStream, chat: Conversation, *, keep_history: bool = True) -> None:
    """Read messages and answer them until the end of the input or ``/bye``.

    A request that is refused is a line, and the chat goes on: what it asked for can be set otherwise.
    """
    lines = LineReader(history_file() if keep_history else None, completions)
    try:
        while True:
            try:
                text, quoted = lines.read()
                if text.strip():
                    _turn(stream, chat, text, command=text.startswith("/") and not quoted)
            except KeyboardInterrupt:
                say("\n/bye or Ctrl-D leaves")
    except (EOFError, Leave):
        say("")
    finally:
        lines.close()


def _turn(stream: AnswerStream, chat: Conversation, text: str, *, command: bool) -> None:
    try:
        if command:
            say(run_command(chat, text))
        else:
            ask(stream, chat, text)
    except KeyboardInterrupt:
        pass  # the answer's line says that it was stopped
    except LlmctlError as error:
        report(error)


def _unseen(_piece: str, _reasoning: bool) -> None:
    pass
