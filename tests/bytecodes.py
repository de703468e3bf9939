"""Work counted in bytecodes: the same on every machine, and it sees every loop that Python itself runs."""

from __future__ import annotations

import gc
import sys
from types import FrameType, TracebackType
from typing import Any


class Bytecodes:
    """Counts what this thread executes inside its ``with`` block, in frames that begin there.

    No garbage is collected meanwhile: it comes when it comes, and what is called back then (Hypothesis times it) would
    count.
    """

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Bytecodes:
        self._collects, self._outer = gc.isenabled(), sys.gettrace()
        gc.disable()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        sys.settrace(self._outer)
        if self._collects:
            gc.enable()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.count += event == "opcode"
        return self._trace
