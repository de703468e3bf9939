"""What a server can do with tools and reasoning, and what one request asks of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmctl.errors import RequestError
from llmctl.serving.final_message import continued_text
from llmctl.serving.protocol import ChatCompletionRequest, ChatRequest, FunctionName, Tool
from llmctl.serving.structured_fields import grammar_of
from llmctl.serving.tools import generic_prompt
from llmctl.serving.tools.enforced import calls_grammar
from llmctl.serving.tools.held import held_calls, why_not_held
from llmctl.serving.tools.thinking import after_thinking, standing
from llmctl.serving.tools.traits import TemplateTraits
from llmctl.structured.spec import GrammarSpec
from llmctl.text.chat_template import ChatTemplate
from llmctl.text.output_parser.formats import (
    ReasoningFormat,
    ToolFormat,
    reasoning_format,
    tool_format,
    tool_format_of,
)
from llmctl.text.output_parser.parser import OutputParser, Tools
from llmctl.text.tokenizer import Tokenizer

log = logging.getLogger("llmctl.serving")

TOOL_TEMPLATES = ("model", "generic")
_UNSEEN = "tools: this model's chat template does not show them to the model; --tool-template generic does"
_NOT_STRICT = "tools: strict is enforced only where tool_choice demands a call: "
_OTHER_GRAMMAR = "the answer is to match something else"


@dataclass
class ToolSupport:
    """Of one server.

    Attributes:
        row: how the model writes tool calls. reasoning: how it writes reasoning; None: that is content.
        traits: of the chat template. generic: tools are shown by a built-in prompt instead.
        tool_markers, reasoning_markers: special tokens that the parser must see, ids by their texts.
        reasoning_opener: the token that is the marker of its beginning; None: it takes several.
    """

    row: ToolFormat = field(default_factory=lambda: tool_format("json"))
    reasoning: ReasoningFormat | None = None
    traits: TemplateTraits = field(default_factory=TemplateTraits)
    generic: bool = False
    tool_markers: Mapping[str, int] = field(default_factory=dict)
    reasoning_markers: Mapping[str, int] = field(default_factory=dict)
    reasoning_opener: int | None = None
    _warned: bool = False

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
        tool_template: str = "model",
    ) -> ToolSupport:
        """The support of a model, by names of parsers or, without, by its template's text.

        Raises:
            UsageError: a name that is none.
        """
        generic = tool_template == "generic"
        if tool_call_parser is None and generic:
            tool_call_parser = generic_prompt.ROW
        found = None if template is None else tool_format_of(template.source)
        row = tool_format(tool_call_parser) if tool_call_parser else found or tool_format("json")
        reasoning = None if reasoning_parser is None else reasoning_format(reasoning_parser)
        return cls(
            row,
            reasoning,
            TemplateTraits() if template is None else TemplateTraits.of(template),
            generic,
            _special_ids(tokenizer, row.markers),
            _special_ids(tokenizer, reasoning.markers if reasoning else ()),
            tokenizer.token_to_id(reasoning.begin) if reasoning else None,
        )

    def tools_shown(self, body: ChatRequest) -> list[dict[str, Any]] | None:
        """The request's tools as templates take them."""
        return [tool.model_dump(exclude_unset=True) for tool in given_tools(body)] or None

    def use(self, body: ChatCompletionRequest) -> ToolUse:
        """What a request asks for.

        Raises:
            RequestError: it contradicts itself, or cannot be honoured.
        """
        tools = given_tools(body)
        param, wanted = _choice(body, [tool.function.name for tool in tools])
        continued = continued_text(body)
        if wanted == "none":
            return ToolUse(self, None, continued=continued)
        named = [tool for tool in tools if not isinstance(wanted, str) and tool.function.name == wanted[0]]
        legacy = bool(body.functions)
        single = legacy or bool(named) or body.parallel_tool_calls is False
        grammar = None if wanted == "auto" else calls_grammar(named or tools, param, single=single)
        schemas = {tool.function.name: _properties(tool) for tool in tools}
        use = ToolUse(self, schemas, legacy=legacy, single=single, grammar=grammar, continued=continued)
        if grammar is not None or not any(tool.function.strict for tool in tools):
            return use
        loose = why_not_held(self.row) or (_OTHER_GRAMMAR if grammar_of(body) is not None else None)
        return replace(use, loose=loose) if loose else replace(use, held=tuple(tools))

    def warning(self, body: ChatRequest, use: ToolUse) -> str | None:
        """What the client should know of its tools, on one line."""
        tools = given_tools(body)
        if not tools:
            return None
        said = []
        if not self.generic and not self.traits.shows_tools:
            said.append(_UNSEEN)
            if not self._warned:
                self._warned = True
                log.warning("%s", _UNSEEN)
        if use.loose is not None:
            said.append(_NOT_STRICT + use.loose)
        return "; ".join(said) or None


