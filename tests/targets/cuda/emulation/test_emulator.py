"""The emulator must catch what a GPU would not forgive: planted faults, each with a correct twin that passes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from emulator import EmulationError, Kernels, kernels_from_text, missing, read, update, write

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

# Every kernel has the parameters (const float* x, float* y, int n) and 64 threads; x has 64 floats, y has 64.
_FAULTS: dict[str, tuple[str, str, str]] = {
    "store past the end": (
        "y[i] = x[i];",
        "y[i + 1] = x[i];",
        r"out-of-bounds write of 4 bytes at byte 256 of 'y', which has 256 bytes; block \(0, 0, 0\), thread 63",
    ),
    "struct stored past the end": (
        "reinterpret_cast<bf16*>(y)[2 * i + 1] = from_float<bf16>(x[i]); reinterpret_cast<f16*>(y)[2 * i] = f16{0};",
        "reinterpret_cast<f16*>(y)[2 * i + 2] = from_float<f16>(x[i]); reinterpret_cast<f16*>(y)[2 * i + 1] = f16{0};",
        "out-of-bounds write of 2 bytes at byte 256 of 'y'",
    ),
    "vector stored past the end": (
        "if (i < 16) *reinterpret_cast<Vec16*>(y + 4 * i) = load16(x + 4 * i);",
        "if (i < 16) *reinterpret_cast<Vec16*>(y + 4 * i + 4) = load16(x + 4 * i);",
        "out-of-bounds write of .* at byte 256 of 'y'",
    ),
    "load before the start": ("y[i] = x[i];", "y[i] = x[i - 1];", r"out-of-bounds read of 4 bytes at byte -4 of 'x'"),
    "load far outside": ("y[i] = x[i];", "y[i] = x[i + (1 << 29)];", "in no buffer"),
    "write to an input": ("y[i] = x[i];", "y[i] = x[i]; const_cast<float*>(x)[i] = 1;", "'x', which is an input"),
    "missing block_sync": (
        "__shared__ float s[64]; s[i] = x[i]; block_sync(); y[i] = s[63 - i];",
        "__shared__ float s[64]; s[i] = x[i]; if (i < 32) warp_sync(); y[i] = i < 32 ? s[31 - i] : s[i - 32];",
        "data race: read of byte .* of 's' that thread .* wrote with no barrier between",
    ),
    "missing barrier before reuse": (
        "__shared__ float s[64]; s[i] = x[i]; block_sync(); float v = s[63 - i]; block_sync(); s[i] = v; y[i] = s[i];",
        "__shared__ float s[64]; s[i] = x[i]; block_sync(); float v = s[63 - i]; s[i] = v; y[i] = s[i];",
        "data race: .* of byte .* of 's' that thread .* with no barrier between",
    ),
    "warp_sync where the warps differ": (
        "__shared__ float s[64]; s[i] = x[i]; warp_sync(); y[i] = s[i ^ 1];",
        "__shared__ float s[64]; s[i] = x[i]; warp_sync(); y[i] = s[i ^ 32];",
        "never written|data race: read",
    ),
    "missing warp_sync": (
        "__shared__ float s[64]; s[i] = x[i]; warp_sync(); y[i] = s[i ^ 1];",
        "__shared__ float s[64]; s[i] = x[i]; shuffle_xor(x[i], 1); y[i] = s[i ^ 1];",
        "data race: read .* no barrier between",
    ),
    "same place written twice": ("y[i] = x[i];", "y[i] = x[i]; y[0] = x[0];", "data race: write of byte 0 of 'y'"),
    "blocks that meet": (
        "if (block_index() == 0) y[i] = x[i];",
        "y[i] = x[i];",
        "data race: write of byte 0 of 'y' that another block wrote",
    ),
    "sum in memory without an atomic": (
        "if (block_index() == 0) y[i] = 1; if (i == 0) atomic_add(reinterpret_cast<u32*>(y) + 64, 1u);",
        "if (block_index() == 0) y[i] = 1; if (i == 0) reinterpret_cast<u32*>(y)[64] += 1;",
        "data race: read of byte 256 of 'y' that another block wrote",
    ),
    "never written shared memory": (
        "__shared__ float s[64]; s[i] = x[i]; block_sync(); y[i] = s[i];",
        "__shared__ float s[64]; if (i) s[i] = x[i]; block_sync(); y[i] = s[i];",
        "read of byte 0 of 's', which was never written; block .* thread 0",
    ),
    "shared memory of the block before": (
        "if (block_index()) return; __shared__ float s[64]; s[i] = x[i]; block_sync(); y[i] = s[i];",
        "__shared__ float s[64]; if (!block_index()) s[i] = x[i]; block_sync(); if (block_index()) y[i] = s[i];",
        r"'s', which was never written; block",
    ),
    "output read first": ("y[i] = x[i];", "y[i] = y[i] + x[i];", "read of byte 0 of 'y', which was never written"),
    "output left unwritten": ("y[i] = x[i];", "if (i != 5) y[i] = x[i];", "4 bytes of 'y' were not written, byte 20 f"),
    "return before a barrier": (
        "block_sync(); y[i] = x[i];",
        "y[i] = x[i]; if (i == 7) return; block_sync();",
        "divergent barrier: it waits at block_sync in line .*, but thread 7 has returned",
    ),
    "barriers in two branches": (
        "block_sync(); y[i] = x[i];",
        "y[i] = x[i];\nif (i < 32) {\n block_sync();\n} else {\n block_sync();\n}",
        "divergent barrier: it comes to block_sync in line",
    ),
    "shuffle in a branch": (
        "float v = shuffle_xor(x[i], 1); y[i] = v;",
        "float v = i % 2 ? shuffle_xor(x[i], 1) : x[i]; y[i] = v;",
        "divergent warp: it waits at shuffle in line .*, but thread .* has returned",
    ),
    "misaligned 16-byte load": (
        "y[i] = bits_to_float(load16(x + i / 4 * 4).w[i % 4]);",
        "y[i] = bits_to_float(load16(x + (i < 60 ? i : 60)).w[0]);",
        "misaligned read of 16 bytes at byte 4 of 'x'.*thread 1",
    ),
    "misaligned raw load": (
        "y[i] = x[i];",
        "y[i] = *reinterpret_cast<const float*>(reinterpret_cast<const u8*>(x) + i);",
        "misaligned read of 4 bytes at byte 1 of 'x'",
    ),
    "16-byte load over the end": (
        "y[i] = bits_to_float(load16_const(x + i / 4 * 4).w[0]);",
        "y[i] = bits_to_float(load16_const(x + i / 4 * 4 + 4).w[0]);",
        "out-of-bounds read of 16 bytes at byte 256 of 'x'",
    ),
    "read-only load of what was written": (
        "y[i] = x[i]; block_sync(); if (i == 0 && load16(y).w[0] == 1u) y[i] = 0;",
        "y[i] = x[i]; block_sync(); if (i == 0 && load16_const(y).w[0] == 1u) y[i] = 0;",
        "read-only .nc. load of byte 0 of 'y', which this kernel writes",
    ),
    "missing cp.async wait": (
        "alignas(16) __shared__ float s[64]; if (i < 16) cp_async16(s + 4 * i, x + 4 * i); cp_async_commit();"
        "cp_async_wait<0>(); block_sync(); y[i] = s[i];",
        "alignas(16) __shared__ float s[64]; if (i < 16) cp_async16(s + 4 * i, x + 4 * i); cp_async_commit();"
        "cp_async_wait<1>(); block_sync(); y[i] = s[i];",
        "of 's' that a cp.async not yet waited for will write",
    ),
    "cp.async waited for, but no barrier": (
        "alignas(16) __shared__ float s[64]; if (i < 16) cp_async16_zero_fill(s + 4 * i, x, 0); cp_async_commit();"
        "cp_async_wait<0>(); block_sync(); y[i] = s[i];",
        "alignas(16) __shared__ float s[64]; if (i < 16) cp_async16(s + 4 * i, x + 4 * i); cp_async_commit();"
        "cp_async_wait<0>(); y[i] = s[i];",
        "data race|not yet waited for|never written",
    ),
    "static shared memory past its end": (
        "__shared__ float s[64]; s[i] = x[i]; block_sync(); const float* p = s; y[i] = p[63 - i];",
        "__shared__ float s[64]; s[i] = x[i]; block_sync(); const float* p = s; y[i] = p[64 + n - i];",
        "out-of-bounds read of 4 bytes at byte [0-9]+ of 's', which has 256 bytes",
    ),
    "array index": (
        "float r[4] = {}; for (int j = 0; j < n; ++j) r[j & 3] += x[i]; y[i] = r[n & 3];",
        "float r[4] = {}; for (int j = 0; j < n; ++j) r[j] += x[i]; y[i] = r[n & 3];",
        "array index 4 out of bounds",
    ),
}  # fmt: skip


_TWO_BLOCKS = {"blocks that meet", "sum in memory without an atomic", "shared memory of the block before"}


@functools.cache
def _module() -> Kernels:
    source = '#include "device.cuh"\nusing namespace llmctl;\n'
    for number, (correct, faulty, _) in enumerate(_FAULTS.values()):
        for name, body in ((f"correct_{number}", correct), (f"faulty_{number}", faulty)):
            source += f"LLMCTL_KERNEL(64, 1) {name}(const float* x, float* y, int n) {{\n"
            source += f"const int i = thread_index(); (void)n;\n{body}\n}}\n"
    return kernels_from_text(source, "fault.cu")


def _run(kernel: str, name: str) -> None:
    x = np.arange(1, 65, dtype=np.float32)
    y = update(np.zeros(65, np.float32)) if "atomic" in name else write(np.zeros(64, np.float32))
    _module().launch(kernel, 2 if name in _TWO_BLOCKS else 1, 64, [read(x), y, np.int32(64)])


@pytest.mark.parametrize("name", _FAULTS)
def test_a_planted_fault_is_caught_and_its_correct_twin_passes(name):
    number = list(_FAULTS).index(name)
    _run(f"correct_{number}", name)
    with pytest.raises(EmulationError, match=_FAULTS[name][2]) as error:
        _run(f"faulty_{number}", name)
    assert error.match(f"^faulty_{number}: ")
    if name != "output left unwritten":
        assert error.match(r"; block \(\d, 0, 0\), thread \d+; at .*fault\.cu:\d+")


def test_results_that_depend_on_the_schedule_are_reported():
    source = """#include "device.cuh"
    using namespace llmctl;
    LLMCTL_KERNEL(64, 1) ticket(u32* next, u32* y) { y[thread_index()] = atomic_add(next, 1u); }"""
    with pytest.raises(EmulationError, match="'y' depends on the order of threads"):
        kernels_from_text(source).launch(
            "ticket", 1, 64, [update(np.zeros(1, np.uint32)), write(np.zeros(64, np.uint32))]
        )


_LAST_BLOCK = """#include "device.cuh"
using namespace llmctl;
LLMCTL_KERNEL(32, 1) last_block_sums(const float* x, float* partial, u32* count, float* y) {
    const int i = thread_index();
    partial[block_index() * 32 + i] = x[block_index() * 32 + i];
    FENCE
    block_sync();
    __shared__ u32 ticket;
    if (i == 0) ticket = atomic_add(count, 1u);
    block_sync();
    if (ticket + 1 != static_cast<u32>(grid_size())) return;
    float sum = 0;
    for (int b = 0; b < grid_size(); ++b) sum += partial[b * 32 + i];
    y[i] = sum;
}"""


def test_the_last_block_may_read_what_others_wrote_before_a_fence_and_an_atomic():
    x = np.arange(96, dtype=np.float32)
    y = np.zeros(32, np.float32)

    def arguments():
        return [read(x), write(np.zeros(96, np.float32)), update(np.zeros(1, np.uint32)), write(y)]

    kernels_from_text(_LAST_BLOCK.replace("FENCE", "device_fence();")).launch("last_block_sums", 3, 32, arguments())
    assert np.array_equal(y, x.reshape(3, 32).sum(0))
    with pytest.raises(EmulationError, match="another block wrote"):
        kernels_from_text(_LAST_BLOCK.replace("FENCE", "")).launch("last_block_sums", 3, 32, arguments())


def test_arguments_are_checked_before_the_launch():
    source = (
        '#include "device.cuh"\nLLMCTL_KERNEL(64, 1) k(float* y, int n, float f) { y[llmctl::thread_index()] = n * f; }'
    )
    module, y = kernels_from_text(source), write(np.zeros(64, np.float32))
    module.launch("k", 1, 64, [y, np.int32(2), np.float32(1.5)])
    assert y.data[0] == 3.0
    for bad, message in [
        ([y, np.int64(2), np.float32(1)], "'n' needs a 32-bit integer"),
        ([y, np.int32(2), np.float64(1)], "'f' needs a 32-bit float"),
        ([np.int64(0), np.int32(2), np.float32(1)], "'y' needs a buffer"),
        ([y, 2, np.float32(1)], "'n' needs a numpy scalar"),
        ([y, np.int32(2)], "2 arguments for 3 parameters"),
    ]:
        with pytest.raises(EmulationError, match=message):
            module.launch("k", 1, 64, bad)
    with pytest.raises(EmulationError, match="up to its bound 64"):
        module.launch("k", 1, 96, [y, np.int32(2), np.float32(1.5)])


def test_dynamic_shared_memory_has_the_size_of_the_launch():
    source = """#include "device.cuh"
    LLMCTL_KERNEL(64, 1) k(float* y, int more) {
        LLMCTL_DYNAMIC_SHARED(memory);
        float* s = reinterpret_cast<float*>(memory);
        s[llmctl::thread_index()] = 1;
        y[llmctl::thread_index()] = s[llmctl::thread_index() + more];
    }"""
    module = kernels_from_text(source)

    def launch(shared: int, more: int = 0) -> None:
        module.launch("k", 1, 64, [write(np.zeros(64, np.float32)), np.int32(more)], shared=shared)

    launch(256)
    with pytest.raises(EmulationError, match="byte 240 of 'dynamic shared memory', which has 240 bytes"):
        launch(240)
    with pytest.raises(EmulationError, match="read of 4 bytes at byte 256 of 'dynamic shared memory'"):
        launch(256, more=64)
    with pytest.raises(EmulationError, match="more than a block can have"):
        launch(300_000)


# Sums columns of x [n, 64] through three stages of shared memory, copies running two rows ahead.
_PIPELINE = """#include "device.cuh"
using namespace llmctl;
constexpr int kStages = 3;
LLMCTL_DEVICE void fetch(float (*stage)[64], const float* x, int row, int n) {
    const int at = 4 * thread_index();
    if (row < n && at < 64) cp_async16(stage[row % kStages] + at, x + row * 64 + at);
    cp_async_commit();
}
LLMCTL_KERNEL(64, 1) column_sums(const float* x, float* y, int n) {
    alignas(16) __shared__ float stage[kStages][64];
    float sum = 0;
    for (int row = 0; row < kStages - 1; ++row) fetch(stage, x, row, n);
    for (int row = 0; row < n; ++row) {
        cp_async_wait<WAIT>();
        BARRIER
        fetch(stage, x, row + AHEAD, n);
        sum += stage[row % kStages][63 - thread_index()];
    }
    y[thread_index()] = sum;
}"""


@pytest.mark.parametrize(
    ("wait", "barrier", "ahead", "message"),
    [
        (1, "block_sync();", 2, None),
        (2, "block_sync();", 2, "cp.async not yet waited for"),
        (1, "", 2, "data race|not yet waited for|never written"),
        (1, "block_sync();", 3, "data race|not yet waited for"),  # refills the stage that is being read
    ],
)
def test_a_cp_async_pipeline(wait, barrier, ahead, message):
    source = _PIPELINE.replace("WAIT", str(wait)).replace("BARRIER", barrier).replace("AHEAD", str(ahead))
    x, y = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32), np.zeros(64, np.float32)
    module = kernels_from_text(source, "pipeline.cu")
    if message:
        with pytest.raises(EmulationError, match=message):
            module.launch("column_sums", 1, 64, [read(x), write(y), np.int32(7)])
        return
    module.launch("column_sums", 1, 64, [read(x), write(y), np.int32(7)])
    np.testing.assert_allclose(y, x.sum(0)[::-1], rtol=1e-5, atol=1e-5)


def test_struct_arguments_three_grid_dimensions_and_shared_memory_of_a_template():
    source = """#include "device.cuh"
    using namespace llmctl;
    struct Scale { float by; int n; };
    template <typename T>
    LLMCTL_DEVICE T turned(T v) {
        __shared__ T s[32];
        s[thread_index()] = v;
        block_sync();
        return s[31 - thread_index()];
    }
    LLMCTL_KERNEL(32, 1) k(const float* x, float* y, Scale scale) {
        const int at = ((block_index_z() * grid_size_y() + block_index_y()) * grid_size() + block_index()) * 32;
        y[at + thread_index()] = turned(x[at + thread_index()]) * scale.by + scale.n;
    }"""
    x, y = np.arange(2 * 3 * 4 * 32, dtype=np.float32), np.zeros(2 * 3 * 4 * 32, np.float32)
    scale = np.float32(0.5).tobytes() + np.int32(3).tobytes()
    module = kernels_from_text(source, "struct.cu")
    module.launch("k", (2, 3, 4), 32, [read(x), write(y), scale])
    assert np.array_equal(y, x.reshape(-1, 32)[:, ::-1].ravel() * 0.5 + 3)
    with pytest.raises(EmulationError, match="'scale' needs a struct of 8 bytes"):
        module.launch("k", (2, 3, 4), 32, [read(x), write(y), scale[:4]])
