"""Native paged attention and KV writes, on every build of the kernels that this machine runs.

Three kinds of content. ``uniform``: all scores equal, so the output times the number of keys is an integer sum, and one
key too many, too few or of another sequence shows. ``retrieval``: each query matches one key among many, so the output
is that key's value. ``random``: float64's softmax within the precision of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from cpu_graphs import Floats, Native, Sketch, each_variant, identity, quantization_is_right

from llmctl.engine.step import SequenceSlice
from llmctl.graph.graph import KVLayer
from llmctl.targets.cpu.toolchain import Variant, find_compiler

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.xdist_group("cpu_kernels"),
]


@dataclass(frozen=True)
class Shape:
    """Heads of one attention layer; window 0 and softcap 0 are off."""

    heads: int
    kv_heads: int
    dim: int
    window: int = 0
    softcap: float = 0.0
    scale: float = 1.0
    block_size: int = 16

    def __str__(self) -> str:
        marks = [f"{self.heads}to{self.kv_heads}x{self.dim}", f"b{self.block_size}"]
        return "-".join(marks + [f"w{self.window}"] * bool(self.window) + ["cap"] * bool(self.softcap))


@dataclass(frozen=True)
class Content:
    """q [P, heads, dim], k [P, kv_heads, dim], v [P, kv_heads, dim] by position; v_token [S, kv_heads, dim] is added
    to the values of sequence s. bound: error allowed, relative to the largest value."""

    q: Floats
    k: Floats
    v: Floats
    v_token: Floats
    bound: float


def content(kind: str, shape: Shape, positions: int, sequences: int, kv_dtype: str) -> Content:
    rng = np.random.default_rng(positions + shape.heads)
    kv, dim = (positions, shape.kv_heads, shape.dim), shape.dim
    if kind == "random":
        k, v = rng.normal(size=kv), rng.normal(size=kv)
        q = rng.normal(size=(positions, shape.heads, dim)) * (2 / shape.scale / dim**0.5)
        token = rng.normal(size=(sequences, *kv[1:]))
        # bf16: q, k, v and the softmax's weights each carry half an ulp, 2^-9.
        # int8: expected_rows rounds K and V as the cache does, but for values between two codes, which a fused
        # multiply-add may round the other way: one code is 1/127. Queries are 8-bit codes too, not rounded there.
        bound = {"bf16": 2e-2, "s8": 1e-2, "f32": 4e-6}[kv_dtype]
    else:
        k = rng.choice([-1.0, 1.0], kv)
        v, token = rng.integers(-60, 60, kv), rng.integers(-60, 60, (sequences, *kv[1:]))
        v[..., 0], token[..., 0] = 127, 0  # an int8 cache then has the scale 1, and no value lies between two codes
        q, bound = np.zeros((positions, shape.heads, dim)), 1e-4 if kv_dtype == "s8" else 1e-6
        if kind == "retrieval":
            for position in range(positions):
                first = max(0, position - shape.window + 1) if shape.window else 0
                wanted = rng.integers(first, position + 1, shape.heads)
                wanted[rng.random(shape.heads) < 0.3] = first  # both ends of what a query may see
                wanted[rng.random(shape.heads) < 0.3] = position
                for head, key in enumerate(wanted):
                    q[position, head] = 4 / shape.scale * k[key, head * shape.kv_heads // shape.heads]
    return Content(*(a.astype(np.float32) for a in (q, k, v, token)), bound)


def round_bf16(x: Floats) -> Floats:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def round_int8(x: Floats) -> Floats:
    """One scale for each token and head, the last axis."""
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30))
    return np.rint(x * (np.float32(127) / largest)) * (largest / np.float32(127))


def expected_rows(c: Content, shape: Shape, sequence: int, positions: range, kv_dtype: str) -> np.ndarray:
    """float64 attention of one sequence's positions, [len, heads * dim]."""
    stored = {"bf16": round_bf16, "s8": round_int8, "f32": lambda x: x}[kv_dtype]
    k, v = stored(c.k).astype(np.float64), stored(c.v + c.v_token[sequence]).astype(np.float64)
    group = shape.heads // shape.kv_heads
    out = np.zeros((len(positions), shape.heads, shape.dim))
    for i, p in enumerate(positions):
        first = max(0, p - shape.window + 1) if shape.window else 0
        for h in range(shape.heads):
            s = k[first : p + 1, h // group] @ c.q[p, h].astype(np.float64) * shape.scale
            s = shape.softcap * np.tanh(s / shape.softcap) if shape.softcap else s
            w = np.exp(s - s.max())
            out[i, h] = w @ v[first : p + 1, h // group] / w.sum()
    return out.reshape(len(positions), -1)


def bind(
    c: Content,
    shape: Shape,
    variant: Variant,
    kv_dtype: str,
    threads: int = 2,
    num_blocks: int = 64,
    quantized: int = 0,
) -> Native:
    """Token t of the sketch is sequence t; ``quantized``: the output goes through int8, in groups so wide."""
    positions = len(c.q)
    sketch = Sketch()
    sketch.kv.append(KVLayer(shape.kv_heads, shape.dim, shape.window))
    q, k = sketch.rows(c.q.reshape(positions, -1)), sketch.rows(c.k.reshape(positions, -1))
    v = sketch.rows(c.v.reshape(positions, -1), c.v_token.reshape(len(c.v_token), -1))
    sketch.op("kv_write", (k, v), (), attrs={"layer": 0})
    attrs = {
        "layer": 0, "heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.dim, "scale": shape.scale,
        "window": shape.window, "softcap": shape.softcap,
    }  # fmt: skip
    width = shape.heads * shape.dim
    out = sketch.op("attention", (q,), (width,), attrs=attrs)[0]
    if quantized:
        out = sketch.linear(out, identity(width, 8, quantized), width)[0]
    return Native(
        sketch, out, variant, max_tokens=512, kv_dtype=kv_dtype, block_size=shape.block_size, threads=threads,
        num_blocks=num_blocks,
    )  # fmt: skip


@dataclass
class Walk:
    """Drives sequences of given lengths through a bound layer, collecting every output row."""

    native: Native
    lengths: tuple[int, ...]
    rng: np.random.Generator

    def __post_init__(self) -> None:
        limits = self.native.runtime.limits
        order = self.rng.permutation(limits.num_blocks).tolist()
        self.tables = [[order.pop() for _ in range(-(-n // limits.block_size))] for n in self.lengths]
        self.done = [0] * len(self.lengths)
        self.found: list[list[Floats]] = [[] for _ in self.lengths]

    def step(self, takes: dict[int, int]) -> None:
        """One step: so many tokens of each sequence, as far as it has any left."""
        slices = []
        for s, take in takes.items():
            take = min(take, self.lengths[s] - self.done[s])
            if take:
                slices.append(SequenceSlice(str(s), [s] * take, self.done[s], self.tables[s], False))
        if not slices:
            return
        rows = self.native.step(*slices)
        for piece in slices:
            s, count = int(piece.request_id), len(piece.token_ids)
            self.found[s].append(rows[:count])
            self.done[s] += count
            rows = rows[count:]

    def finish(self) -> list[Floats]:
        """Random chunks, whole prefills and decodes, mixed and alone, until all is done: output rows by sequence."""
        while any(d < n for d, n in zip(self.done, self.lengths, strict=True)):
            some = self.rng.permutation(len(self.lengths))[: self.rng.integers(1, len(self.lengths) + 1)]
            largest = int(self.rng.choice([1, 5, 16, 17, 64, 300]))
            self.step({int(s): int(self.rng.integers(1, largest + 1)) for s in some})
        return [np.concatenate(parts) for parts in self.found]


def check(
    kind: str,
    shape: Shape,
    variant: Variant,
    kv_dtype: str,
    lengths: tuple[int, ...] = (70, 33, 16, 1),
) -> None:
    c = content(kind, shape, max(lengths), len(lengths), kv_dtype)
    native = bind(c, shape, variant, kv_dtype)
    walk = Walk(native, lengths, np.random.default_rng(0))
    for s, rows in enumerate(walk.finish()):
        expected = expected_rows(c, shape, s, range(lengths[s]), kv_dtype)
        assert np.abs(rows - expected).max() <= c.bound * np.abs(c.v + c.v_token[s]).max()
    native.runtime.close()


@each_variant
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "s8"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (3, 1), (6, 2), (4, 1), (7, 1), (8, 1), (12, 1)])
def test_grouped_heads(variant: Variant, kv_dtype: str, heads: int, kv_heads: int) -> None:
    for kind in ("uniform", "retrieval", "random"):
        check(kind, Shape(heads, kv_heads, 64), variant, kv_dtype)


@each_variant
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "s8"])
@pytest.mark.parametrize("dim", [80, 96, 128, 256])
def test_head_sizes(variant: Variant, kv_dtype: str, dim: int) -> None:
    for kind in ("uniform", "retrieval", "random"):
        check(kind, Shape(3, 1, dim, block_size=32), variant, kv_dtype, (50, 17))


@each_variant
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "s8"])
@pytest.mark.parametrize("dim", [4, 12, 14, 18])
def test_odd_head_sizes(variant: Variant, kv_dtype: str, dim: int) -> None:
    """Too few dimensions to tell random keys apart: no retrieval."""
    for kind in ("uniform", "random"):
        check(kind, Shape(4, 2, dim), variant, kv_dtype, (40, 3))


