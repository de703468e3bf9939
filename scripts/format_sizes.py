"""Sizes of quantized weights, in a file and in an engine of each target: a table of ``docs/formats.md``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from md_table import markdown_table

from llmctl.checkpoint.bitsandbytes import NESTED_BLOCK
from llmctl.checkpoint.gguf_blocks import BLOCK_FORMATS
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph, QuantScheme
from llmctl.targets.base import BuildOptions
from llmctl.targets.planes import total_bytes
from llmctl.targets.table import parse_target

TARGETS: Mapping[str, str] = {"reference": "reference", "cpu": "cpu", "cuda": "cuda:sm_90"}
_CONFIG = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_FP8, _NF4 = QuantScheme(8, 128, True, book="fp8_e4m3", block_rows=128), QuantScheme(4, 64, True, book="nf4")


@dataclass(frozen=True)
class Stored:
    """A format in a file: bits of a weight's code and of what it has of scales, and their dtype."""

    scheme: QuantScheme
    codes: float
    scales: float
    dtype: str = "F32"


def _ggml(name: str) -> Stored:
    columns, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    codes = BLOCK_FORMATS[name].scheme.bits
    return Stored(BLOCK_FORMATS[name].scheme, codes, 8 * size / columns - codes, BLOCK_FORMATS[name].scales)


FORMATS: Mapping[str, Stored] = {
    "float8, 128 x 128 blocks": Stored(_FP8, 8, 32 / 128**2),
    "NF4": Stored(_NF4, 4, 32 / 64),
    "NF4, doubly quantized": Stored(replace(_NF4, nested=NESTED_BLOCK), 4, (8 + 32 / NESTED_BLOCK) / _NF4.group_size),
    **{name: _ggml(name) for name in BLOCK_FORMATS},
}


def sizes() -> str:
    """Bits a weight: of a file, of each target's engine, and how that compares."""
    rows = []
    for name, stored in FORMATS.items():
        file = stored.codes + stored.scales
        bits = [engine_bits(stored, target) for target in TARGETS.values()]
        rows.append((name, f"{file:.2f}", *(f"{b:.2f}, {b / file:.2f}" for b in bits)))
    return markdown_table(("format", "file", *TARGETS), rows)


def engine_bits(stored: Stored, target: str) -> float:
    """Bits a weight of a model of usual widths, all of whose linears but the head are in a format."""

    class Info:
        dtype, quant = stored.dtype, None

    graph = _graph(stored.scheme)
    options = BuildOptions("float32" if target == "reference" else "bfloat16", 128, 16, "bfloat16", graph.passes)
    planes = parse_target(target).planes(graph, options, lambda _: Info())
    quantized = {name: weight for name, weight in graph.weights.items() if weight.quant is not None}
    size = sum(total_bytes(planes[name]) for name in quantized)
    return 8 * size / sum(math.prod(weight.shape) for weight in quantized.values())


def _graph(scheme: QuantScheme) -> Graph:
    graph = build_graph(_CONFIG)
    linears = {op.weights[0] for op in graph.products() if op.name != "lm_head"}
    weights = {n: replace(w, quant=scheme if n in linears else None) for n, w in graph.weights.items()}
    return replace(graph, weights=weights)
