"""Small models with real weights: made once, packed by the product for a runtime, read as they are by the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine_check.models import BLOCK, quantized_graph, torch_dtype
from engine_check.steps import one_slice
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import Graph, Op, QuantScheme
from llmctl.targets.base import BuildOptions, TargetName
from llmctl.targets.cuda.target import CudaTarget
from llmctl.targets.planes import Plane
from llmctl.targets.reference.context import Env, StepContext
from llmctl.targets.reference.interpreter import Bound
from llmctl.targets.reference.runtime import ReferenceRuntime

QUANTS: dict[str, QuantScheme | None] = {
    "w4": QuantScheme(4, 128, symmetric=False),
    "w8": QuantScheme(8, -1, symmetric=True),
    "dense": None,
}
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Heads:
    """Query heads, heads of keys and values, size of each."""

    heads: int
    kv_heads: int
    size: int


@dataclass(frozen=True)
class Variant:
    """One small model: how its linears are stored, dtype, KV cache (``same`` as the dtype, int8, fp8_e4m3), heads."""

    quant: str
    dtype: str
    kv: str
    heads: Heads = Heads(4, 2, 64)
    family: str = "llama"

    @property
    def name(self) -> str:
        """``w4 bfloat16, kv int8, 4/2 heads of 64``."""
        h = self.heads
        family = "" if self.family == "llama" else f", {self.family}"
        return f"{self.quant} {self.dtype}, kv {self.kv}, {h.heads}/{h.kv_heads} heads of {h.size}{family}"

    @property
    def kv_dtype(self) -> str:
        """The KV cache's dtype by its own name."""
        return self.dtype if self.kv == "same" else self.kv


@dataclass(frozen=True)
class Size:
    """How large a small model is; ``positions``: its longest sequence."""

    hidden: int = 256
    intermediate: int = 384
    layers: int = 2
    vocab: int = 512
    positions: int = 512


@dataclass(frozen=True)
class TinyModel:
    """A variant with random weights in the product's own form (``QuantizedWeight`` or dense float16)."""

    variant: Variant
    size: Size = field(default_factory=Size)
    arch: str = "sm_90"

    @cached_property
    def graph(self) -> Graph:
        """After the passes of a CUDA build."""
        h, s = self.variant.heads, self.size
        config = {
            "model_type": self.variant.family, "vocab_size": s.vocab, "hidden_size": s.hidden,
            "intermediate_size": s.intermediate, "num_hidden_layers": s.layers, "num_attention_heads": h.heads,
            "num_key_value_heads": h.kv_heads, "head_dim": h.size, "max_position_embeddings": s.positions,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        }  # fmt: skip
        return quantized_graph(config, QUANTS[self.variant.quant])

    @cached_property
    def options(self) -> BuildOptions:
        """What an engine of it is built for."""
        v = self.variant
        return BuildOptions(v.dtype, self.size.positions, BLOCK, v.kv_dtype, self.graph.passes)

    @cached_property
    def weights(self) -> dict[str, Tensor | QuantizedWeight]:
        """By name, for the reference."""
        rng = np.random.default_rng(5)
        return {name: _random(rng, name, w.shape, w.quant) for name, w in self.graph.weights.items()}

    def planes(self, device: str) -> dict[str, Tensor]:
        """The weights packed by the product, as tensors on a device."""
        target = CudaTarget(TargetName("cuda", (self.arch,)))
        packed: dict[str, Tensor] = {}
        for name, planes in target.planes(self.graph, self.options).items():
            contents = target.pack(name, partial(self.weights.__getitem__, name), planes, self.graph, self.options)
            packed |= {plane.name: to_tensor(contents[plane.name], plane).to(device) for plane in planes}
        return packed

    def reference(self, dtype: str, blocks: int) -> ReferenceRuntime:
        """The reference over the same weights, its KV cache rounded as the variant's is."""
        runtime = ReferenceRuntime(self.graph, self.weights, num_blocks=blocks, block_size=BLOCK, dtype=dtype)
        if self.variant.kv != "same":
            round_cache(runtime, self.graph, self.variant.kv)
        return runtime


