"""GBNF, the grammar notation of llama.cpp (grammars/README.md there), in llguidance's Lark.

Terminals become one character each. Longer ones would be read greedily by llguidance's lexer, as Lark has it; GBNF has
no lexer, every way to read a text counts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

MAX_DEPTH = 100
"""Of nested parentheses."""
MAX_REPEAT = 2000
"""Of a counted repetition; llama.cpp's."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE_IN_LINE = re.compile(r"(?:[ \t]|#[^\n]*)*")
_RULE = re.compile(r"([A-Za-z0-9_-]+)[ \t]*::=")
_COUNTS = re.compile(r"\{[ \t]*(\d*)[ \t]*(,?)[ \t]*(\d*)[ \t]*\}")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-", "^": "^", "/": "/"}
_HEX = {"x": 2, "u": 4, "U": 8}


class GbnfError(ValueError):
    """A grammar that is not GBNF; the text says where and why."""


def gbnf_to_lark(source: str) -> str:
    """The Lark grammar of the same language.

    Raises:
        GbnfError: the line, and what was expected there.
    """
    return _Parser(source).grammar()


@dataclass
class _Parser:
    """Recursive descent; ``at`` is the next character."""

    source: str
    at: int = 0
    depth: int = 0

    def __post_init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._used: dict[str, int] = {}

    def grammar(self) -> str:
        rules: dict[str, str] = {}
        self._skip(_SPACE)
        while self.at < len(self.source):
            match = _RULE.match(self.source, self.at)
            if match is None:
                raise self._error("expected a rule ('name ::= …')")
            if match[1] in rules:
                raise self._error(f"rule '{match[1]}' is defined twice")
            self.at = match.end()
            self._skip(_SPACE)
            rules[match[1]] = self._alternatives()
            self._skip(_SPACE)
        self._check(rules)
        return "".join(f"{self._rule(name)}: {body}\n" for name, body in rules.items())

    def _check(self, rules: dict[str, str]) -> None:
        if "root" not in rules:
            raise GbnfError("expected a rule 'root', found none")
        for name, at in self._used.items():
            if name not in rules:
                self.at = at
                raise self._error(f"rule '{name}' is not defined")

    def _rule(self, name: str) -> str:
        return "start" if name == "root" else f"r{self._numbers.setdefault(name, len(self._numbers))}"

    def _alternatives(self) -> str:
        found = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            self._skip(_SPACE)
            found.append(self._sequence())
        return " | ".join(found)

    def _sequence(self) -> str:
        items: list[str] = []
        while (item := self._item()) is not None:
            self._skip(_SPACE if self.depth else _SPACE_IN_LINE)
            items.append(item + self._repetition())
            self._skip(_SPACE if self.depth else _SPACE_IN_LINE)
            if not self.depth and self._next_line_goes_on():
                self._skip(_SPACE)
        return " ".join(items) or '""'

    def _next_line_goes_on(self) -> bool:
        """Whether what follows a line's end belongs to the same rule: an alternative, by common custom."""
        match = _SPACE.match(self.source, self.at)
        return match is not None and self.source[match.end() : match.end() + 1] == "|"

    def _item(self) -> str | None:
        char = self._peek()
        if char == '"':
            return self._literal()
        if char == "[":
            return self._char_class()
        if char == ".":
            self.at += 1
            return r"/[\x{0}-\x{10FFFF}]/"
        if char == "(":
            return self._group()
        match = _NAME.match(self.source, self.at)
        if match is None or _RULE.match(self.source, self.at):
            return None
        self._used.setdefault(match[0], self.at)
        self.at = match.end()
        return self._rule(match[0])

    def _group(self) -> str:
        if self.depth == MAX_DEPTH:
            raise self._error(f"expected at most {MAX_DEPTH} nested parentheses")
        self.depth += 1
        self.at += 1
        self._skip(_SPACE)
        body = self._alternatives()
        if self._peek() != ")":
            raise self._error("expected ')'")
        self.at += 1
        self.depth -= 1
        return f"({body})"

    def _literal(self) -> str:
        self.at += 1
        chars: list[str] = []
        while self._peek() != '"':
            chars.append(self._char())
        self.at += 1
        spelt = [json.dumps(char, ensure_ascii=False) for char in chars]
        return spelt[0] if len(spelt) == 1 else "(" + (" ".join(spelt) or '""') + ")"

    def _char_class(self) -> str:
        self.at += 1
        negated = self._peek() == "^"
        self.at += negated
        parts: list[str] = []
        while self._peek() != "]":
            low = high = ord(self._char())
            if self._peek() == "-" and self.source[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                high = ord(self._char())
            if high < low:
                raise self._error("expected a range of rising characters")
            parts.append(f"\\x{{{low:X}}}-\\x{{{high:X}}}")
        self.at += 1
        if not parts:
            raise self._error("expected a character in '[]'")
        return f"/[{'^' if negated else ''}{''.join(parts)}]/"

    def _char(self) -> str:
        char = self._peek()
        if not char or char == "\n":
            raise self._error("expected a closing quote or bracket")
        self.at += 1
        if char != "\\":
            return char
        kind = self._peek()
        self.at += 1
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        digits = self.source[self.at : self.at + _HEX.get(kind, 0)]
        if kind in _HEX and re.fullmatch(f"[0-9A-Fa-f]{{{_HEX[kind]}}}", digits):
            code = int(digits, 16)
            if code < 0x110000 and not 0xD800 <= code < 0xE000:
                self.at += len(digits)
                return chr(code)
        raise self._error(f"unknown escape '\\{kind}{digits}'")

    def _repetition(self) -> str:
        char = self._peek()
        if char in ("*", "+", "?"):
            self.at += 1
            return char
        if char != "{":
            return ""
        match = _COUNTS.match(self.source, self.at)
        if match is None or not (match[1] or match[3]):
            raise self._error("expected a repetition ('{m}', '{m,}', '{,n}' or '{m,n}')")
        low = int(match[1] or 0)
        high = int(match[3]) if match[3] else None if match[2] else low
        if max(low, high or 0) > MAX_REPEAT:
            raise self._error(f"expected a repetition of at most {MAX_REPEAT}")
        if high is not None and high < low:
            raise self._error("expected a repetition '{m,n}' with m at most n")
        self.at = match.end()
        return f"{{{low},{'' if high is None else high}}}"

    def _skip(self, space: re.Pattern[str]) -> None:
        match = space.match(self.source, self.at)
        if match is not None:
            self.at = match.end()

    def _peek(self) -> str:
        return self.source[self.at : self.at + 1]

    def _error(self, text: str) -> GbnfError:
        line = self.source.count("\n", 0, self.at) + 1
        return GbnfError(f"line {line}: {text}, found {self.source[self.at : self.at + 12]!r}")
