"""A request's body, as one of the models of ``protocol``."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError

from llmctl.errors import RequestError
from llmctl.serving.first_fault import check_first_fault
from llmctl.serving.openai_errors import from_validation_error
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import ApiModel

log = logging.getLogger("llmctl.serving")

Body = TypeVar("Body", bound=ApiModel)

MOST_FIELDS_SHOWN, MOST_NAME_SHOWN = 20, 80  # in the log, of those that a request has and no one knows


async def parse(request: Request, model: type[Body], check: Callable[[Outline], None]) -> Body:
    """The request's body as ``model``. ``check`` is given its outline before, and may refuse it.

    Raises:
        RequestError: not JSON, wrong types, missing fields.
    """
    data = await request.body()
    outline = Outline(data)
    check(outline)
    return parsed(data, outline, model)


def parsed(data: bytes, outline: Outline, model: type[Body]) -> Body:
    """A body as ``model``.

    Raises:
        RequestError: not JSON, wrong types, missing fields.
    """
    check_first_fault(outline, model)
    try:
        with _no_collection():
            body = model.model_validate_json(data)
    except ValidationError as error:
        raise from_validation_error(error, model.expected) from None
    if outline.problem is not None:  # NaN and Infinity, which pydantic reads: nothing of this body has been counted
        raise RequestError(f"the request body is not valid JSON: {outline.problem}")
    if body.model_extra:
        shown = ", ".join(map(_shown, islice(body.model_extra, MOST_FIELDS_SHOWN)))
        log.debug("ignored %d unknown request fields: %s", len(body.model_extra), shown)
    return body


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """The garbage collector is not run for what is made meanwhile, which is nowhere in a cycle: with many small
    objects that would take as long as to make them."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _shown(name: str) -> str:
    """A client's word on one line of a log; whole or not at all, for a part of a key would not be found."""
    return name if len(name) <= MOST_NAME_SHOWN and name.isprintable() else f"[{len(name)} characters]"
