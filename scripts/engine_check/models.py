"""The models that are run: their graphs, random weights that are made where they are wanted, bytes and operations.

Nothing is downloaded: a model is a shape of a real one. Its weights are random planes, of the names, shapes and types
that the product's own target lays down, and of sizes at which activations neither vanish nor overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.graph.dtypes import BY_SAFETENSORS
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph, QuantScheme
from llmctl.graph.passes import apply_passes
from llmctl.targets.base import BuildOptions, TargetName
from llmctl.targets.cuda.target import CUDA_PASSES, CudaTarget
from llmctl.targets.planes import Plane, flat
from llmctl.targets.step_memory import kv_bytes_per_token

BLOCK = 16
W4 = QuantScheme(4, 128, symmetric=False)
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8704, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_4B: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8704, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {"Llama-3-8B": LLAMA_8B, "Qwen3-4B": QWEN_4B}
SCHEMES: dict[str, QuantScheme | None] = {"4-bit": W4, "bf16": None}
_CODE_SPREAD = 6.5
"""Standard deviation of a random code less a random zero point, both of 4 bits."""
_SMALL_BLOCK = 2**22  # elements of random numbers that a plane on the host repeats


def quantized_graph(config: Mapping[str, Any], quant: QuantScheme | None) -> Graph:
    """The graph after the passes of a CUDA build, every linear but the head quantized so."""
    graph = build_graph(dict(config))
    linears = {op.weights[0] for op in graph.linears()} - {"lm_head.weight", "embed.weight"}
    weights = {n: replace(w, quant=quant if n in linears else None) for n, w in graph.weights.items()}
    return apply_passes(replace(graph, weights=weights), CUDA_PASSES)


@dataclass(frozen=True)
class Model:
    """A shape and a way to store it.

    Attributes:
        shape: one of ``SHAPES`` (or a name of the caller's). kind: ``4-bit`` or ``bf16``.
        config: as ``config.json`` has it. arch: the device's, as ``sm_90``.
    """

    shape: str
    kind: str
    config: Mapping[str, Any]
    arch: str = "sm_90"
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """``Llama-3-8B 4-bit``."""
        return f"{self.shape} {self.kind}"

    @cached_property
    def graph(self) -> Graph:
        """After the passes of a CUDA build."""
        return quantized_graph(self.config, SCHEMES[self.kind])

    @property
    def target(self) -> CudaTarget:
        """For the device's architecture."""
        return CudaTarget(TargetName("cuda", (self.arch,)))

    @cached_property
    def options(self) -> BuildOptions:
        """What an engine of it is built for."""
        return BuildOptions(self.dtype, self.graph.max_position, BLOCK, self.kv_dtype, self.graph.passes)

    @cached_property
    def planes(self) -> dict[str, Plane]:
        """Stored tensors by name."""
        return flat(self.target.planes(self.graph, self.options))

    # what a step costs on paper

    def step_bytes(self) -> int:
        """Bytes of weights that any step reads once: all but an embedding table that is no output head."""
        read = {name for op in self.graph.ops if op.kind != "embed" for name in op.weights}
        by_weight = self.target.planes(self.graph, self.options)
        return sum(plane.nbytes for name, group in by_weight.items() if name in read for plane in group)

    def kv_bytes(self, positions: int) -> int:
        """Bytes of keys and values of so many positions, over all layers."""
        return positions * kv_bytes_per_token(self.graph, self.kv_dtype)

    def decode_bytes(self, batch: int, context: int) -> int:
        """Bytes that a decode step of ``batch`` sequences of ``context`` positions reads."""
        return self.step_bytes() + self.kv_bytes(batch * context)

    def linear_flops(self) -> int:
        """Operations of one token in the decoder's linears, the output head left out."""
        shapes = [self.graph.weights[op.weights[0]].shape for op in self.graph.linears() if op.name != "lm_head"]
        return sum(2 * math.prod(shape) for shape in shapes)

    def prefill_flops(self, tokens: int) -> int:
        """Operations of one prompt of so many tokens: the linears, causal attention, one row of the output head."""
        graph = self.graph
        head = 2 * graph.vocab_size * graph.hidden_size
        widths = sum(op.attrs["heads"] * op.attrs["head_dim"] for op in graph.ops if op.kind == "attention")
        return tokens * self.linear_flops() + head + 2 * widths * tokens * (tokens + 1)


def model(shape: str, kind: str, arch: str = "sm_90") -> Model:
    """One of the real shapes."""
    return Model(shape, kind, SHAPES[shape], arch)


# ---- random planes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What a plane is filled with: ``bytes`` or ``codes`` below ``top``, ``scales`` of about ``size``, ``ones``, or
    ``normal`` numbers of that spread."""

    kind: str
    top: int = 256
    size: float = 1.0


def contents(model: Model) -> Iterator[tuple[Plane, Content]]:
    """Every plane with what it is to hold."""
    for name, group in model.target.planes(model.graph, model.options).items():
        weight = model.graph.weights[name]
        for plane in group:
            suffix = plane.name.removeprefix(f"{name}.")
            if suffix in ("tiles", "codes"):
                yield plane, Content("bytes")
            elif suffix in ("tile_zeros", "zeros"):
                assert weight.quant is not None
                yield plane, Content("bytes", 2**weight.quant.bits)
            elif suffix in ("tile_scales", "scales"):
                yield plane, Content("scales", size=weight.shape[1] ** -0.5 / _CODE_SPREAD)
            elif suffix == plane.name:
                yield plane, _dense(name, weight.shape)
            else:
                raise ValueError(f"{plane.name}: no way to make such a plane is known")


def _dense(name: str, shape: tuple[int, ...]) -> Content:
    if len(shape) == 1:
        return Content("ones")
    return Content("normal", size=1.0 if "embed" in name else shape[1] ** -0.5)


def torch_dtype(plane: Plane) -> Any:
    """A plane's element type in torch."""
    import torch

    return getattr(torch, BY_SAFETENSORS[plane.dtype].torch)


def planes_on(model: Model, device: str) -> dict[str, Any]:
    """Random planes as tensors on a device (``meta`` makes shapes only)."""
    import torch

    made = {}
    for plane, content in contents(model):
        dtype = torch_dtype(plane)
        if content.kind == "bytes":
            made[plane.name] = torch.randint(0, content.top, plane.shape, dtype=dtype, device=device)
            continue
        tensor = torch.empty(plane.shape, dtype=dtype, device=device)
        if content.kind == "ones":
            tensor.fill_(1)
        elif content.kind == "scales":
            tensor.uniform_(0.5 * content.size, 1.5 * content.size)
        else:
            tensor.normal_(0, content.size)
        made[plane.name] = tensor
    return made


def host_contents(model: Model, seed: int = 0) -> dict[str, Callable[[], NDArray[Any]]]:
    """By plane name, what makes the plane's array: random numbers that repeat, for they are to be made fast."""
    rng = np.random.default_rng(seed)
    uniform = rng.random(_SMALL_BLOCK, np.float32)
    normal = rng.standard_normal(_SMALL_BLOCK, np.float32)
    raw = rng.integers(0, 256, _SMALL_BLOCK, np.uint8)

    def make(plane: Plane, content: Content) -> NDArray[Any]:
        if content.kind == "bytes":
            block = raw if content.top == 256 else raw % content.top
        elif content.kind == "ones":
            block = _stored(np.ones(1, np.float32), plane.dtype)
        elif content.kind == "scales":
            block = _stored((uniform + 0.5) * np.float32(content.size), plane.dtype)
        else:
            block = _stored(normal * np.float32(content.size), plane.dtype)
        return np.resize(block, plane.shape)

    return {plane.name: partial(make, plane, content) for plane, content in contents(model)}


def _stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":  # numpy has none: the upper half of a float32, cut
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(BY_SAFETENSORS[dtype].numpy)
