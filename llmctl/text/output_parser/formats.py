"""How models write tool calls and reasoning: a row each. A new format of a known layout is one more row.

Names and aliases are those of vLLM's ``--tool-call-parser`` and ``--reasoning-parser``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from llmctl.errors import UsageError


class Layout(Enum):
    """How one call is written.

    JSON: ``{"name": …, "arguments": {…}}`` (or ``parameters``), or a list of such objects.
    NAMED: the name, one of ``name_ends``, the arguments as a JSON object.
    TAGGED: the name, ``>``, then ``<parameter=KEY>VALUE</parameter>`` for each argument.
    PYTHON: ``[name(key=value, …), …]`` with Python's literals.
    """

    JSON = auto()
    NAMED = auto()
    TAGGED = auto()
    PYTHON = auto()


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls: sections of one or more calls, with text before and after.

    Attributes:
        begins: markers that begin a section. ``end``: what ends it, if anything.
        bare: a section may also begin the answer without a marker. Its names must be those of the request's tools, or
            an answer that happens to be JSON would be a call.
        layouts: of a call. JSON and PYTHON are told by their brackets, others by being the only one left.
        call_begin, call_end: around each call, where there is something. name_ends: what follows a NAMED call's name.
        arguments: what a JSON call's arguments are called. listed: JSON calls come as a list.
        separator: what may stand between calls, beside white space.
        signs: texts of a chat template, one of which tells the format. The first row that has one is taken.
        id_length: of ids, where templates want them of a fixed length; 0: OpenAI's form.
    """

    name: str
    begins: tuple[str, ...]
    end: str
    layouts: tuple[Layout, ...]
    signs: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    bare: bool = False
    call_begin: str = ""
    call_end: str = ""
    name_ends: tuple[str, ...] = ()
    arguments: str = "arguments"
    listed: bool = False
    separator: str = ""
    id_length: int = 0

    @property
    def markers(self) -> tuple[str, ...]:
        """Every marker, for telling which special tokens the parser must see."""
        ends = tuple(marker.strip() for marker in self.name_ends)
        return tuple(m for m in (*self.begins, self.end, self.call_begin, self.call_end, *ends) if m)


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model writes its reasoning, before everything else.

    Attributes:
        implied: the model may leave the opening marker out; unless the prompt closes the reasoning, it has begun.
    """

    name: str
    begin: str
    end: str
    aliases: tuple[str, ...] = ()
    implied: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Both markers."""
        return self.begin, self.end


_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_SEPARATOR = "<｜tool▁sep｜>"

TOOL_FORMATS = (
    ToolFormat(
        "deepseek_v3",
        begins=_DEEPSEEK[:1],
        end=_DEEPSEEK[1],
        layouts=(Layout.NAMED,),
        signs=("```json",),
        call_begin=f"{_DEEPSEEK[2]}function{_SEPARATOR}",
        name_ends=("\n```json\n",),
        call_end=f"```{_DEEPSEEK[3]}",
    ),
    ToolFormat(
        "deepseek_v31",
        begins=_DEEPSEEK[:1],
        end=_DEEPSEEK[1],
        layouts=(Layout.NAMED,),
        signs=(_DEEPSEEK[0],),
        call_begin=_DEEPSEEK[2],
        name_ends=(_SEPARATOR,),
        call_end=_DEEPSEEK[3],
    ),
    ToolFormat(
        "qwen3_coder",
        begins=("<tool_call>",),
        end="</tool_call>",
        layouts=(Layout.TAGGED,),
        signs=("<function=",),
        aliases=("qwen3_xml",),
        call_begin="<function=",
        call_end="</function>",
    ),
    ToolFormat(
        "hermes",
        begins=("<tool_call>",),
        end="</tool_call>",
        layouts=(Layout.JSON,),
        signs=("<tool_call>",),
    ),
    ToolFormat(
        "mistral",
        begins=("[TOOL_CALLS]",),
        end="",
        layouts=(Layout.JSON, Layout.NAMED),
        signs=("[TOOL_CALLS]",),
        listed=True,
        name_ends=("[ARGS]", "[CALL_ID]"),
        separator=",",
        id_length=9,
    ),
    ToolFormat(
        "granite",
        begins=("<|tool_call|>",),
        end="",
        layouts=(Layout.JSON,),
        signs=("<|tool_call|>",),
        listed=True,
        separator=",",
    ),
    ToolFormat(
        "jamba",
        begins=("<tool_calls>",),
        end="</tool_calls>",
        layouts=(Layout.JSON,),
        signs=("<tool_calls>",),
        listed=True,
        aliases=("minimax",),
        separator=",",
    ),
    ToolFormat(
        "phi4_mini_json",
        begins=("functools",),
        end="",
        layouts=(Layout.JSON,),
        signs=("functools[",),
        listed=True,
        separator=",",
    ),
    ToolFormat(
        "pythonic",
        begins=("<|python_start|>",),
        end="<|python_end|>",
        layouts=(Layout.PYTHON,),
        signs=("func_name1(", "<|python_start|>"),
        aliases=("llama4_pythonic", "llama3_pythonic"),
        bare=True,
        separator=",",
    ),
    ToolFormat(
        "llama3_json",
        begins=("<|python_tag|>",),
        end="",
        layouts=(Layout.JSON,),
        signs=("<|python_tag|>", '"parameters"'),
        arguments="parameters",
        aliases=("llama4_json",),
        bare=True,
        separator=";",
    ),
    ToolFormat(
        "json",
        begins=(),
        end="",
        layouts=(Layout.JSON,),
        signs=(),
        bare=True,
        separator=",",
    ),
)

REASONING_FORMATS = (
    ReasoningFormat("deepseek_r1", "<think>", "</think>", implied=True),
    ReasoningFormat("qwen3", "<think>", "</think>", aliases=("deepseek_v3", "glm45", "hunyuan_a13b", "holo2")),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("granite", "Here is my thought process:", "Here is my response:"),
)

_Row = TypeVar("_Row", bound=ToolFormat | ReasoningFormat)


def tool_format(name: str) -> ToolFormat:
    """The row of a name or alias.

    Raises:
        UsageError: there is none; all names are given.
    """
    return _row(TOOL_FORMATS, name, "tool_call_parser")


def reasoning_format(name: str) -> ReasoningFormat:
    """The row of a name or alias.

    Raises:
        UsageError: there is none; all names are given.
    """
    return _row(REASONING_FORMATS, name, "reasoning_parser")


def tool_format_of(template: str) -> ToolFormat | None:
    """The row that a chat template's source shows; None when it shows none."""
    return next((row for row in TOOL_FORMATS if any(sign in template for sign in row.signs)), None)


def _row(rows: Sequence[_Row], name: str, param: str) -> _Row:
    for row in rows:
        if name == row.name or name in row.aliases:
            return row
    known = ", ".join(sorted(spelt for each in rows for spelt in (each.name, *each.aliases)))
    raise UsageError(f"--{param.replace('_', '-')}: expected one of {known}, found '{name}'", param=param)