def _random(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], quant: QuantScheme | None
) -> Tensor | QuantizedWeight:
    if quant is None:
        if len(shape) == 1:
            return torch.from_numpy(rng.uniform(0.5, 1.5, shape)).half()
        size = 1.0 if "embed" in name else shape[1] ** -0.5
        return torch.from_numpy(rng.standard_normal(shape) * size).half()
    groups = (shape[0], quant.groups(shape[1]))
    codes = torch.from_numpy(rng.integers(0, 2**quant.bits, shape, np.uint8))
    zeros = torch.full(groups, 2 ** (quant.bits - 1), dtype=torch.uint8)
    if not quant.symmetric:
        zeros = torch.from_numpy(rng.integers(2, 2**quant.bits - 2, groups, np.uint8))
    spread = 2**quant.bits * math.sqrt((1 if quant.symmetric else 2) / 12)  # of a random code less its zero point
    scales = torch.from_numpy(rng.uniform(0.5, 1.5, groups) * shape[1] ** -0.5 / spread).half()
    return QuantizedWeight(codes, scales, zeros, quant, None)


def to_tensor(content: Any, plane: Plane) -> Tensor:
    """What a target packed (an array, a tensor, or what makes one) as a tensor of the plane's type."""
    made = content() if callable(content) else content
    if isinstance(made, Tensor):
        return made
    dtype = torch_dtype(plane)
    array = np.ascontiguousarray(made)
    if array.dtype == np.uint16:  # bits of a 16-bit float
        return torch.from_numpy(array.view(np.int16)).view(dtype)
    return torch.from_numpy(array).to(dtype)


# ---- a reference whose KV cache is stored as the runtime stores it ---------------------------------------------------


def round_cache(runtime: ReferenceRuntime, graph: Graph, kv: str) -> None:
    """Have the reference round keys and values to what an int8 or fp8_e4m3 cache holds, as it writes them."""
    rounding = {"int8": int8_rounded, "fp8_e4m3": e4m3_rounded}[kv]
    for op in graph.ops:
        if op.kind in ("kv_write", "rope_kv_write"):
            runtime.interpreter.override(op.name, _then_round(op, runtime.interpreter.bound(op.name), rounding))


def _then_round(op: Op, write: Bound, rounding: Any) -> Bound:
    def run(env: Env, ctx: StepContext) -> None:
        write(env, ctx)
        for part in ctx.cache[op.attrs["layer"]]:
            rows = part.flatten(0, 1)
            slots = ctx.slots(op.attrs["layer"])
            rows[slots] = rounding(rows[slots].float()).to(rows.dtype)

    return run


def int8_rounded(x: Tensor) -> Tensor:
    """Rows of [.., head size] on the grid of 127 steps to their own largest value."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return torch.round(x / scale).clamp(-127, 127) * scale


def e4m3_rounded(x: Tensor) -> Tensor:
    """The nearest e4m3 numbers; the largest one for what lies beyond."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


# ---- what the reference says -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """Exact logits of every position of every text, and how far a runtime may be from them.

    Attributes:
        exact: f32 [tokens, vocab] of each text, by the reference in float32.
        noise: the same-dtype reference's own largest error over all of it. limit: 2 × that and a floor.
    """

    runtime: ReferenceRuntime
    exact: list[Tensor]
    noise: float
    limit: float

    def off(self, text: int, position: int, row: Tensor) -> float:
        """Largest error of a row of logits; infinite when it is not finite."""
        found = row.float().cpu()
        return float((found - self.exact[text][position]).abs().max()) if bool(found.isfinite().all()) else math.inf

    def strays(self, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
        """Indices of the output tokens that the exact logits on that very path tell from their best."""
        text = [*prompt, *output]
        rows = self.runtime.logits(one_slice(text, BLOCK), all_rows=True)[len(prompt) - 1 : -1]
        behind = rows.max(-1).values - rows.gather(1, torch.tensor(list(output))[:, None])[:, 0]
        return [int(i) for i in torch.nonzero(behind > 2 * self.limit)[:, 0]]


FLOOR = 1e-3
"""Error that is always allowed: logits are of the size of 1."""


def oracle(model: TinyModel, texts: Sequence[Sequence[int]], longest: int) -> Oracle:
    """The references of both dtypes over all texts. ``longest``: tokens of the longest text that comes later."""
    blocks = -(-max(longest, *map(len, texts)) // BLOCK)
    single, same = model.reference("float32", blocks), model.reference(model.variant.dtype, blocks)
    exact = [single.logits(one_slice(text, BLOCK), all_rows=True) for text in texts]
    own = [same.logits(one_slice(text, BLOCK), all_rows=True) for text in texts]
    noise = max(float((a - b).abs().max()) for a, b in zip(own, exact, strict=True))
    return Oracle(single, exact, noise, 2 * noise + FLOOR)
