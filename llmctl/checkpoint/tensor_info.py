"""What is known of a checkpoint's weight without reading it."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.graph.graph import QuantScheme


@dataclass(frozen=True)
class TensorInfo:
    """A weight as headers describe it.

    Attributes:
        shape: as ``Checkpoint.weight`` returns it; (N, K) for a quantized weight.
        dtype: safetensors dtype string of the dense tensor that ``weight`` returns, or of the scales.
        quant: how the weight is quantized, None for a dense one.
        nbytes: size in the checkpoint, bytes; of all planes for a quantized weight.
        stored: its name in the file; "" of a weight that is made of planes, and where names are made up.
    """

    shape: tuple[int, ...]
    dtype: str
    quant: QuantScheme | None
    nbytes: int
    stored: str = ""
