"""Carries out the launcher's calls: under emulation, or on a GPU where ``kernels`` is replaced (tests/gpu)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from emulator import Buffer, kernels

from llmctl.targets.cuda import signatures as cuda_signatures
from llmctl.targets.cuda.call import Call, Pointer


class EmulatedMachine:
    """A ``call.Machine`` over tensors in host memory. A tensor that is part of a storage shares one buffer with
    all others of it."""

    def __init__(self, once: bool = False) -> None:
        """``once``: kernels run forwards only; what depends on the order of threads their own tests find."""
        self.launched: list[str] = []
        self._once = once

    def call_torch(self, function: Any, *arguments: Any, **named: Any) -> None:
        """Run an operator of torch."""
        function(*arguments, **named)

    def prepared(self, call: Call) -> Any:
        """What runs a call."""
        return lambda: self.launch(call)

    def launch(self, call: Call) -> None:
        """Run a call; raises EmulationError."""
        if call.empty:
            return
        self.launched.append(call.entry)
        g = call.geometry
        kernels(call.source).launch(call.entry, g.grid, g.threads, buffers(call), g.shared, self._once)


def buffers(call: Call) -> list[Any]:
    """A call's arguments as the emulator takes them."""
    pointers = [a for a in call.arguments if isinstance(a, Pointer)]
    whole: dict[int, tuple[torch.Tensor, set[str], bool]] = {}
    for pointer in pointers:
        storage = pointer.tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in whole:
            whole[key] = (torch.empty(0, dtype=torch.uint8).set_(storage), set(), True)
        data, uses, covered = whole[key]
        uses.add(pointer.use)
        whole[key] = data, uses, covered and pointer.tensor.nbytes == storage.nbytes()

    def buffer(pointer: Pointer) -> Buffer:
        data, uses, covered = whole[pointer.tensor.untyped_storage().data_ptr()]
        offset = pointer.tensor.storage_offset() * pointer.tensor.element_size()
        # Only an output that fills its storage, and that is no input as well, must be written in every byte.
        return Buffer(data, uses != {"read"}, not (uses == {"write"} and covered), offset)

    return [buffer(a) if isinstance(a, Pointer) else a for a in call.arguments]


def launch(entry: str, **arguments: Any) -> None:
    """``signatures.launch`` under emulation; numpy arrays are taken as tensors."""
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    cuda_signatures.launch(EmulatedMachine(), entry, **tensors)