@each_variant
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "s8"])
@pytest.mark.parametrize("window", [1, 7, 16, 17, 40])
def test_sliding_window(variant: Variant, kv_dtype: str, window: int) -> None:
    for kind in ("uniform", "retrieval", "random"):
        check(kind, Shape(4, 2, 64, window=window), variant, kv_dtype)


@each_variant
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "s8"])
@pytest.mark.parametrize("softcap", [1.5, 30.0])
def test_softcap_and_scale(variant: Variant, kv_dtype: str, softcap: float) -> None:
    for kind in ("uniform", "random"):
        check(kind, Shape(4, 1, 64, softcap=softcap, scale=0.2), variant, kv_dtype)


@each_variant
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "s8"])
@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33])
def test_lengths_at_block_edges(variant: Variant, kv_dtype: str, length: int) -> None:
    for kind in ("uniform", "retrieval"):
        check(kind, Shape(2, 1, 64), variant, kv_dtype, (length, length + 1, 2))


@each_variant
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "s8"])
@pytest.mark.parametrize(("window", "threads"), [(0, 1), (0, 3), (270, 2)])
def test_long_contexts(variant: Variant, kv_dtype: str, window: int, threads: int) -> None:
    """Several segments of keys: alone (cut among the threads) and in a batch, decode and prefill."""
    shape = Shape(4, 2, 64, window=window)
    lengths = (530, 257, 40)
    for kind in ("uniform", "retrieval"):
        c = content(kind, shape, max(lengths), len(lengths), kv_dtype)
        native = bind(c, shape, variant, kv_dtype, threads)
        walk = Walk(native, lengths, np.random.default_rng(0))
        walk.step({0: 250, 1: 255})
        for _ in range(14):  # alone over the first segment's edge
            walk.step({0: 1})
        walk.step({1: 1, 2: 30})
        walk.step({1: 1})
        walk.step({0: 240})
        for _ in range(14):
            walk.step({0: 1, 1: 1, 2: 1})
        for s, rows in enumerate(walk.finish()):
            seen = range(lengths[s] - 300 if lengths[s] > 300 else 0, lengths[s])
            expected = expected_rows(c, shape, s, seen, kv_dtype)
            assert np.abs(rows[seen.start :] - expected).max() <= c.bound * np.abs(c.v + c.v_token[s]).max()
        native.runtime.close()


