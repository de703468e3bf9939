"""The emulated device functions against what PTX documents, and NVRTC's view of the same header."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator import kernels_from_text, missing, read, write

from llmctl.errors import CompileError
from llmctl.targets.cuda.compile import SOURCE_DIR, compile_module

needs_emulator = pytest.mark.skipif(missing() is not None, reason=str(missing()))

# One warp multiplies a [16, K] by b [K, 8]; fragments are gathered element by element, by the layouts in device.cuh.
_BY_HAND = """
template <typename T>
LLMCTL_DEVICE u32 pair(const T* low, const T* high) { return low->bits | static_cast<u32>(high->bits) << 16; }

template <typename T>
LLMCTL_DEVICE void multiply_by_hand(const T* a, const T* b, float* d, int k) {
    const int g = thread_index() / 4, t = thread_index() % 4;
    float sum[4] = {};
    for (int k0 = 0; k0 < k; k0 += 16) {
        u32 fa[4], fb[2];
        for (int i = 0; i < 4; ++i) {
            const T* p = a + (g + 8 * (i % 2)) * k + k0 + 2 * t + 8 * (i / 2);
            fa[i] = pair(p, p + 1);
        }
        for (int i = 0; i < 2; ++i) {
            const T* p = b + (k0 + 2 * t + 8 * i) * 8 + g;
            fb[i] = pair(p, p + 8);
        }
        mma16816<T>(sum, fa, fb);
    }
    for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}
"""

# The same through shared memory, cp.async and ldmatrix. b is given by rows [K, 8], or by columns [8, K].
_BY_LDMATRIX = """
template <typename T, bool kColumns>
LLMCTL_DEVICE void multiply_by_ldmatrix(const T* a, const T* b, float* d, int k) {
    LLMCTL_DYNAMIC_SHARED(memory);
    T* sa = reinterpret_cast<T*>(memory);
    T* sb = sa + 16 * k;
    const int lane = thread_index();
    for (int i = lane * 8; i < 16 * k; i += 256) cp_async16(sa + i, a + i);
    cp_async_commit();
    for (int i = lane * 8; i < 8 * k; i += 256) cp_async16(sb + i, b + i);
    cp_async_commit();
    cp_async_wait<0>();
    block_sync();
    float sum[4] = {};
    for (int k0 = 0; k0 < k; k0 += 16) {
        u32 fa[4], fb[2];
        ldmatrix_x4(fa, sa + (lane % 16) * k + k0 + 8 * (lane / 16));
        if (kColumns) {
            ldmatrix_x2(fb, sb + (lane % 8) * k + k0 + 8 * (lane / 8 % 2));
        } else {
            ldmatrix_x2_trans(fb, sb + (k0 + lane % 16) * 8);
        }
        mma16816<T>(sum, fa, fb);
    }
    for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = sum[i];
}
"""

_KERNELS = (
    '#include "device.cuh"\nusing namespace llmctl;\n'
    + _BY_HAND
    + _BY_LDMATRIX
    + """
#define MULTIPLY(name, T, f) LLMCTL_KERNEL(32, 1) name##_##T(const T* a, const T* b, float* d, int k) { f(a, b, d, k); }
MULTIPLY(hand, f16, multiply_by_hand<f16>)
MULTIPLY(hand, bf16, multiply_by_hand<bf16>)
#define COMMA ,
MULTIPLY(rows, f16, multiply_by_ldmatrix<f16 COMMA false>)
MULTIPLY(rows, bf16, multiply_by_ldmatrix<bf16 COMMA false>)
MULTIPLY(columns, f16, multiply_by_ldmatrix<f16 COMMA true>)
MULTIPLY(columns, bf16, multiply_by_ldmatrix<bf16 COMMA true>)

