"""Any model that can be scored on a text: a checkpoint in float32, or an engine in its own arithmetic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from llmctl.artifact.loader import is_engine, load_engine, read_manifest
from llmctl.artifact.manifest import Manifest
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.resolve import resolve_model
from llmctl.errors import UsageError
from llmctl.evaluate.distributions import ROWS, CheckpointDistributions, OnProgress, RuntimeDistributions, Window
from llmctl.evaluate.perplexity import longest_context, tokenizer_digest
from llmctl.targets.options import INT8_PASS
from llmctl.targets.table import target_of
from llmctl.text.tokenizer import Tokenizer


class ScoredModel(Protocol):
    """What a score needs of a model."""

    @property
    def arithmetic(self) -> str:
        """What it computes in, for people."""
        ...

    @property
    def longest(self) -> int | None:
        """Tokens of its longest context; None: it does not say."""
        ...

    @property
    def tokenizer_sha256(self) -> str:
        """Of its tokenizer.json."""
        ...

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        ...

    def distributions(
        self, windows: Sequence[Window], on_progress: OnProgress, /
    ) -> AbstractContextManager[Iterable[Tensor]]:
        """Its distributions over windows; ``on_progress`` is told how many of its layers are done.

        Raises:
            LlmctlError: as opening and running the model.
        """
        ...


def open_scored(name: str, activations: str = "auto", as_family: str = "") -> ScoredModel:
    """The model that an option names: whatever ``resolve_model`` finds, or an engine folder.

    Args:
        activations: ``int8`` rounds the inputs of symmetric 8-bit linears as engines built so do; ``auto`` does not.
        as_family: as ``open_checkpoint``; not of an engine.

    Raises:
        UsageError: ``activations`` that are neither, or int8 of an engine, which has been built with its own.
        LlmctlError: as finding and opening the model.
    """
    if activations not in ("auto", "int8"):
        raise UsageError(f"--activations: expected auto or int8, found '{activations}'", param="activations")
    if is_engine(Path(name)):
        if activations == "int8":
            raise UsageError(f"--activations int8: {name} is an engine, whose are settled", param="activations")
        return _Engine(Path(name), read_manifest(Path(name)))
    return _Checkpoint(
        open_checkpoint(resolve_model(name), as_family=as_family), (INT8_PASS,) if activations == "int8" else ()
    )


@dataclass(frozen=True)
class _Checkpoint:
    checkpoint: Checkpoint
    passes: tuple[str, ...]

    @property
    def arithmetic(self) -> str:
        return "float32" + (", int8 activations" if self.passes else "")

    @property
    def longest(self) -> int | None:
        return longest_context(self.checkpoint)

    @property
    def tokenizer_sha256(self) -> str:
        return tokenizer_digest(self.checkpoint)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_files(self.checkpoint.aux_files(), where=str(self.checkpoint.path))

    @contextmanager
    def distributions(self, windows: Sequence[Window], on_progress: OnProgress) -> Iterator[Iterable[Tensor]]:
        yield CheckpointDistributions(self.checkpoint, windows, on_progress, passes=self.passes)


@dataclass(frozen=True)
class _Engine:
    path: Path
    manifest: Manifest

    @property
    def arithmetic(self) -> str:
        return f"{self.manifest.options.dtype} engine for {self.manifest.target}"

    @property
    def longest(self) -> int | None:
        return self.manifest.options.max_model_len

    @property
    def tokenizer_sha256(self) -> str:
        return hashlib.sha256((self.path / "tokenizer.json").read_bytes()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.path)

    @contextmanager
    def distributions(self, windows: Sequence[Window], _: OnProgress) -> Iterator[Iterable[Tensor]]:
        options, target = self.manifest.options, target_of(self.manifest.target)
        longest = max(len(tokens) for tokens, _ in windows)
        blocks = -(-longest // options.block_size)
        request = EngineRequest(
            max_model_len=longest,
            max_num_batched_tokens=ROWS,
            max_num_seqs=ROWS,
            kv_cache_bytes=blocks * options.block_size * target.kv_bytes_per_token(self.manifest.graph, options),
            whole_context=True,
        )
        runtime = open_runtime(load_engine(self.path, request))
        try:
            yield RuntimeDistributions(runtime, windows)
        finally:
            runtime.close()