@each_variant
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "s8"])
@pytest.mark.parametrize(("heads", "kv_heads", "group"), [(4, 2, 64), (4, 2, 128), (3, 1, 64), (8, 1, 32), (12, 1, 64)])
def test_attention_that_quantizes(variant: Variant, kv_dtype: str, heads: int, kv_heads: int, group: int) -> None:
    """Attention may write the next linear's int8 operand itself: the codes of its float output."""
    shape, lengths = Shape(heads, kv_heads, 64), (300, 33, 9)
    c = content("random", shape, max(lengths), len(lengths), kv_dtype)
    outputs = []
    for quantized in (0, group):
        native = bind(c, shape, variant, kv_dtype, quantized=quantized)
        outputs.append(Walk(native, lengths, np.random.default_rng(0)).finish())
        native.runtime.close()
    for exact, found in zip(*outputs, strict=True):
        assert quantization_is_right(found, exact, group)


@each_variant
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "s8"])
def test_slot_minus_one_writes_nothing(variant: Variant, kv_dtype: str) -> None:
    """Padding tokens in the middle of a sequence leave its keys and values, and every other block, as they were."""
    shape = Shape(3, 1, 64)
    c = content("uniform", shape, 40, 2, kv_dtype)
    native = bind(c, shape, variant, kv_dtype, num_blocks=3)
    tables = [[2, 0, 1]]
    native.step(SequenceSlice("a", [0] * 39, 0, tables[0], False))

    # The values of sequence 1, if they were written.
    native.step(SequenceSlice("b", [1] * 30, 5, tables[0], False), padding=True)
    found = native.step(SequenceSlice("a", [0], 39, tables[0], False))
    expected = expected_rows(c, shape, 0, range(39, 40), kv_dtype)
    assert np.abs(found - expected).max() <= c.bound * np.abs(c.v + c.v_token[0]).max()
    native.runtime.close()