@dataclass(frozen=True)
class ToolUse:
    """Of one request.

    Attributes:
        tools: functions that may be called; None: none, and calls are not looked for.
        legacy: asked with ``functions``, and answered with ``function_call``. single: only the first call counts.
        grammar: of the calls that must be made, which are then the whole answer after the reasoning.
        held: all tools, if those calls are held to them that may be made. loose: why they are not, though tools are
            strict.
        continued: the text of the chat's last message, if the answer goes on with it.
    """

    support: ToolSupport
    tools: Tools | None
    legacy: bool = False
    single: bool = False
    grammar: GrammarSpec | None = None
    held: tuple[Tool, ...] = ()
    loose: str | None = None
    continued: str | None = None

    @property
    def markers(self) -> tuple[int, ...]:
        """Special tokens that must not be left out of the text."""
        calls = self.support.tool_markers.values() if self.tools is not None and self.grammar is None else ()
        return (*calls, *self.support.reasoning_markers.values())

    def answer_grammar(self, given: GrammarSpec | None, prompt: str | None) -> GrammarSpec | None:
        """What an answer to a prompt is held to: ``given``, after its reasoning; or text in which calls are held to the
        tools; None: nothing.

        Raises:
            RequestError: the tools' schemas are too long.
        """
        support, reasoning = self.support, self.support.reasoning
        begun, closed = self._reasoning_in(prompt)
        if closed:
            reasoning = None
        if not self.held:
            if given is None or reasoning is None:
                return given
            begun = begun or reasoning.implied
            markers, opener = support.reasoning_markers, support.reasoning_opener
            return after_thinking(given, reasoning, markers, begun=begun, opener=opener)
        return held_calls(
            support.row,
            self.held,
            "functions" if self.legacy else "tools",
            single=self.single,
            special_ids={**support.tool_markers, **support.reasoning_markers},
            reasoning=reasoning,
            begun=begun,
        )

    def parser(self, prompt: str | None) -> OutputParser | None:
        """A parser of one answer to a prompt; None where there is nothing to take apart."""
        row, reasoning = self.support.row, self.support.reasoning
        if self.grammar is not None:
            row = tool_format("json")
        elif self.tools is None and reasoning is None:
            return None
        begun, closed = self._reasoning_in(prompt)
        return OutputParser(row, self.tools, reasoning, begun=begun, closed=closed)

    def _reasoning_in(self, prompt: str | None) -> tuple[bool, bool]:
        """Whether the answer's reasoning has begun before the answer to a prompt, and whether it is over."""
        reasoning = self.support.reasoning
        return (False, False) if reasoning is None else standing(reasoning, prompt or "", self.continued)


def given_tools(body: ChatRequest) -> list[Tool]:
    """The request's tools, the deprecated ``functions`` among them."""
    functions = body.functions if isinstance(body, ChatCompletionRequest) else None
    return body.tools or [Tool(type="function", function=function) for function in functions or ()]


def _choice(body: ChatCompletionRequest, names: list[str]) -> tuple[str, str | tuple[str]]:
    """The field that says what may be called, and ``none``, ``auto``, ``required``, or a name (alone in a tuple)."""
    if body.tools and body.functions:
        raise RequestError("functions: expected tools or functions, found both", param="functions")
    param = "function_call" if body.tool_choice is None and body.function_call is not None else "tool_choice"
    wanted = getattr(body, param)
    if wanted is None:
        return param, "auto" if names else "none"
    if wanted != "none" and not names:
        needed = "functions" if param == "function_call" else "tools"
        raise RequestError(f"{param}: only with {needed}", param=param)
    if isinstance(wanted, str):
        return param, wanted
    name = wanted.name if isinstance(wanted, FunctionName) else wanted.function.name
    if name not in names:
        raise RequestError(f"{param}: expected one of the request's tools, found '{name[:80]}'", param=param)
    return param, (name,)


def _properties(tool: Tool) -> Mapping[str, Any]:
    found = (tool.function.parameters or {}).get("properties")
    return found if isinstance(found, dict) else {}


def _special_ids(tokenizer: Tokenizer, markers: tuple[str, ...]) -> dict[str, int]:
    """Special tokens that markers are made of: ids by their texts."""
    spelt = {i: tokenizer.id_to_token(i) for i in sorted(tokenizer.special_token_ids)}
    return {text: i for i, text in spelt.items() if text and any(text in marker for marker in markers)}
