"""A fake runtime whose next token depends on the adapter that lies in a slice's slot, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, cast

from engine.fake_runtime import FakeRuntime, _Pending

from llmctl.checkpoint.adapters.adapter import Adapter
from llmctl.engine.step import SequenceSlice
from llmctl.errors import ModelNotFoundError


class AdapterRuntime(FakeRuntime):
    """Slots are filled in the order of steps, as a device would.

    Attributes:
        puts: (slot, adapter), as they came.
    """

    def __init__(self, slots: int, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.slots: list[str | None] = [None] * slots
        self.puts: list[tuple[int, str]] = []
        self.adapters = self  # type: ignore[assignment]

    def prepare(self, adapter: Adapter) -> str:
        return adapter.digest

    def put(self, slot: int, prepared: str) -> None:
        self.puts.append((slot, prepared))
        self.queue.append(cast(_Pending, _Put(self, slot, prepared)))

    def run_until(self, pending: _Pending) -> None:
        while pending.value is None:
            current = self.queue[0]
            if isinstance(current, _Put):
                self.queue.popleft()
                self.slots[current.slot] = current.prepared
            else:
                super().run_until(cast(_Pending, current))

    def _tokens(self, piece: SequenceSlice) -> Sequence[int]:
        name = None if piece.adapter < 0 else self.slots[piece.adapter]
        assert piece.adapter < 0 or name is not None, "an empty slot"
        return cast(Sequence[int], [(token, name) for token in super()._tokens(piece)])


class _Put:
    def __init__(self, runtime: AdapterRuntime, slot: int, prepared: str) -> None:
        self.runtime, self.slot, self.prepared = runtime, slot, prepared


class Reader(Executor):
    """Reads in place of a thread, when told to; an adapter's digest is its folder's name."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.broken: set[str] = set()
        self.gone: set[str] = set()

    def submit(self, work: Callable[..., Any], /, *arguments: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: work(*arguments)))
        return future

    def read(self, folder: Path) -> Adapter:
        if folder.name in self.broken:
            raise ValueError("broken")
        if folder.name in self.gone:
            raise ModelNotFoundError(f"{folder}: no adapter_config.json")
        return Adapter(folder, (), digest=folder.name)

    def work(self, count: int = 100) -> None:
        """Read so many of those that wait."""
        for _ in range(min(count, len(self.waiting))):
            future, work = self.waiting.pop(0)
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
