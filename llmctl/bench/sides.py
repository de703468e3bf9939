"""The two sides of a comparison: a server somewhere, or one that is started here for as long as it is measured."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from llmctl.bench import local_server
from llmctl.bench.environment import without_secrets
from llmctl.errors import UsageError

Tell = Callable[[str], None]


class Side(Protocol):
    """One of the two.

    Attributes:
        shown: as a person knows it. model: what is served, where that is on this machine; None of a URL.
    """

    @property
    def shown(self) -> str: ...

    @property
    def model(self) -> str | None: ...

    def opened(self, ready_timeout: float, tell: Tell) -> contextlib.AbstractContextManager[str]:
        """Its address, which serves until the context ends.

        Raises:
            ServerError: one that is started here does not get ready in time, or dies.
        """
        ...


@dataclass(frozen=True)
class UrlSide:
    """A server that somebody else started, and that stays as it is."""

    url: str

    @property
    def shown(self) -> str:
        """The address."""
        return self.url

    @property
    def model(self) -> str | None:
        """Nobody knows."""
        return None

    @contextlib.contextmanager
    def opened(self, ready_timeout: float, tell: Tell) -> Iterator[str]:  # noqa: ARG002
        """The address."""
        yield self.url


@dataclass(frozen=True)
class EngineSide:
    """``llmctl serve --model MODEL OPTIONS``, started anew whenever it is opened."""

    served: str
    options: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The model, and the options that it is served with."""
        return shlex.join(without_secrets([self.served, *self.options]))

    @property
    def model(self) -> str | None:
        """What is served."""
        return self.served

    @contextlib.contextmanager
    def opened(self, ready_timeout: float, tell: Tell) -> Iterator[str]:
        """The address of the server started."""
        with local_server.serving(self.served, self.options, ready_timeout=ready_timeout, tell=tell) as server:
            yield server.url


def parse_side(text: str, arguments: str, name: str) -> Side:
    """``--a``/``--b`` and their ``--a-args``/``--b-args``; ``name`` is a or b.

    Raises:
        UsageError: nothing given, options for a URL, or options that decide the address.
    """
    if not text:
        raise UsageError(f"--{name}: expected a server's URL, an engine or a model", param=name)
    if text.startswith(("http://", "https://")):
        if arguments:
            raise UsageError(f"--{name}-args: {text} is not started here", param=f"{name}_args")
        return UrlSide(text)
    options = local_server.split_options(arguments, f"{name}_args")
    local_server.serve_command(text, options)
    return EngineSide(text, options)
