"""Calls that may be made: an answer in which text is free, and a call that has begun is held to the request's tools.

A grammar for each row of ``TOOL_FORMATS`` whose arguments are JSON. It allows no text that ``OutputParser`` would read
as another call: where a marker or the answer's beginning opens one, nothing else can follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmctl.serving.protocol import Tool
from llmctl.serving.tools.enforced import arguments_schema
from llmctl.serving.tools.thinking import BLANKS as _S
from llmctl.serving.tools.thinking import opening_rules, thinking_rules
from llmctl.structured.regex import quoted
from llmctl.structured.spec import GrammarSpec, lark_with_schemas
from llmctl.text.output_parser.formats import Layout, ReasoningFormat, ToolFormat

_ANY = "(?s:.*)"
_STRING = r'"(\\.|[^"\\])*"'
_SCALAR = r'[^\s\x{1C}-\x{1F},:"{}\[\]]+'
# The beginning of a call without a marker, up to its name: the parser passes over these members.
_BEFORE_NAME = rf'\{{{_S}("(type|id)"{_S}:{_S}({_STRING}|{_SCALAR}){_S},?{_S})*'
# Between the parts of a call: a space, or line breaks and an indentation, as in all JSON that is enforced.
_SPACE = r"( |\n{1,2}[ \t]{0,20})?"


def why_not_held(row: ToolFormat) -> str | None:
    """Why calls of a format cannot be held to schemas; None: they can."""
    if Layout.PYTHON in row.layouts:
        return f"the format {row.name} writes arguments as Python"
    if Layout.TAGGED in row.layouts:
        return f"the format {row.name} writes arguments as plain text"
    if any(begin.isalnum() for begin in row.begins):
        return f"calls of the format {row.name} begin with a plain word"
    return None


def held_calls(
    row: ToolFormat,
    tools: Sequence[Tool],
    param: str,
    *,
    single: bool,
    special_ids: Mapping[str, int],
    reasoning: ReasoningFormat | None = None,
    begun: bool = False,
) -> GrammarSpec:
    """The grammar of an answer in a format that can be held.

    Arguments of tools that are not strict are any JSON object.

    Args:
        single: at most one call. special_ids: of the special tokens that markers are made of, by their texts.
        reasoning: how it is written, before all else; None: there is none. begun: it has begun before the answer.

    Raises:
        RequestError: the schemas are too long.
    """
    return _Answer(row, tools, single, special_ids, reasoning, begun).grammar(param)


class _Answer:
    """Lark of one answer. Names of terminals are in capitals."""

    def __init__(
        self,
        row: ToolFormat,
        tools: Sequence[Tool],
        single: bool,
        special_ids: Mapping[str, int],
        reasoning: ReasoningFormat | None,
        begun: bool,
    ) -> None:
        self._row = row
        self._tools = tools
        self._single = single
        self._special_ids = special_ids
        self._reasoning = reasoning
        self._begun = begun or (reasoning is not None and reasoning.implied)
        self._lines: list[str] = []

    def grammar(self, param: str) -> GrammarSpec:
        """All of it."""
        row = self._row
        self._start()
        self._body()
        if row.begins:
            self._section()
        if row.bare:
            self._bare()
        self._calls()
        schemas = {
            f"args_{i}": arguments_schema(tool) if tool.function.strict else {"type": "object"}
            for i, tool in enumerate(self._tools)
        }
        return lark_with_schemas("".join(f"{line}\n" for line in self._lines), schemas, param)

    def _add(self, *lines: str) -> None:
        self._lines += lines

    # The answer

    def _start(self) -> None:
        """Reasoning, if there is any, and what comes after it."""
        if self._reasoning is None:
            self._add("start: body")
            return
        self._add(*thinking_rules(self._reasoning, self._special_ids, "body", alone=True))
        if self._begun:
            self._add("start: thinking")
        else:
            begin = self._reasoning.begin
            self._add(f"BLANK: /{_S}/")
            self._opening("thought_begin", f"/{_S}{quoted(begin)}/", begin, "BLANK")
            self._add("start: thought_begin thinking | body")

    def _opening(self, name: str, expression: str, marker: str, before: str) -> None:
        self._add(*opening_rules(name, expression, marker, before, self._special_ids))

    def _body(self) -> None:
        """Text, and sections of calls."""
        row = self._row
        barred = [self._bare_beginnings()] if row.bare else []
        begin = row.begins[0] if row.begins else ""
        self._text("FIRST", "first_opening", begin, barred)
        self._text("TEXT", "opening", begin, ())
        after = "TEXT?" if row.end else ""
        if row.end and not self._single:
            after = "(opening section)* TEXT?"
        found = [f"first_opening section {after}"] if begin else []
        self._add("body: " + " | ".join([*found, *(["bare"] if row.bare else []), "FIRST?"]))

    def _text(self, terminal: str, opening: str, marker: str, barred: Sequence[str]) -> None:
        """Text without a marker, and text that ends with its first one; neither matches what is ``barred``."""
        but = "".join(f" & ~/{expression}/" for expression in barred)
        if not marker:
            self._add(f"{terminal}: /(?s:.+)/{but}")
            return
        self._add(f"{terminal}: /(?s:.+)/ & ~/{_holding(marker)}/{but}")
        self._opening(opening, f"/{_ANY}{quoted(marker)}/{but}", marker, terminal)

    # Calls behind a marker

    def _section(self) -> None:
        row = self._row
        end = f" space {self._marker(row.end)}" if row.end else ""
        forms = []
        if Layout.JSON in row.layouts:
            forms.append(f"space {self._series('call', row)}")
        if Layout.NAMED in row.layouts:
            forms.append(self._named_series())
        self._add(f"section: ({' | '.join(forms)}){end}", "space: SPACE?", f"SPACE: /{_SPACE[:-1]}/")

    def _series(self, call: str, row: ToolFormat) -> str:
        """JSON calls as the format puts them."""
        if row.listed:
            more = "" if self._single else f" (COMMA {call})*"
            return f"LIST_BEGIN {call}{more} LIST_END"
        if row.separator == ";" and not self._single:
            return f"{call} (SEMICOLON {call})*"
        return call

    def _named_series(self) -> str:
        row = self._row
        if row.call_end:
            return "space named" + ("" if self._single else " (space named)*")
        begin = self._marker(row.begins[0])
        return "named" + ("" if self._single else f" (space {begin} named)*")

    def _marker(self, text: str) -> str:
        """A marker, whose special tokens may come as such or spelt out."""
        if not self._special_ids:
            return _literal(text)
        parts = re.split(f"({'|'.join(map(re.escape, self._special_ids))})", text)
        return " ".join(
            f"({_literal(part)} | <[{self._special_ids[part]}]>)" if part in self._special_ids else _literal(part)
            for part in parts
            if part
        )

    def _calls(self) -> None:
        row, indices = self._row, range(len(self._tools))
        if Layout.JSON in row.layouts:
            self._add(
                *(f"call: {_any_of('call', indices)}", f"LIST_BEGIN: /\\[{_SPACE}/", f"LIST_END: /{_SPACE}\\]/"),
                *(f"COMMA: /{_SPACE},{_SPACE}/", f"SEMICOLON: /{_SPACE};{_SPACE}/", f"CALL_END: /{_SPACE}\\}}/"),
                f'ARGUMENTS: /{_SPACE},{_SPACE}"{row.arguments}"{_SPACE}:{_SPACE}/',
            )
        if Layout.NAMED in row.layouts:
            self._add(f"named: {_any_of('named', indices)}")
        for i, tool in enumerate(self._tools):
            name = tool.function.name
            if Layout.JSON in row.layouts:
                self._add(
                    f'HEAD_{i}: /\\{{{_SPACE}"name"{_SPACE}:{_SPACE}"{quoted(name)}"/',
                    *(f"call_{i}: HEAD_{i} rest_{i}", f"rest_{i}: ARGUMENTS args_{i} CALL_END"),
                )
            if Layout.NAMED in row.layouts:
                before = self._marker(row.call_begin) if row.call_begin else ""
                after = f" space {self._marker(row.call_end)}" if row.call_end else ""
                self._add(f"named_{i}: {before} {_literal(name)} {self._marker(row.name_ends[0])} args_{i}{after}")

    # Calls at the answer's beginning

    def _bare(self) -> None:
        """They need no marker. One is known by its name: an answer that happens to be JSON is text."""
        row = self._row
        indices = range(len(self._tools))
        more = "" if self._single or row.separator != ";" else " (SEMICOLON call)*"
        forms = [f"({_any_of('bare', indices)}){more}"]
        more = "" if self._single or row.separator != "," else " (COMMA call)*"
        forms.append(f"({_any_of('listed', indices)}){more} LIST_END")
        self._add(f"bare: {' | '.join(forms)}")
        for i, tool in enumerate(self._tools):
            head = rf'{_BEFORE_NAME}"name"{_S}:{_S}"{quoted(tool.function.name)}"'
            self._add(
                *(f"bare_head_{i}[lazy]: /{_S}{head}/", f"bare_{i}: bare_head_{i} rest_{i}"),
                *(f"listed_head_{i}[lazy]: /{_S}\\[{_S}{head}/", f"listed_{i}: listed_head_{i} rest_{i}"),
            )

    def _bare_beginnings(self) -> str:
        """What no text may begin with: a call of a tool, or what the parser may yet take for one."""
        names = "|".join(quoted(tool.function.name) for tool in self._tools)
        told = (
            rf'"name"{_S}:{_S}"(({names})"|[^"\\]*\\)',
            r'"(arguments|parameters)"',
            rf'"(type|id)"{_S}:{_S}[{{\[]',
            r'"[^"\\]*\\',
        )
        return rf"{_S}(\[{_S})?{_BEFORE_NAME}({'|'.join(told)}){_ANY}"


def _holding(text: str) -> str:
    """An expression for what has a text in it."""
    return f"{_ANY}{quoted(text)}{_ANY}"


def _literal(text: str) -> str:
    return f"/{quoted(text)}/"


def _any_of(rule: str, indices: Sequence[int]) -> str:
    return " | ".join(f"{rule}_{i}" for i in indices)
