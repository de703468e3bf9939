"""Tile registers: the instructions, or the software in their place, against their description; the same bits with them
as without; what the system has to say about them."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cpu_graphs import AMX, Floats, Native, Sketch, identity, library, run
from numpy.typing import NDArray
from test_cpu_attention import Shape, bind, content

from llmctl.engine.step import SequenceSlice
from llmctl.targets.cpu.binding import Lowering
from llmctl.targets.cpu.features import cpu_features
from llmctl.targets.cpu.layout import PackedLinear, pack_int
from llmctl.targets.cpu.toolchain import (
    EMULATED_AMX,
    FLAGS,
    SOURCE_DIR,
    Variant,
    find_compiler,
    supported_variants,
)

pytestmark = [
    pytest.mark.skipif(not AMX, reason="no C++ compiler, or a CPU without AVX-512 VNNI"),
    pytest.mark.xdist_group("cpu_kernels"),
]
ON_SILICON = [v for v in AMX if v is not EMULATED_AMX]
each_instruction = pytest.mark.parametrize("variant", AMX, ids=lambda v: v.name)
each_amx = pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * (v is EMULATED_AMX)) for v in AMX], ids=lambda v: v.name
)
on_silicon = pytest.mark.skipif(not ON_SILICON, reason="a CPU without AMX")
HARNESS = """
#include "amx.h"
using namespace llmctl;
static TileShapes shapes_of(const uint8_t* from) { return load<TileShapes>(from); }
// Bytes a [m][k], b [k / 4][4 * n], sums c [m][n], strides in bytes; kind: signed, by unsigned, of unsigned.
extern "C" void multiply(const uint8_t* shapes, const void* a, int64_t lda, const void* b, int64_t ldb, void* c,
                         int64_t ldc, int kind) {
  configure_tiles(shapes_of(shapes));
  tile_load<5>(c, ldc);
  tile_load<1>(a, lda);
  tile_load<6>(b, ldb);
  if (kind == 0) dot_signed<5, 1, 6>();
  if (kind == 1) dot_with_unsigned<5, 1, 6>();
  if (kind == 2) dot_of_unsigned<5, 1, 6>();
  tile_store<5>(c, ldc);
  release_tiles();
}
// Loads tile 3, then as a tile of other shape what it holds beyond it; zero: cleared in between.
extern "C" void reload(const uint8_t* shapes, const void* from, int64_t stride, void* to, int zero) {
  configure_tiles(shapes_of(shapes));
  tile_load<3>(to, 64);
  tile_load<3>(from, stride);
  if (zero) tile_zero<3>();
  tile_store<3>(to, 64);
  release_tiles();
}
extern "C" int granted() { return have_tiles(); }
"""


@pytest.fixture(scope="module")
def harnesses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """By variant."""
    compiler, opened = find_compiler(), {}
    assert compiler
    for variant in AMX:
        folder = tmp_path_factory.mktemp("harness")
        source, made = folder / "harness.cpp", folder / "harness.so"
        source.write_text(HARNESS)
        subprocess.run([*compiler, *FLAGS, *variant.flags, f"-I{SOURCE_DIR}", str(source), "-o", str(made)], check=True)
        opened[variant.name] = ctypes.CDLL(str(made))
        assert opened[variant.name].granted()
    return opened


def tile_shapes(**tiles: tuple[int, int]) -> NDArray[np.uint8]:
    """The 64 bytes that configure tiles, by ``t0`` and so on: rows, bytes a row."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    for name, (rows, row_bytes) in tiles.items():
        number = int(name[1:])
        config[16 + 2 * number], config[48 + number] = row_bytes, rows
    return config


