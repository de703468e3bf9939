"""The terminal's end of a chat: lines that are typed, text that is shown."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

_PROMPT, _MORE = ">>> ", "... "
_QUOTES = '"""'
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_HISTORY_LINES = 1000


def history_file() -> Path:
    """Where typed lines are kept: ``llmctl/run_history`` below ``$XDG_STATE_HOME``, else below ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "llmctl" / "run_history"


def piped_text() -> str | None:
    """What is piped into this process, or redirected from a file; None at a terminal, or where there is no input."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    with contextlib.suppress(io.UnsupportedOperation, OSError):
        mode = os.fstat(sys.stdin.fileno()).st_mode
        # What is neither a pipe nor a file may stay open for ever and say nothing, such as a service's socket.
        if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
            return None
    return sys.stdin.read()


def printable(text: str) -> str:
    """Text without what a terminal would obey: escapes and other controls are shown as such."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


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
        self._at_line_start = True
        self._terminal = sys.stdout.isatty()

    def show(self, piece: str, reasoning: bool) -> None:
        """A piece of it."""
        if reasoning != self._reasons:
            self._switch(reasoning)
        if reasoning:
            print(printable(piece), end="", file=sys.stderr, flush=True)
        else:
            if self._terminal:
                piece = printable(piece.lstrip("\n") if self._at_line_start else piece)
            print(piece, end="", flush=True)
        self._at_line_start = self._at_line_start and not piece

    def end(self) -> None:
        """The answer is over, whole or not."""
        if self._reasons:
            self._switch(False)
        if not self._at_line_start:
            print(flush=True)

    def _switch(self, reasoning: bool) -> None:
        dim = sys.stderr.isatty()
        if reasoning:
            print(_DIM if dim else "", end="", file=sys.stderr)
        else:
            print(_PLAIN if dim else "", file=sys.stderr, flush=True)
            self._at_line_start = True
        self._reasons = reasoning


def say(text: str) -> None:
    """A line about the chat, on stderr; dim at a terminal."""
    dim = sys.stderr.isatty()
    print(f"{_DIM}{text}{_PLAIN}" if dim else text, file=sys.stderr, flush=True)
