"""The terminal's end of a chat: lines that are typed, text that is shown."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from llmctl.checkpoint.user_folders import state_dir
from llmctl.errors import UsageError

_PROMPT, _MORE = ">>> ", "... "
_QUOTES = '"""'
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_HISTORY_LINES = 1000
_SILENT_SECONDS = 1.0
_STILL_READING = "reading what is piped in, until it ends; where nothing is: < /dev/null"
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Unicode's controls (Cc) but tab and line feed, overrides and isolates of direction, and surrogates."""


def history_file() -> Path:
    """Where typed lines are kept: ``llmctl/run_history`` below ``$XDG_STATE_HOME``, else below ``~/.local/state``."""
    return state_dir() / "run_history"


def piped_text(*, awaited: bool) -> str | None:
    """What is piped into this process, or redirected from a file; None at a terminal, or where there is no input.

    Args:
        awaited: nothing else is there to go on with. Otherwise, a pipe that stays open is spoken of.

    Raises:
        UsageError: it is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    with contextlib.suppress(io.UnsupportedOperation, OSError):
        is_of = os.fstat(sys.stdin.fileno())
        if os.path.samestat(is_of, os.stat(os.devnull)):
            return ""
        mode = is_of.st_mode
        # What is neither a pipe nor a file may stay open for ever and say nothing, such as a service's socket.
        if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
            return None
    notice = threading.Timer(_SILENT_SECONDS, say, (_STILL_READING,))
    notice.daemon = True
    if not awaited:
        notice.start()
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"what is piped in is not UTF-8 text: found byte 0x{error.object[error.start]:02x} at {error.start}",
            fix="convert it, or leave it out",
        ) from None
    finally:
        notice.cancel()
    return io.StringIO(text, newline=None).read()


def printable(text: str) -> str:
    """Text without what a terminal would obey: escapes, other controls and what turns lines around are shown as such.

    All else is the text's: spaces that do not break, joiners of letters and emojis.
    """
    return text if text.isprintable() else _OBEYED.sub(lambda c: c[0].encode("unicode_escape").decode(), text)


class LineReader:
    """Reads messages: one line, or several between triple quotes. With editing and history at a terminal."""

    def __init__(self, history: Path | None, complete: Callable[[], list[str]]) -> None:
        """``history``: where lines are kept; None: nowhere. ``complete``: what a line may begin with."""
        self._history = history
        self._readline = sys.stdin.isatty() and sys.stdout.isatty() and self._start_editing(complete)

    def read(self) -> tuple[str, bool]:
        """The next message, and whether it stood between quotes.

        Raises:
            EOFError: there is none. KeyboardInterrupt: what was typed is given up.
        """
        line = self._line(_PROMPT)
        if not line.lstrip().startswith(_QUOTES):
            return line, False
        text = line.lstrip()[len(_QUOTES) :]
        while not text.rstrip().endswith(_QUOTES):
            text += "\n" + self._line(_MORE)
        return text.rstrip()[: -len(_QUOTES)].strip("\n"), True

    def close(self) -> None:
        """Keep the lines for the next time."""
        if not self._readline or self._history is None:
            return
        import readline

        with contextlib.suppress(OSError):  # a home that cannot be written to: there is no history then
            self._history.parent.mkdir(parents=True, exist_ok=True)
            if not self._history.exists():
                os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))  # others need not read it
            readline.write_history_file(self._history)

    def _line(self, prompt: str) -> str:
        if self._readline:
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for answers
        return input()

    def _start_editing(self, complete: Callable[[], list[str]]) -> bool:
        try:
            import readline
        except ImportError:
            return False
        if self._history is not None:
            with contextlib.suppress(OSError):
                readline.read_history_file(self._history)
        readline.set_history_length(_HISTORY_LINES)
        readline.set_completer_delims("")
        readline.set_completer(lambda text, state: [*(c for c in complete() if c.startswith(text)), None][state])
        readline.parse_and_bind("tab: complete")
        return True


class AnswerPrinter:
    """Shows an answer as it comes: its text on stdout, its reasoning on stderr, dim."""

    def __init__(self) -> None:
        self._reasons = False
        self._begun = False  # since the reasoning, if there was any
        self._line_is_open = False
        self._terminal = sys.stdout.isatty()

    def show(self, piece: str, reasoning: bool) -> None:
        """A piece of it."""
        if reasoning != self._reasons:
            self._switch(reasoning)
        if not reasoning and self._terminal:
            piece = printable(piece if self._begun else piece.lstrip("\n"))
        if not piece:
            return
        if reasoning:
            print(printable(piece), end="", file=sys.stderr, flush=True)
        else:
            print(piece, end="", flush=True)
            self._line_is_open = not piece.endswith("\n")
        self._begun = True

    def end(self) -> None:
        """The answer is over, whole or not."""
        if self._reasons:
            self._switch(False)
        if self._line_is_open:
            print(flush=True)

    def _switch(self, reasoning: bool) -> None:
        dim = sys.stderr.isatty()
        if reasoning:
            print(_DIM if dim else "", end="", file=sys.stderr)
        else:
            print(_PLAIN if dim else "", file=sys.stderr, flush=True)
            self._begun = False
        self._reasons = reasoning


def say(text: str) -> None:
    """A line about the chat, on stderr; dim at a terminal."""
    dim, text = sys.stderr.isatty(), printable(text)  # a server's names are in it
    print(f"{_DIM}{text}{_PLAIN}" if dim else text, file=sys.stderr, flush=True)