// a [16, k] and b [8, k] (columns) of int8.
LLMCTL_KERNEL(32, 1) multiply_s8(const u32* a, const u32* b, int* d, int k) {
    const int g = thread_index() / 4, t = thread_index() % 4, words = k / 4;
    int sum[4] = {};
    for (int k0 = 0; k0 < words; k0 += 8) {
        u32 fa[4], fb[2];
        for (int i = 0; i < 4; ++i) fa[i] = a[(g + 8 * (i % 2)) * words + k0 + t + 4 * (i / 2)];
        for (int i = 0; i < 2; ++i) fb[i] = b[g * words + k0 + t + 4 * i];
        mma16832_s8(sum, fa, fb);
    }
    for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

LLMCTL_KERNEL(32, 1) matrices(const u16* x, u32* y) {
    alignas(16) __shared__ u16 s[256];
    for (int i = thread_index(); i < 256; i += 32) s[i] = x[i];
    warp_sync();
    const u16* row = s + 8 * thread_index();
    u32 r1[1], r2[2], r4[4], t1[1], t2[2], t4[4];
    ldmatrix_x1(r1, row);
    ldmatrix_x2(r2, row);
    ldmatrix_x4(r4, row);
    ldmatrix_x1_trans(t1, row);
    ldmatrix_x2_trans(t2, row);
    ldmatrix_x4_trans(t4, row);
    u32* out = y + 14 * thread_index();
    out[0] = r1[0], out[1] = r2[0], out[2] = r2[1], out[7] = t1[0], out[8] = t2[0], out[9] = t2[1];
    for (int i = 0; i < 4; ++i) out[3 + i] = r4[i], out[10 + i] = t4[i];
}

LLMCTL_KERNEL(256, 1) convert(const float* x, f16* h, bf16* b, e4m3* f, s8* i, float* back, int n) {
    const int at = block_index() * 256 + thread_index();
    if (at >= n) return;
    h[at] = from_float<f16>(x[at]);
    b[at] = from_float<bf16>(x[at]);
    f[at] = from_float<e4m3>(x[at]);
    i[at] = to_s8(x[at]);
    back[3 * at] = to_float(h[at]), back[3 * at + 1] = to_float(b[at]), back[3 * at + 2] = to_float(f[at]);
}

LLMCTL_KERNEL(32, 1) arithmetic(const u32* a, const u32* b, const u32* c, u32* y) {
    const int i = block_index() * 32 + thread_index();
    y[4 * i] = packed_fma<f16>(a[i], b[i], c[i]);
    y[4 * i + 1] = packed_fma<bf16>(a[i], b[i], c[i]);
    y[4 * i + 2] = packed_sub<f16>(a[i], b[i]);
    y[4 * i + 3] = packed_sub<bf16>(a[i], b[i]);
}

LLMCTL_KERNEL(64, 1) exchange(const float* x, float* y, u32* votes) {
    const int i = thread_index();
    y[i] = shuffle_xor(x[i], 5);
    y[64 + i] = shuffle_up(x[i], 3);
    y[128 + i] = shuffle_down(x[i], 7);
    y[192 + i] = shuffle(x[i], (i * 3) % 32);
    y[256 + i] = warp_sum(x[i]);
    y[320 + i] = warp_max(x[i]);
    votes[3 * i] = vote_ballot(x[i] > 0);
    votes[3 * i + 1] = vote_any(i == 40);
    votes[3 * i + 2] = vote_all(i >= 32);
}

LLMCTL_KERNEL(32, 1) bits(const u32* a, const u32* b, u32* y) {
    const int i = thread_index();
    y[5 * i] = lop3<(0xF0 & 0xCC) | 0xAA>(a[i], b[i], 0x0f0f0f0fu);
    y[5 * i + 1] = lop3<0xF0 ^ 0xCC ^ 0xAA>(a[i], b[i], 0x12345678u);
    y[5 * i + 2] = byte_permute(a[i], b[i], 0x7150u);
    y[5 * i + 3] = static_cast<u32>(dot4_s8(a[i], b[i], -7));
    y[5 * i + 4] = static_cast<u32>(population_count(a[i]));
}
"""
)

_TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


def _module():
    return kernels_from_text(_KERNELS, "device_functions.cu")


@needs_emulator
@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize("k", [16, 48])
def test_mma_is_the_matrix_product_by_documented_fragments_and_through_ldmatrix(tag, k):
    generator = torch.Generator().manual_seed(k)
    a = torch.randn(16, k, generator=generator).to(_TORCH[tag])
    b = torch.randn(k, 8, generator=generator).to(_TORCH[tag])
    expected = a.double() @ b.double()
    for name, operand in [("hand", b), ("rows", b), ("columns", b.T.contiguous())]:
        d = torch.empty(16, 8)
        _module().launch(f"{name}_{tag}", 1, 32, [read(a), read(operand), write(d), np.int32(k)], shared=48 * k)
        torch.testing.assert_close(d.double(), expected, rtol=1e-6, atol=1e-5)


@needs_emulator
def test_a_wrong_fragment_index_gives_a_wrong_product():
    """A transposed pair of A registers (the usual mistake: 1 and 2) must not pass for right."""
    module = kernels_from_text(_KERNELS.replace("8 * (i % 2)) * k", "8 * (i / 2)) * k"), "wrong_fragment.cu")
    a, b, d = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.empty(16, 8)
    module.launch("hand_f16", 1, 32, [read(a), read(b), write(d), np.int32(16)])
    assert (d - a.float() @ b.float()).abs().max() > 0.1


@needs_emulator
def test_int8_mma_is_the_integer_matrix_product():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (16, 96), np.int8), rng.integers(-128, 128, (8, 96), np.int8)
    d = np.empty((16, 8), np.int32)
    _module().launch("multiply_s8", 1, 32, [read(a), read(b), write(d), np.int32(96)])
    assert np.array_equal(d, a.astype(np.int32) @ b.astype(np.int32).T)


@needs_emulator
def test_ldmatrix_gives_each_lane_its_row_pair_or_column_pair():
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    y = np.empty((32, 14), np.uint32)
    _module().launch("matrices", 1, 32, [read(x), write(y)])
    lane = np.arange(32)
    plain = [m[lane // 4, 2 * (lane % 4)] | m[lane // 4, 2 * (lane % 4) + 1].astype(np.uint32) << 16 for m in x]
    turned = [m[2 * (lane % 4), lane // 4] | m[2 * (lane % 4) + 1, lane // 4].astype(np.uint32) << 16 for m in x]
    expected = [plain[0], *plain[:2], *plain, turned[0], *turned[:2], *turned]
    assert np.array_equal(y, np.stack(expected, 1))


def _awkward_floats() -> torch.Tensor:
    """All f16 and bf16 values, all midpoints between f16 and e4m3 neighbours, and their float neighbours."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    halves = every.view(torch.float16).float()
    small = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    finite = torch.sort(halves[halves.isfinite()]).values
    middle = torch.cat([(finite[1:] + finite[:-1]) / 2, (small[:, None] + small[None]).flatten() / 2])
    values = torch.cat([halves, middle, torch.nextafter(middle, torch.tensor(1e9)), every.view(torch.bfloat16).float()])
    return torch.cat([values, torch.tensor([448.0, 464.0, 465.0, 1e9, -1e9, torch.inf, 127.5, -128.5, 0.5, 1.5, 2.5])])


@needs_emulator
def test_conversions_round_as_torch_does():
    x = _awkward_floats()
    n = len(x)
    h, b = torch.empty(n, dtype=torch.float16), torch.empty(n, dtype=torch.bfloat16)
    f, i = torch.empty(n, dtype=torch.float8_e4m3fn), torch.empty(n, dtype=torch.int8)
    back = torch.empty(n, 3)
    args = [read(x), write(h), write(b), write(f), write(i), write(back), np.int32(n)]
    _module().launch("convert", -(-n // 256), 256, args)
    for found, expected in [
        (h, x.half()),
        (b, x.bfloat16()),
        (f, x.clamp(-448, 448).to(torch.float8_e4m3fn)),
        (i, x.nan_to_num(0.0, 1e4, -1e4).round().clamp(-128, 127).to(torch.int8)),
        (back[:, 0], x.half()),
        (back[:, 1], x.bfloat16()),
        (back[:, 2], x.clamp(-448, 448).to(torch.float8_e4m3fn)),
    ]:
        torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


@needs_emulator
def test_packed_arithmetic_rounds_once():
    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(0, 1 << 32, 1024, np.uint32) for _ in range(3))
    y = np.empty((1024, 4), np.uint32)
    _module().launch("arithmetic", 32, 32, [read(a), read(b), read(c), write(y)])
    for column, dtype in ((0, torch.float16), (1, torch.bfloat16)):
        wa, wb, wc = (torch.from_numpy(v.view(np.int16)).view(dtype) for v in (a, b, c))
        fused, difference = _exact_sum(wa.double() * wb.double(), wc.double()), _exact_sum(wa.double(), -wb.double())
        for at, exact in ((column, fused), (column + 2, difference)):
            found = torch.from_numpy(np.ascontiguousarray(y[:, at]).view(np.int16)).view(dtype)
            torch.testing.assert_close(found, _rounded_once(exact, dtype), rtol=0, atol=0, equal_nan=True)


def _exact_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b in float64, rounded to odd: the error of the sum (Knuth's two-sum) moves it off any tie."""
    total = a + b
    other = total - a
    lost = (a - (total - other)) + (b - other)
    towards = torch.where(lost > 0, torch.inf, -torch.inf).double()
    return torch.where(total.isfinite() & (lost != 0), torch.nextafter(total, towards), total)


def _rounded_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 -> a 16-bit float. torch goes through float32; rounding to odd there keeps the second rounding right."""
    near = exact.float()
    bits = near.view(torch.int32)
    inexact = (near.double() != exact) & exact.isfinite()
    bits = torch.where(inexact & (near.double().abs() > exact.abs()), bits - 1, bits)
    return torch.where(inexact, bits | 1, bits).view(torch.float32).to(dtype)


@needs_emulator
def test_shuffles_and_votes():
    x = np.random.default_rng(3).standard_normal(64).astype(np.float32)
    y, votes = np.empty((6, 64), np.float32), np.empty((64, 3), np.uint32)
    _module().launch("exchange", 1, 64, [read(x), write(y), write(votes)])
    lane, base = np.arange(64) % 32, np.arange(64) // 32 * 32
    assert np.array_equal(y[0], x[base + (lane ^ 5)])
    assert np.array_equal(y[1], x[base + np.where(lane >= 3, lane - 3, lane)])
    assert np.array_equal(y[2], x[base + np.where(lane + 7 < 32, lane + 7, lane)])
    assert np.array_equal(y[3], x[base + np.arange(64) * 3 % 32])
    np.testing.assert_allclose(y[4], x.reshape(2, 32).sum(1).repeat(32), rtol=1e-5, atol=1e-5)
    assert np.array_equal(y[5], x.reshape(2, 32).max(1).repeat(32))
    ballots = [int(sum(1 << i for i in range(32) if x[w * 32 + i] > 0)) for w in (0, 1)]
    assert np.array_equal(votes[:, 0], np.repeat(ballots, 32))
    assert np.array_equal(votes[:, 1:], np.repeat([[0, 0], [1, 1]], 32, 0))


@needs_emulator
def test_bit_tricks():
    rng = np.random.default_rng(4)
    a, b = (rng.integers(0, 1 << 32, 32, np.uint32) for _ in range(2))
    y = np.empty((32, 5), np.uint32)
    _module().launch("bits", 1, 32, [read(a), read(b), write(y)])
    assert np.array_equal(y[:, 0], (a & b) | 0x0F0F0F0F)
    assert np.array_equal(y[:, 1], a ^ b ^ 0x12345678)
    eight = np.concatenate([a.view(np.uint8).reshape(32, 4), b.view(np.uint8).reshape(32, 4)], 1)
    assert np.array_equal(y[:, 2].copy().view(np.uint8).reshape(32, 4), eight[:, [0, 5, 1, 7]])
    dots = (a.view(np.int8).astype(np.int32) * b.view(np.int8)).reshape(32, 4).sum(1) - 7
    assert np.array_equal(y[:, 3].view(np.int32), dots)
    assert np.array_equal(y[:, 4], [bin(v).count("1") for v in a.tolist()])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvrtc_compiles_every_device_function(arch, tmp_path):
    for path in SOURCE_DIR.glob("*.cuh"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "device_functions.cu").write_text(_KERNELS + _REST)
    try:
        module = compile_module("device_functions.cu", arch, source_dir=tmp_path)
    except CompileError as error:
        if "NVRTC is not installed" in str(error):
            pytest.skip(str(error))
        raise
    assert "multiply_s8" in {kernel.name for kernel in module.resources}


# Functions that the kernels above do not call, instantiated for NVRTC.
_REST = """
LLMCTL_KERNEL(64, 1) rest(const float* x, float* y, u32* n, u64* m, int* j) {
    alignas(16) __shared__ float s[64];
    __shared__ float scratch[2];
    const int i = thread_index() + block_size() * (block_index() + block_index_y() + block_index_z());
    cp_async16_zero_fill(s + 4 * (i % 16), x, i % 16);
    cp_async_commit();
    cp_async_wait<1>();
    const Vec16 a = load16_stream(x + 4 * i), c = load16_const(x + 8 * i);
    store8(y + 2 * i, load8(x + 2 * i));
    store16(y + 4 * i, load16(x + 4 * i));
    y[i] += fast_exp2(x[i]) + reciprocal_sqrt(x[i]) + fused_multiply_add(x[i], 2.0f, 1.0f) + lane16<bf16>(a, 3);
    y[i] += block_sum<64>(x[i], scratch);
    block_sync();
    y[i] += block_max<64>(x[i], scratch);
    device_fence();
    n[i] = pack16<f16>(x[i], 1.0f) + pack_s8(x[i], 1.0f, 2.0f, 3.0f) + c.w[0];
    n[0] = atomic_add(n + 1, 1u) + atomic_max(n + 2, 3u) + shuffle(n[i], 1) + shuffle_xor(n[i], 2);
    m[0] = atomic_max(m + 1, static_cast<u64>(5));
    j[0] = atomic_add(j + 1, 1) + shuffle_up(i, 1) + shuffle_down(i, 1) + shuffle(i, 2) + shuffle_xor(i, 1);
    y[0] = atomic_add(y + 1, 1.0f) + to_float(from_float<float>(2.0f)) + grid_size() + grid_size_y() + grid_size_z();
}
"""
