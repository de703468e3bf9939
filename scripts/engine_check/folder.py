"""An engine folder of random weights, written by the product's own writer: what ``llmctl serve`` is started on."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine_check.models import SHAPES, Model, host_contents
from llmctl.artifact.memory import Sizing
from llmctl.artifact.plan import BuildPlan
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.writer import write_engine
from llmctl.bench.workloads import WORDS
from llmctl.graph.graph import Graph
from llmctl.targets.base import BuildOptions, PlaneContent, Read, TargetName
from llmctl.targets.cuda.target import CudaTarget
from llmctl.targets.planes import Plane

_LETTERS = [chr(c) for c in range(ord("!"), ord("~") + 1)]
_END = "<|end|>"


@dataclass(frozen=True)
class RandomTarget(CudaTarget):
    """The cuda target, but for what planes hold: ``made``, by plane name."""

    made: Any = None

    def pack(
        self,
        name: str,  # noqa: ARG002
        read: Read,  # noqa: ARG002
        planes: Sequence[Plane],
        graph: Graph,  # noqa: ARG002
        options: BuildOptions,  # noqa: ARG002
    ) -> dict[str, PlaneContent]:
        """Random numbers, each plane when its turn comes; nothing is read."""
        return {plane.name: self.made[plane.name] for plane in planes}


class RandomCheckpoint:
    """What a writer asks of a checkpoint, of one that does not exist."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.quantization = None if model.kind == "bf16" else SimpleNamespace(method="random")

    def fingerprint(self) -> str:
        """Of its description."""
        return hashlib.sha256(f"random weights: {self._model.name}".encode()).hexdigest()

    def aux_files(self) -> dict[str, bytes]:
        """The tokenizer."""
        return tokenizer_files(self._model.graph.vocab_size)

    @cached_property
    def path(self) -> Path:
        """There is none."""
        raise FileNotFoundError("random weights have no folder")


def write_folder(model: Model, output: Path) -> None:
    """The engine folder at ``output``."""
    target = RandomTarget(TargetName("cuda", (model.arch,)), made=host_contents(model))
    options = model.options
    planes = target.planes(model.graph, options)
    checkpoint: Any = RandomCheckpoint(model)
    sizing = Sizing(model.graph, options, target, EngineRequest(), tuple(model.planes.values()))
    plan = BuildPlan(
        name=model.name.replace(" ", "-"), as_family="", checkpoint=checkpoint, unused=(), graph=model.graph,
        target=target, options=options, planes=planes, choices=target.choose_kernels(model.graph, options),
        sizing=sizing, memory=sizing.plan(),
    )  # fmt: skip
    write_engine(plan, output)


def tokenizer_files(vocab_size: int) -> dict[str, bytes]:
    """A byte-level BPE of so many tokens, laid out as Llama 3's: the load generator's words are one token each, the
    rest are two and three letters with their merges.

    Raises:
        ValueError: fewer tokens than bytes and words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [prefix + word for word in WORDS for prefix in ("", "Ġ")]
    tokens = dict.fromkeys([*alphabet, *words])
    merges = []
    for start, first in _stems():
        if len(tokens) >= vocab_size - 1:
            break
        if start + first not in tokens:
            tokens[start + first] = None
            merges.append((start, first))
    if len(tokens) != vocab_size - 1:
        raise ValueError(f"expected a vocabulary of {len(alphabet) + len(words) + 1} or more, found {vocab_size}")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_END])
    config = {"eos_token": _END, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def _stems() -> Any:
    """(token, letter) of every pair and then every triple of letters."""
    pairs = [(a, b) for a in _LETTERS for b in _LETTERS]
    yield from pairs
    for a, b in pairs:
        for c in _LETTERS:
            yield a + b, c


def main(argv: Sequence[str] | None = None) -> int:
    """Write a folder, and how long that took beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("shape", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("kind", help="4-bit or bf16")
    parser.add_argument("arch", help="such as sm_90")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    options = parser.parse_args(argv)
    config = dict(SHAPES[options.shape])
    if options.layers:
        config["num_hidden_layers"] = options.layers
    began = time.monotonic()
    write_folder(Model(options.shape, options.kind, config, options.arch), options.output)
    seconds = time.monotonic() - began
    (options.output.parent / f"{options.output.name}.written").write_text(f"{seconds:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
