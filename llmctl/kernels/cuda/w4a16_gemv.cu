// y = x @ dequantize(codes).T + bias for 1..8 rows of x: the decode-time linear, bound by reading the 4-bit codes.
//
//   w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],   g = k / group_size
//
// Shapes: x [rows, k] T; codes u8 [n, k/2], the low nibble is the even column; scales f16 [n, groups]; zeros u8
// [n, groups], or null for the symmetric zero 8; bias T [n] or null; y [rows, n] T. k % 32 == 0; group_size % 32 == 0
// and k % group_size == 0 (per channel: group_size == k); x and codes multiples of 16 bytes.
// Grid: ceil(n / C) blocks of 128 threads, C = 4 for the _m1 and _m2 entries, 2 for _m4 and _m8 (more would spill);
// a block makes C output columns for all rows.
//
// The 4 warps of a block split k: a thread takes 32 codes (one 16-byte load) of each of the C output columns at a time,
// which lie in one group, so scale and zero are applied once a chunk: sum x*(q-z) = sum x*q - z * sum x. The reduction
// (butterfly in a warp, then warps 0..3 in order) has one fixed order for a row whatever else is in the batch.
#include "device.cuh"

namespace llmctl {
namespace gemv {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = 32;

// A code 0..15 as a float without an int-to-float conversion: 2^23 + q has q in its lowest mantissa bits.
LLMCTL_DEVICE float code_to_float(u32 word, int nibble) {
    return bits_to_float(0x4B000000u | ((word >> (4 * nibble)) & 15u)) - 8388608.0f;
}

template <typename T, int kRows, int kColumns>
LLMCTL_DEVICE void columns(const T* x, const u8* codes, const f16* scales, const u8* zeros, const T* bias, T* y,
                           int rows, int n, int k, int group_size, float (*partial)[kColumns * kRows]) {
    const int column0 = block_index() * kColumns;
    const int groups = k / group_size;
    float total[kColumns][kRows] = {};
    for (int chunk = thread_index(); chunk < k / kChunk; chunk += kThreads) {
        const int k0 = chunk * kChunk;
        const int group = k0 / group_size;
        Vec16 q[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            // Columns past the end repeat the last one; their sums are dropped below.
            const int column = column0 + c < n ? column0 + c : n - 1;
            q[c] = load16_stream(codes + static_cast<long long>(column) * (k / 2) + k0 / 2);
        }
        float sums[kColumns][kRows] = {};
        float x_sum[kRows] = {};
#pragma unroll
        for (int part = 0; part < 4; ++part) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int x_row = r < rows ? r : 0;
                const Vec16 v = load16_const(x + static_cast<long long>(x_row) * k + k0 + part * 8);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float value = lane16<T>(v, i);
                    x_sum[r] += value;
#pragma unroll
                    for (int c = 0; c < kColumns; ++c) {
                        sums[c][r] = fused_multiply_add(value, code_to_float(q[c].w[part], i), sums[c][r]);
                    }
                }
            }
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const int column = column0 + c < n ? column0 + c : n - 1;
            const long long at = static_cast<long long>(column) * groups + group;
            const float scale = to_float(scales[at]);
            const float zero = zeros ? static_cast<float>(zeros[at]) : 8.0f;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                total[c][r] = fused_multiply_add(scale, fused_multiply_add(-zero, x_sum[r], sums[c][r]), total[c][r]);
            }
        }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float v = warp_sum(total[c][r]);
            if (thread_index() % kWarp == 0) partial[thread_index() / kWarp][c * kRows + r] = v;
        }
    }
    block_sync();
    const int c = thread_index() / kRows;
    const int r = thread_index() % kRows;
    if (c < kColumns && r < rows && column0 + c < n) {
        float v = bias ? to_float(bias[column0 + c]) : 0.0f;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) v += partial[warp][c * kRows + r];
        y[static_cast<long long>(r) * n + column0 + c] = from_float<T>(v);
    }
}

}  // namespace gemv
}  // namespace llmctl

#define LLMCTL_GEMV(T, ROWS, COLUMNS)                                                                                 \
    LLMCTL_KERNEL(llmctl::gemv::kThreads, ROWS < 8 ? 4 : 3)                                                           \
    w4a16_gemv_##T##_m##ROWS(const llmctl::T* x, const u8* codes, const llmctl::f16* scales, const u8* zeros,         \
                             const llmctl::T* bias, llmctl::T* y, int rows, int n, int k, int group_size) {           \
        __shared__ float partial[llmctl::gemv::kWarps][COLUMNS * ROWS];                                               \
        llmctl::gemv::columns<llmctl::T, ROWS, COLUMNS>(x, codes, scales, zeros, bias, y, rows, n, k, group_size,     \
                                                        partial);                                                     \
    }

LLMCTL_GEMV(f16, 1, 4)
LLMCTL_GEMV(f16, 2, 4)
LLMCTL_GEMV(f16, 4, 2)
LLMCTL_GEMV(f16, 8, 2)
LLMCTL_GEMV(bf16, 1, 4)
LLMCTL_GEMV(bf16, 2, 4)
LLMCTL_GEMV(bf16, 4, 2)
LLMCTL_GEMV(bf16, 8, 2)
