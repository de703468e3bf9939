"""What a step takes besides weights, where every element is of one dtype: the KV cache's rows, activation buffers."""

from __future__ import annotations

from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Graph

_INT8_SCALE = 4  # bytes; an int8 KV cache has one for every token's head


def kv_bytes_per_token(graph: Graph, dtype: str) -> int:
    """Bytes of keys and values of one token over all layers, scales included."""
    scale = _INT8_SCALE if dtype == "int8" else 0
    return sum(2 * layer.kv_heads * (layer.head_dim * DTYPES[dtype].nbytes + scale) for layer in graph.kv)


def activation_bytes(graph: Graph, dtype: str, tokens: int, rows: int) -> int:
    """Peak bytes of the activation buffers of one step of ``tokens`` tokens and ``rows`` sampled rows.

    A buffer lives from the op that writes it to the last that reads it. Logits are float32, and sampling holds
    three arrays of their size (logits, their log-softmax, sorted copies).
    """
    last_use = {name: i for i, op in enumerate(graph.ops) for name in op.inputs}
    live, peak = 0, 0
    for index, op in enumerate(graph.ops):
        live += sum(graph.buffers[name].width for name in op.outputs if name != LOGITS)
        peak = max(peak, live)
        dead = {name for name in (*op.inputs, *op.outputs) if last_use.get(name, index) == index}
        live -= sum(graph.buffers[name].width for name in dead - {LOGITS, INPUT_IDS, POSITIONS})
    return peak * tokens * DTYPES[dtype].nbytes + 3 * rows * graph.vocab_size * 4
