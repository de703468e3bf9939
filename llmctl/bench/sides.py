"""The two sides of a comparison: a server somewhere, or one that is started here for as long as it is measured."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from llmctl.bench import local_server
from llmctl.bench.config import BenchCompareConfig
from llmctl.bench.endpoint import make_endpoint
from llmctl.bench.environment import without_secrets
from llmctl.errors import UsageError

Tell = Callable[[str], None]


class Side(Protocol):
    """One of the two.

    Attributes:
        shown: as a person knows it. model: what is served, where that is on this machine; None of a URL.
        api_key: sent to it.
    """

    @property
    def shown(self) -> str: ...

    @property
    def model(self) -> str | None: ...

    @property
    def api_key(self) -> str | None: ...

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
    api_key: str | None = None

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

    @property
    def api_key(self) -> str | None:
        """It has none: nobody else knows its address."""
        return None

    @contextlib.contextmanager
    def opened(self, ready_timeout: float, tell: Tell) -> Iterator[str]:
        """The address of the server started."""
        with local_server.serving(self.served, self.options, ready_timeout=ready_timeout, tell=tell) as server:
            yield server.url


def parse_sides(config: BenchCompareConfig) -> tuple[Side, Side]:
    """A and B, as the options have them.

    Raises:
        UsageError: see ``_parse_side``; or one key for two hosts.
    """
    a = _parse_side(config.a, config.a_args, "a", config.a_api_key, config.api_key)
    b = _parse_side(config.b, config.b_args, "b", config.b_api_key, config.api_key)
    hosts = [urlsplit(side.url).hostname for side in (a, b) if isinstance(side, UrlSide)]
    if config.api_key and len(set(hosts)) == 2 and None in (config.a_api_key, config.b_api_key):
        raise UsageError(
            f"--api-key (or OPENAI_API_KEY): would be sent to two hosts, {' and '.join(map(str, hosts))}",
            fix="--a-api-key KEY and --b-api-key KEY, '' for none",
            param="api_key",
        )
    return a, b


def _parse_side(text: str, arguments: str, name: str, own_key: str | None, key: str | None) -> Side:
    """``--a``/``--b`` and their ``--a-args``/``--b-args``; ``name`` is a or b.

    Raises:
        UsageError: nothing given, no URL, options for one, or a key or options of the address for a model.
    """
    if not text:
        raise UsageError(f"--{name}: expected a server's URL, an engine or a model", param=name)
    if text.startswith(("http://", "https://")):
        if arguments:
            raise UsageError(f"--{name}-args: {text} is not started here", param=f"{name}_args")
        key = own_key if own_key is not None else key
        make_endpoint(text, None, None, key, (), True)  # refused here
        return UrlSide(text, key)
    if own_key:
        raise UsageError(f"--{name}-api-key: {text} is started here, without a key", param=f"{name}_api_key")
    path = Path(text).expanduser()
    if text.startswith((".", "/", "~")) and not path.exists():
        raise UsageError(f"--{name}: no such file or folder: {text}", param=name)
    options = local_server.split_options(arguments, f"{name}_args")
    local_server.serve_command(text, options)
    return EngineSide(text, options)
