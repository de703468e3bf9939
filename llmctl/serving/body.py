"""A request's body, as one of the models of ``protocol``."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from llmctl.errors import RequestError
from llmctl.serving.context import context_of
from llmctl.serving.first_fault import CheckIds, check_first_fault, check_json
from llmctl.serving.openai_errors import from_validation_error
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import ApiModel

log = logging.getLogger("llmctl.serving")

Body = TypeVar("Body", bound=ApiModel)
_built = False  # all models

_BYTES_PER_TEXT = 32  # of a body, by the measure of ``TextWorkers``: to parse 128 KiB takes a few ms, a thread 0.3

_LONG_BYTES = 2**20
# Parsers do not let go of Python's lock: several long bodies at once would hold it in turns, and the event loop waits.
_ONE_AT_A_TIME = threading.Lock()

MOST_FIELDS_SHOWN, MOST_NAME_SHOWN = 20, 80  # in the log, of those that a request has and no one knows


async def parse(
    request: Request,
    model: type[Body],
    check: Callable[[Outline], None],
    check_scalars: Callable[[Body], object] = lambda _: None,
) -> Body:
    """The request's body as ``model``. ``check`` is given its outline before, and may refuse it, as may
    ``check_scalars``, which is given a body of its single values, if it is long.

    Raises:
        RequestError: not JSON, wrong types, missing fields. CapacityError: a long one, by its token ids.
        QueueFullError: too many long bodies are waiting.
    """
    data = await request.body()
    outline = Outline(data, model)
    check(outline)
    return await parse_outlined(request, data, outline, model, check_scalars)


async def parse_outlined(
    request: Request,
    data: bytes,
    outline: Outline,
    model: type[Body],
    check_scalars: Callable[[Body], object] = lambda _: None,
) -> Body:
    """The same of a body whose outline is checked; off the event loop, if it is large.

    Raises:
        RequestError: not JSON, wrong types, missing fields. CapacityError: a long one, by its token ids.
        QueueFullError: too many long bodies are waiting.
    """
    if not _built:
        await build_models()
    loaded = context_of(request).loaded
    if loaded is None:
        return parsed(data, outline, model, check_scalars)
    size, check_ids = len(data) // _BYTES_PER_TEXT, loaded.intake.check_ids

    def work() -> Body:
        with _ONE_AT_A_TIME if len(data) > _LONG_BYTES else contextlib.nullcontext():
            return parsed(data, outline, model, check_scalars, check_ids)

    return await loaded.intake.workers.run(size, work)


def parsed(
    data: bytes,
    outline: Outline,
    model: type[Body],
    check_scalars: Callable[[Body], object] = lambda _: None,
    check_ids: CheckIds = lambda *_: None,
) -> Body:
    """A body as ``model``.

    Raises:
        RequestError: not JSON, wrong types, missing fields. CapacityError: a long one, by ``check_ids``.
    """
    if outline.problem is not None:
        check_json(data, outline.problem, model)
    else:
        check_first_fault(outline, model, check_scalars, check_ids)
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


async def build_models() -> None:
    """Make what validates bodies, model by model, on the event loop: two threads must not make the same one, and bodies
    are validated in threads."""
    global _built
    for model in models():
        if not model.__pydantic_complete__:
            model.model_rebuild()
            await asyncio.sleep(0)
    _built = True


def models(base: type[ApiModel] = ApiModel) -> Iterator[type[ApiModel]]:
    """All request bodies and what they are made of, as far as their modules are imported."""
    for model in base.__subclasses__():
        yield model
        yield from models(model)


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
