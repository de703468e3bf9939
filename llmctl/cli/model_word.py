"""MODEL by place: ``llmctl build ./model`` beside ``llmctl build --model ./model``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from llmctl.cli.common import on_command_line
from llmctl.errors import UsageError

_Word = Annotated[str | None, typer.Argument(metavar="MODEL", help="The model, without --model.", show_default=False)]


def takes_word(ctx: typer.Context, word: str, named: str) -> bool:
    """Whether a word that stands where MODEL may is the model: it wins over a YAML file's, not over ``--model``.

    Args:
        named: the value of ``--model``, whose ever it is.
    """
    return word == named or not on_command_line(ctx, "model")


def with_model_word(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose ``--model`` may also stand without the option, where it wins over a YAML file's.

    Raises:
        UsageError: two models are named.
    """
    hints = get_type_hints(function, include_extras=True)
    own = inspect.signature(function).parameters
    takes_context = "ctx" in own

    @functools.wraps(function)
    def command(**values: Any) -> None:
        word = values.pop("model_word")
        ctx = values["ctx"] if takes_context else values.pop("ctx")
        if word is not None:
            named = values["model"]
            if not takes_word(ctx, word, named):
                raise UsageError(f"two models: '{word}' and --model '{named}'", fix="name one", param="model")
            values["model"] = word
        function(**values)

    del command.__wrapped__
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [each.replace(annotation=hints[name], kind=keyword) for name, each in own.items()]
    parameters.append(inspect.Parameter("model_word", keyword, default=None, annotation=_Word))
    if not takes_context:
        parameters.insert(0, inspect.Parameter("ctx", keyword, annotation=typer.Context))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
