"""Adapters in the host's memory, as a runtime takes them: read by a thread beside the engine's steps, kept by use."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.engine.step import AdapterHost, LoraLimits
from llmctl.errors import (
    AdapterUnavailableError,
    CheckpointError,
    HostMemoryError,
    LlmctlError,
    ModelNotFoundError,
    resource_error,
)

if TYPE_CHECKING:
    from llmctl.checkpoint.adapters.adapter import Adapter

log = logging.getLogger("llmctl.engine")


@dataclass(frozen=True)
class ReadAdapter:
    """What reading an adapter came to.

    Attributes:
        name: under which it was asked for; "": again, by its id.
        adapter_id: of what was asked for, or of what was found. found: None with an ``error``.
    """

    name: str
    adapter_id: str
    found: Adapter | None
    error: LlmctlError | None = None


@dataclass(frozen=True)
class _ToRead:
    name: str
    adapter_id: str
    path: Path


class AdapterCache:
    """At most ``limits.cached`` adapters, and one that is being read.

    Attributes:
        claimed: the adapters that must stay, which are no more than ``limits.slots``. wanted: whether a request runs
            with an adapter, or waits for it.
        wake: called from another thread when one has been read.

    Args:
        host: prepares them. read: an adapter of a folder, checked. reader: where that is done, one after the other;
            None: in a thread of its own.
    """

    def __init__(
        self, limits: LoraLimits, host: AdapterHost, read: Callable[[Path], Adapter], reader: Executor | None = None
    ) -> None:
        self.limits, self.host = limits, host
        self.claimed: Callable[[], Collection[str]] = frozenset
        self.wanted: Callable[[str], bool] = lambda _: False
        self.wake: Callable[[], None] = lambda: None
        self._read = read
        self._reader = reader or ThreadPoolExecutor(1, "adapters")
        self._paths: dict[str, Path] = {}
        self._prepared: OrderedDict[str, Any] = OrderedDict()  # the one that was used longest ago first
        self._queue: deque[_ToRead] = deque()
        self._reading: Future[tuple[Adapter, Any]] | None = None  # the first of the queue
        self._forgotten: set[str] = set()

    def __contains__(self, adapter_id: object) -> bool:
        """Whether an adapter is known, and not to be forgotten."""
        return adapter_id in self._paths and adapter_id not in self._forgotten

    def __len__(self) -> int:
        """Adapters in memory."""
        return len(self._prepared)

    def __getitem__(self, adapter_id: str) -> Any:
        """An adapter that is ready, as the runtime prepared it."""
        return self._prepared[adapter_id]

    def load(self, name: str, path: Path) -> None:
        """Read an adapter for the first time; ``take`` tells what came of it."""
        self._submit(name, "", path)

    def know(self, adapter_id: str, path: Path) -> None:
        """Take note of an adapter that was read before; it is read again when it is wanted."""
        self._paths[adapter_id] = path
        self._forgotten.discard(adapter_id)

    def forget(self, adapter_id: str) -> None:
        """Take no more requests for an adapter, and drop it once those that it has are done."""
        self._forgotten.add(adapter_id)
        self._drop_forgotten()

    def _drop_forgotten(self) -> None:
        for gone in [each for each in self._forgotten if not self.wanted(each)]:
            self._forgotten.discard(gone)
            self._paths.pop(gone, None)
            self._prepared.pop(gone, None)

    def ready(self, adapter_id: str) -> bool:
        """Part of ``AdapterSource``."""
        if adapter_id in self._prepared:
            self._prepared.move_to_end(adapter_id)
            return True
        if all(asked.adapter_id != adapter_id for asked in self._queue):
            self._submit("", adapter_id, self._paths[adapter_id])
        return False

    def take(self) -> Iterator[ReadAdapter]:
        """What has been read since the last time; adapters that are in memory now, or the reasons why they are not."""
        if self._forgotten:
            self._drop_forgotten()
        while self._reading is not None and self._reading.done():
            read = self._taken(self._queue.popleft(), self._reading)
            self._reading = None
            self._begin()
            yield read

    def close(self) -> None:
        """Read nothing more."""
        self._reader.shutdown(cancel_futures=True)

    def _submit(self, name: str, adapter_id: str, path: Path) -> None:
        self._queue.append(_ToRead(name, adapter_id, path))
        self._begin()

    def _begin(self) -> None:
        """Read the next one, if none is being read: what is read and not taken yet is in memory, too."""
        if self._reading is None and self._queue:
            self._reading = self._reader.submit(self._prepare, self._queue[0].path)
            self._reading.add_done_callback(lambda _: self.wake())

    def _prepare(self, path: Path) -> tuple[Adapter, Any]:
        adapter = self._read(path)
        return adapter, self.host.prepare(adapter)

    def _taken(self, asked: _ToRead, result: Future[tuple[Adapter, Any]]) -> ReadAdapter:
        problem = result.exception()
        if problem is not None:
            error = _as_error(asked.path, problem)
            if asked.adapter_id:
                error = _not_again(asked.path, error)
            return ReadAdapter(asked.name, asked.adapter_id, None, error)
        adapter, prepared = result.result()
        if asked.adapter_id and adapter.digest != asked.adapter_id:
            error = AdapterUnavailableError(
                f"adapter {asked.path}: its files have changed since it was loaded", fix=_AGAIN
            )
            return ReadAdapter(asked.name, asked.adapter_id, None, error)
        if not asked.adapter_id:
            self.know(adapter.digest, asked.path)
        self._prepared[adapter.digest] = prepared
        self._prepared.move_to_end(adapter.digest)
        self._shrink(adapter.digest)
        return ReadAdapter(asked.name, adapter.digest, adapter)

    def _shrink(self, newest: str) -> None:
        claimed = self.claimed()
        for adapter_id in list(self._prepared):
            if len(self._prepared) <= self.limits.cached:
                return
            if adapter_id not in claimed and adapter_id != newest:
                del self._prepared[adapter_id]


_AGAIN = "put its old files back, or load it again with load_inplace"


def _not_again(path: Path, error: LlmctlError) -> LlmctlError:
    """Why an adapter that was read before cannot be now: no fault of the request, nor one inside the server."""
    if isinstance(error, HostMemoryError):
        return error
    if isinstance(error, ModelNotFoundError):
        return ModelNotFoundError(f"adapter {path}: its files are gone since it was loaded", fix=_AGAIN, param="model")
    return AdapterUnavailableError(error.message, fix=error.fix or _AGAIN)


def _as_error(path: Path, problem: BaseException) -> LlmctlError:
    """No file is to be the worker's end."""
    if isinstance(problem, LlmctlError):
        return problem
    if (spent := resource_error(problem)) is not None:
        return spent
    log.error("adapter %s cannot be read", path, exc_info=problem)
    return CheckpointError(f"adapter {path}: cannot be read: {type(problem).__name__}: {problem}")
