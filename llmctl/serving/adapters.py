"""The adapters that a server offers beside its model: loaded by the worker, chosen by name, known by their content."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmctl.errors import LlmctlError, ModelNotFoundError, PermissionDeniedError, RequestError, UsageError
from llmctl.serving.wire import AdapterLoaded, AdapterRefused, Command, ForgetAdapter, KnowAdapter, LoadAdapter

NAME = r"^[^\x00-\x1f\x7f-\x9f,]+$"
"""Of an adapter: it is printed, and stands in lists (``lora_requests_info``)."""
MOST_NAME = 256
"""Characters of one."""
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class AdapterModule:
    """What ``--lora-modules`` asks for. ``parent``: the model's name in answers about it; "": the served one's."""

    name: str
    path: Path
    parent: str = ""


@dataclass(frozen=True)
class ServedAdapter:
    """One adapter under one name.

    Attributes:
        id: of its content: the same for equal files, another for other weights under an old name.
        parent: as of ``AdapterModule``.
        created: seconds since 1970.
    """

    name: str
    id: str
    path: Path
    parent: str
    created: int


class Adapters:
    """The adapters of one server.

    Args:
        send: gives the worker a command.
    """

    def __init__(self, send: Callable[[Command], None]) -> None:
        self._send = send
        self._served: dict[str, ServedAdapter] = {}
        self._loading: dict[str, tuple[AdapterModule, asyncio.Future[ServedAdapter]]] = {}

    def __iter__(self) -> Iterator[ServedAdapter]:
        """Those that can be asked for, in the order in which they came."""
        return iter(self._served.values())

    def find(self, name: str | None) -> ServedAdapter | None:
        """The adapter of a name; None: there is none."""
        return None if name is None else self._served.get(name)

    async def load(self, module: AdapterModule) -> ServedAdapter:
        """Have an adapter read, and offer it; one that had its name is offered no more.

        Raises:
            LlmctlError: why it cannot be served.
        """
        if module.name in self._loading:
            raise RequestError(f"lora_name: '{module.name}' is being loaded", param="lora_name")
        future: asyncio.Future[ServedAdapter] = asyncio.get_running_loop().create_future()
        self._loading[module.name] = module, future
        self._send(LoadAdapter(module.name, str(module.path)))
        return await future

    def unload(self, name: str) -> ServedAdapter:
        """Offer an adapter no more; requests that it has are served. That adapter.

        Raises:
            ModelNotFoundError: there is none of this name.
        """
        adapter = self._served.pop(name, None)
        if adapter is None:
            raise ModelNotFoundError(f"lora_name: no adapter '{name}' is loaded", param="lora_name")
        self._forget(adapter)
        return adapter

    def _forget(self, adapter: ServedAdapter) -> None:
        """Tell the worker that an adapter is gone, or that what it shares with another is to be read from there."""
        other = next((other for other in self if other.id == adapter.id), None)
        self._send(ForgetAdapter(adapter.id) if other is None else _known(other))

    # What the worker says

    def on_event(self, event: AdapterLoaded | AdapterRefused) -> None:
        """Take in what came of a ``load``."""
        if event.name not in self._loading:  # given up by worker_lost
            return
        module, future = self._loading.pop(event.name)
        if isinstance(event, AdapterRefused):
            if not future.done():
                future.set_exception(event.error.error())
            return
        before = self._served.pop(event.name, None)
        adapter = ServedAdapter(event.name, event.adapter_id, module.path, module.parent, int(time.time()))
        self._served[event.name] = adapter
        self._send(_known(adapter))  # a ForgetAdapter of the same content may have crossed the event
        if before is not None:
            self._forget(before)
        if not future.done():
            future.set_result(adapter)

    def worker_lost(self, error: LlmctlError) -> None:
        """What was being loaded is not going to be."""
        loading, self._loading = self._loading, {}
        for _, future in loading.values():
            if not future.done():
                future.set_exception(error)

    def worker_back(self, others: Iterable[ServedAdapter]) -> None:
        """Tell a new worker which there are, and ``others`` that only have requests still."""
        for adapter in {adapter.id: adapter for adapter in (*others, *self)}.values():
            self._send(_known(adapter))


def _known(adapter: ServedAdapter) -> KnowAdapter:
    return KnowAdapter(adapter.id, str(adapter.path))


def shown_names(names: Sequence[str]) -> str:
    """Names in a line, but for the last of very many."""
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")


_NO_FOLDER = "lora_path: no folder of that name below --lora-dir (a relative path is taken from there)"


def path_below(folder: str, given: str) -> Path:
    """The folder that a request names, below ``--lora-dir``; a relative one is taken from there.

    Raises:
        PermissionDeniedError: the path leads out of it.
        ModelNotFoundError: there is no such folder.
    """
    root = Path(folder).resolve()
    try:
        path = (root / given).resolve()
        outside = not path.is_relative_to(root)
        missing = not outside and not path.is_dir()
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, a loop of links
        raise ModelNotFoundError(_NO_FOLDER, param="lora_path") from None
    if outside:
        raise PermissionDeniedError(
            "lora_path: expected a folder below --lora-dir, found one outside it", param="lora_path"
        )
    if missing:
        raise ModelNotFoundError(_NO_FOLDER, param="lora_path")
    return path


class _Spelt(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of ``--lora-modules`` as JSON, by vLLM's names."""

    name: str
    path: str
    base_model_name: str = ""


def parse_modules(given: Iterable[str], names: Iterable[str] = ()) -> tuple[AdapterModule, ...]:
    """The entries of ``--lora-modules``: ``name=path``, or JSON with ``name``, ``path`` and maybe ``base_model_name``.

    Args:
        names: of the model, which no adapter may have.

    Raises:
        UsageError.
    """
    found = tuple(map(_module, given))
    taken = set(names)
    for module in found:
        if module.name in taken:
            raise UsageError(
                f"--lora-modules: expected a name of its own for each adapter, found '{module.name}' twice",
                param="lora_modules",
            )
        taken.add(module.name)
        if not module.path.is_dir():
            raise UsageError(f"--lora-modules {module.name}={module.path}: no such folder", param="lora_modules")
    return found


def _module(text: str) -> AdapterModule:
    name, sign, path = text.partition("=")
    parent = ""
    if text.lstrip().startswith("{"):
        try:
            spelt = msgspec.json.decode(text, type=_Spelt)
        except ValueError as error:
            raise UsageError(f"--lora-modules: not a module: {error}", param="lora_modules") from None
        name, sign, path, parent = spelt.name, "=", spelt.path, spelt.base_model_name
    if not (name and sign and path):
        raise UsageError(
            f"--lora-modules: expected NAME=PATH, found '{text}'",
            fix=f"--lora-modules NAME={text}" if "=" not in text and text else "--lora-modules NAME=PATH",
            param="lora_modules",
        )
    if len(name) > MOST_NAME or not re.fullmatch(NAME, name):
        raise UsageError(
            f"--lora-modules: expected a name of at most {MOST_NAME} characters, printable and without commas, "
            f"found {name[:MOST_NAME]!r}",
            param="lora_modules",
        )
    return AdapterModule(name, Path(path).expanduser().resolve(), parent)