@each_instruction
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize(("m", "n", "k"), [(16, 16, 64), (16, 16, 48), (5, 3, 4), (1, 16, 36), (16, 1, 64), (9, 7, 20)])
def test_tiles_are_multiplied_as_the_manual_says(
    variant: Variant, kind: int, m: int, n: int, k: int, harnesses: dict[str, ctypes.CDLL]
) -> None:
    rng = np.random.default_rng(m * n * k)
    lda, ldb, ldc = k + 8, 4 * n + 16, 4 * n + 4
    a, b = rng.integers(0, 256, (m, lda), np.uint8), rng.integers(0, 256, (k // 4, ldb), np.uint8)
    a[0], b[:, :4] = 0x80, 0x80  # the lowest and largest products
    c = rng.integers(-(2**31), 2**31, (m, ldc // 4)).astype(np.int32)  # sums wrap
    left = a[:, :k].astype(np.int64) if kind == 2 else a[:, :k].view(np.int8).astype(np.int64)
    right = b[:, : 4 * n] if kind == 1 else b[:, : 4 * n].copy().view(np.int8)
    weights = right.reshape(k // 4, n, 4).transpose(0, 2, 1).reshape(k, n).astype(np.int64)
    expected = c.copy()
    expected[:, :n] = (c[:, :n].astype(np.int64) + left @ weights).astype(np.uint64).astype(np.uint32).view(np.int32)
    shapes = tile_shapes(t5=(m, 4 * n), t1=(m, k), t6=(k // 4, 4 * n))
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (shapes, a, b, c)]
    strides = [ctypes.c_int64(stride) for stride in (lda, ldb, ldc)]
    harnesses[variant.name].multiply(
        pointers[0], pointers[1], strides[0], pointers[2], strides[1], pointers[3], strides[2], kind
    )
    assert np.array_equal(c, expected)


@each_instruction
def test_tiles_hold_what_their_shape_says(variant: Variant, harnesses: dict[str, ctypes.CDLL]) -> None:
    """Nothing beyond the shape is read or written; a cleared tile stores zeros."""
    rows, row_bytes = 7, 20
    source = np.random.default_rng(0).integers(0, 256, (rows, 32), np.uint8)
    shapes = tile_shapes(t3=(rows, row_bytes))
    for zero in (0, 1):
        found = np.full((16, 64), 7, np.uint8)
        harnesses[variant.name].reload(
            *(ctypes.c_void_p(array.ctypes.data) for array in (shapes, source)), ctypes.c_int64(32),
            ctypes.c_void_p(found.ctypes.data), zero,
        )  # fmt: skip
        expected = np.full((16, 64), 7, np.uint8)
        expected[:rows, :row_bytes] = 0 if zero else source[:, :row_bytes]
        assert np.array_equal(found, expected)


def without_tiles() -> Variant:
    """The fastest other variant here."""
    return next(v for v in supported_variants(cpu_features()) if v not in AMX)


def real_linear(bits: int, group: int, n: int, k: int, *, gated: bool, minimum: bool, symmetric: bool) -> PackedLinear:
    rng = np.random.default_rng(bits * n + k)
    groups = 1 if group == -1 else k // group
    zeros = rng.integers(0, 2**bits, (n, groups)).astype(np.uint8)
    scales = rng.uniform(0.001, 0.02, (n, groups)).astype(np.float16)
    return pack_int(
        rng.integers(0, 2**bits, (n, k)).astype(np.uint8), scales, None if symmetric else zeros, bits=bits,
        group=group, gated=gated, minimums=(rng.normal(size=(n, groups)) / 50).astype(np.float16) if minimum else None,
    )  # fmt: skip


@each_amx
@pytest.mark.parametrize(
    ("bits", "group", "k", "minimum", "symmetric"),
    [
        *[(4, group, k, False, False) for group, k in [(64, 192), (128, 256), (-1, 192), (32, 96), (-1, 544)]],
        (4, 20, 60, False, False),
        *[(8, group, k, False, symmetric) for group, k in [(64, 128), (-1, 576)] for symmetric in (False, True)],
        *[(bits, 32, 128, True, False) for bits in (4, 8)],
    ],
)  # fmt: skip
@pytest.mark.parametrize("output", ["plain", "gated", "int8"])
def test_linears_give_the_same_bits(
    variant: Variant, bits: int, group: int, k: int, minimum: bool, symmetric: bool, output: str
) -> None:
    """Of real numbers, at any number of rows; the rest of a tile of rows or outputs included."""
    rows = (10, 11, 15, 16, 17, 31, 32, 33, 47, 150)
    gated = output == "gated"
    width = 128 if output == "int8" else 83
    n = width * (1 + gated)
    packed = real_linear(bits, group, n, k, gated=gated, minimum=minimum, symmetric=symmetric)
    x = np.random.default_rng(9).normal(size=(max(rows), k)).astype(np.float32)
    bias = np.random.default_rng(8).normal(size=n)

    def outputs(of: Variant, counts: tuple[int, ...], threads: int) -> list[Floats]:
        sketch = Sketch()
        out = sketch.linear(sketch.rows(x), packed, n, bias=bias, epilogue="silu_mul" if gated else "")[0]
        if output == "int8":
            out = sketch.linear(out, identity(width, 8, 64), width)[0]
        return run(sketch, out, of, counts, threads=threads)

    whole = outputs(without_tiles(), rows, 2)
    for threads in (1, 2):
        for expected, found in zip(whole, outputs(variant, rows, threads), strict=True):
            assert found.tobytes() == expected.tobytes()
    # One row alone is the same as in a batch.
    assert outputs(variant, (1,), 1)[0].tobytes() == whole[-1][:1].tobytes()


def test_int8_rows_have_room_for_whole_tiles() -> None:
    """The last block of rows is read whole, and an activation group of 68 columns is two tiles of 36."""
    sketch = Sketch()
    packed = real_linear(4, -1, 32, 544, gated=False, minimum=False, symmetric=False)
    out = sketch.linear(sketch.rows(np.zeros((17, 544), np.float32)), packed, 32)[0]
    lowering = Lowering(sketch.graph(out), sketch.linears)
    lowering.run()
    sizes = {s.name.rpartition(".")[2]: s.bytes(17, 1) for s in lowering.storages if not s.on_rows}
    assert (sizes["codes"], sizes["scales"], sizes["sums"]) == (32 * 8 * 72, 32 * 8 * 4, 32 * 8 * 4)


@each_amx
@pytest.mark.parametrize(
    "shape",
    [Shape(9, 3, 64), Shape(4, 4, 16, window=40), Shape(8, 1, 80), Shape(12, 1, 32, softcap=5.0), Shape(4, 2, 256)],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 3])
def test_attention_gives_the_same_bits(variant: Variant, shape: Shape, threads: int) -> None:
    """Prompts of every length around a query tile's, over several segments, in pieces, beside decodes."""
    c = content("random", shape, 700, 3, "s8")
    steps = [
        [(0, 0, 300), (1, 0, 5)],
        [(0, 300, 1), (1, 5, 6), (2, 0, 17)],
        [(0, 301, 399)],
        [(1, 11, 3), (2, 17, 16)],
        [(2, 33, 40)],
    ]

    def outputs(of: Variant) -> bytes:
        native = bind(c, shape, of, "s8", threads=threads, num_blocks=150)
        found = [
            native.step(*(SequenceSlice(str(s), [s] * n, at, range(50 * s, 50 * s + 50), False) for s, at, n in step))
            for step in steps
        ]
        native.runtime.close()
        return b"".join(rows.tobytes() for rows in found)

    assert outputs(variant) == outputs(without_tiles())


def said(script: str, *arguments: str) -> str:
    """What a Python process prints."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


KERNELS = """
import ctypes, sys
from pathlib import Path
from llmctl.targets.cpu.abi import open_library
def say():
    library = open_library(Path(sys.argv[1]))
    print(library.llmctl_variant().decode(), library.llmctl_refusal().decode(), sep="|")
"""
SMALL_STACK = """
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0
"""


@each_instruction
def test_tiles_are_granted(variant: Variant) -> None:
    assert said(KERNELS + "say()", str(library(variant))) == "amx|"


@on_silicon
def test_a_refusal_leaves_the_next_variant() -> None:
    """The system refuses where a thread's signal stack is too small for the tiles."""
    found = said(KERNELS + SMALL_STACK + "say()", str(library(ON_SILICON[0])))
    assert found.startswith(
        "avx512bf16|AMX: the system refused the use of tiles: a thread's alternative signal stack is"
    )


ASK = """
import ctypes
from llmctl.targets.cpu.tiles import NEXT, tile_refusal
"""


@on_silicon
@pytest.mark.parametrize("prepare", ["", SMALL_STACK])
def test_who_loads_no_library_is_told_the_same(prepare: str) -> None:
    """``inspect`` and ``doctor`` ask without one, in the library's words."""
    loaded = said(KERNELS + prepare + "say()", str(library(ON_SILICON[0])))
    asked = said(ASK + prepare + "refusal = tile_refusal()\nprint(NEXT if refusal else 'amx', refusal, sep='|')")
    assert asked == loaded


FORK = """
import ctypes, os, sys, threading
library = ctypes.CDLL(sys.argv[1])
started = threading.Event()
def multiply():
    started.wait()
    sums, ones = (ctypes.c_int32 * 256)(), ctypes.create_string_buffer(b"\\x01" * 1024)
    shapes = bytes.fromhex(sys.argv[2])
    library.multiply(shapes, ones, ctypes.c_int64(64), ones, ctypes.c_int64(64), sums, ctypes.c_int64(64), 0)
    print(set(sums), flush=True)
thread = threading.Thread(target=multiply)
thread.start()
started.set()
thread.join()
if os.fork():
    sys.exit(os.waitpid(-1, 0)[1])
thread = threading.Thread(target=multiply)
thread.start()
thread.join()
"""


@on_silicon
def test_threads_and_forks_need_not_ask(harnesses: dict[str, ctypes.CDLL]) -> None:
    """What the library was granted when it was opened holds for threads made since, and for those of a fork."""
    shapes = tile_shapes(t5=(16, 64), t1=(16, 64), t6=(16, 64)).tobytes().hex()
    assert said(FORK, harnesses[ON_SILICON[0].name]._name, shapes) == "{64}\n{64}"


@on_silicon
def test_a_step_leaves_no_tiles_behind(tmp_path: Path) -> None:
    """Or the system would save them at every change of threads: the caller's unit is as it was before its first use."""
    compiler = find_compiler()
    assert compiler
    source, made = tmp_path / "state.cpp", tmp_path / "state.so"
    source.write_text('extern "C" void state(void* to) { asm volatile("sttilecfg (%0)" : : "r"(to) : "memory"); }\n')
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    sketch = Sketch()
    x = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    out = sketch.linear(sketch.rows(x), identity(64, 8, 64), 64)[0]
    native = Native(sketch, out, ON_SILICON[0], threads=1)
    native.first_rows(32)
    found = np.ones(64, np.uint8)
    ctypes.CDLL(str(made)).state(ctypes.c_void_p(found.ctypes.data))
    native.runtime.close()
    assert not found.any()
