"""Merge adapters into a checkpoint: the job behind ``llmctl merge``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmctl.checkpoint.adapters.opening import open_merged
from llmctl.checkpoint.assemble import accounted_graph, names_of
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.writer import check_new, write_plain_checkpoint
from llmctl.config import MergeConfig
from llmctl.errors import UsageError
from llmctl.graph.dtypes import COMPUTE_DTYPES

Show = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class MergeReport:
    """A finished merge.

    Attributes:
        adapters: in words. dtype: of the output's floats.
        untied: the output's head is a tensor of its own, though the base's is its embeddings.
        left_out: why tensors of the base were left out -> how many.
        notes: what a user should know. size: stored weights, bytes. seconds: wall time.
    """

    base: str
    output: str
    adapters: tuple[str, ...]
    dtype: str
    untied: bool
    left_out: dict[str, int]
    notes: tuple[str, ...]
    size: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data."""
        return asdict(self)


def merge_checkpoint(config: MergeConfig, show: Show = lambda *_: None) -> MergeReport:
    """Merge ``config.adapters`` into ``config.base`` and write the new folder ``config.output``.

    Args:
        show: is told of every tensor written: (what is counted, the tensor, done, in all).

    Raises:
        UsageError: options that cannot be honoured; an output in the way.
        LlmctlError: as ``open_merged``.
    """
    started = time.monotonic()
    if not config.adapters:
        raise UsageError("no adapter named", fix="llmctl merge BASE ADAPTER --output DIR", param="adapters")
    if not config.output:
        raise UsageError("--output is missing: the folder to write", fix="--output ./merged", param="output")
    output = Path(config.output)
    if output.suffix == ".gguf":
        raise UsageError(f"--output {output}: expected a folder, found the name of a .gguf file", param="output")
    if config.dtype not in ("auto", *COMPUTE_DTYPES):
        raise UsageError(f"--dtype {config.dtype}: expected auto, {', '.join(COMPUTE_DTYPES)}", param="dtype")
    check_new(output)
    merged = open_merged(config.base, config.adapters, "adapters", config.as_family)
    dtype = _dtype(config.dtype, merged.base)
    _, unused = accounted_graph(merged.checkpoint)
    size = write_plain_checkpoint(
        output,
        merged.checkpoint,
        dtype,
        left_out=names_of(unused),
        on_tensor=lambda name, done, total: show("written", name, done, total),
    )
    return MergeReport(
        base=config.base,
        output=config.output,
        adapters=tuple(one.described for one in merged.adapters),
        dtype=dtype,
        untied=merged.untied,
        left_out={kind.reason: len(kind.names) for kind in unused},
        notes=merged.notes,
        size=size,
        seconds=round(time.monotonic() - started, 3),
    )


def _dtype(wanted: str, base: Checkpoint) -> str:
    if wanted != "auto":
        return wanted
    return base.dtype if base.dtype in COMPUTE_DTYPES else "float32"
