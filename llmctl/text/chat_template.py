"""Chat templates: a conversation rendered to a prompt by the model's own jinja2 template, sandboxed.

Same environment and helpers as transformers', so that templates made for it render to the same text. A template comes
with a downloaded model and is untrusted: it runs in jinja2's immutable sandbox, can reach no Python internals, and is
stopped when it takes too many steps or makes too much text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from llmctl.errors import CheckpointError, RequestError
from llmctl.text.template_budget import Budget, TemplateLimitError, begin
from llmctl.text.template_sandbox import BudgetedEnvironment

_SCALARS = (str, int, float)
_ARRAYS = (list, tuple)


class ChatTemplate:
    """One compiled template.

    Args:
        source: jinja2 source. special_tokens: bos_token, eos_token, … visible to the template.

    Raises:
        CheckpointError: the source is not valid jinja2.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        begin()  # what is constant is computed now
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise _not_compiled(f"line {error.lineno}: {' '.join(str(error.message).split())}") from error
        except (RecursionError, MemoryError, SyntaxError) as error:  # jinja2's parser, or Python's of what jinja2 wrote
            raise _not_compiled("nested too deeply") from error

    def render(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation. Encode it without adding special tokens: the template writes its own.

        Args:
            messages: ``{"role": …, "content": …}`` mappings, plain JSON data. tools: JSON schemas of functions.
            add_generation_prompt: open the assistant's turn. kwargs: further template variables.

        Raises:
            RequestError: the template refuses these messages (its own words are given), fails on them, or takes more
                steps or makes more text than it may.
        """
        budget = begin()
        variables = {
            **self._special_tokens,
            **_plain(kwargs, budget),
            "messages": _plain(list(messages), budget),
            "tools": _plain(list(tools), budget) if tools is not None else None,
            "documents": _plain(kwargs.get("documents"), budget),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(variables)
        except TemplateLimitError as error:
            fix = "send less, or give the server another with --chat-template FILE"
            raise RequestError(f"chat template: it {error}", fix=fix, param="messages") from error
        except Exception as error:  # an untrusted program on a user's data: whatever it raises is about this request
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"chat template: {reason}", param="messages") from error


def _not_compiled(reason: str) -> CheckpointError:
    return CheckpointError(
        f"chat template: {reason}", fix="mend the template or give another with --chat-template FILE"
    )


def _plain(value: Any, budget: Budget) -> Any:
    """A copy of JSON-like data made of plain dicts and lists, so that a template can reach no richer object.

    Raises:
        RequestError: something that is not JSON data.
    """
    kind = type(value)
    if kind is str or value is None or isinstance(value, _SCALARS):
        return value
    if kind is dict or isinstance(value, Mapping):
        made: Any = {str(k): v if type(v) is str else _plain(v, budget) for k, v in value.items()}
    elif isinstance(value, _ARRAYS):
        made = [_plain(v, budget) for v in value]
    else:
        raise RequestError(f"chat template: expected JSON data, found {kind.__name__}", param="messages")
    budget.plain.add(id(made))
    return made


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """Stands in for ``dict``: the class itself would hand a template its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As ``dict.fromkeys``."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """jinja2's ``namespace`` without underscore names, which would shadow Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute cannot start with an underscore: {name!r}")


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}``, with which training templates mark assistant text: its body is kept."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads it from the class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> BudgetedEnvironment:
    environment = BudgetedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    environment.seal()
    return environment