@each_variant
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "s8"])
@pytest.mark.parametrize("dim", [64, 14])
def test_fused_rope_and_write_equals_the_two_apart(variant: Variant, kv_dtype: str, dim: int) -> None:
    """Bit for bit, through the attention that reads what was written."""
    rng = np.random.default_rng(0)
    heads, kv_heads, positions = 4, 2, 40
    q, k, v = (rng.normal(size=(positions, n * dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    widths = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    turn = {**widths, "rotary_dim": dim // 2 // 2 * 2, "theta": 50.0, "style": "neox", "rope_type": "default"}
    attend = {**widths, "layer": 0, "scale": dim**-0.5, "window": 0, "softcap": 0.0}
    outputs = []
    for fused in (False, True):
        sketch = Sketch()
        sketch.kv.append(KVLayer(kv_heads, dim, 0))
        inputs = tuple(sketch.rows(x) for x in (q, k, v))
        if fused:
            turned = sketch.op("rope_kv_write", (*inputs, "positions"), (heads * dim,), (), {**turn, "layer": 0})[0]
        else:
            both = (heads * dim, kv_heads * dim)
            turned, turned_k = sketch.op("rope", (*inputs[:2], "positions"), both, (), turn)
            sketch.op("kv_write", (turned_k, inputs[2]), (), attrs={"layer": 0})
        out = sketch.op("attention", (turned,), (heads * dim,), attrs=attend)[0]
        native = Native(sketch, out, variant, kv_dtype=kv_dtype)
        outputs.append([native.first_rows(7), native.first_rows(40)])
        native.runtime.close()
    for apart, together in zip(*outputs, strict=True):
        assert np.array_equal(apart, together)
    assert np.isfinite(outputs[0][1]).all()


@each_variant
def test_infinities_of_a_former_owner_do_no_harm(variant: Variant) -> None:
    """An int8 block that held infinite values is given to another sequence, shorter than the block."""
    shape = Shape(3, 1, 64)
    c = content("uniform", shape, 40, 2, "s8")
    expected = expected_rows(c, shape, 0, range(5), "s8")
    c.v_token[1] = np.inf
    native = bind(c, shape, variant, "s8", num_blocks=1)
    native.step(SequenceSlice("b", [1] * 16, 0, [0], False))
    found = native.step(SequenceSlice("a", [0] * 5, 0, [0], False))
    assert np.abs(found - expected).max() <= c.bound * np.abs(c.v).max()
    native.runtime.close()
