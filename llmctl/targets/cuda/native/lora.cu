// LoRA for several adapters in one batch (Hu et al. 2021; batched as in Punica, Chen et al. 2023):
//   shrink   h = x A^T          per split of the columns of x, fp32
//   expand   y += scale * h B^T  over the splits in order, h rounded to T
// where every row has its own adapter, or none (-1).
//
// A block takes 16 rows. It goes through the distinct adapters among them, lowest row first, and for each runs
// tensor-core products over all 16 with the rows of others as zeros: one pass for the rows of one prompt, at most 16
// for a decode batch, where every adapter's weights are still read once per 16 rows. Operands go from global memory
// straight to fragments with 16-byte (8-byte) loads: mma adds over k in any order, so lane t of four may hold 8
// consecutive columns where the layout wants 2 and 2, as long as both operands agree. Splits are fixed by `slice`,
// sums are in fixed order: a row has the same bits in any batch.
//
// Shapes: x T rows of k, x_stride apart; a T [adapters, rank, k]; b T [adapters, n, rank]; adapters i32 [tokens]; h f32
// [splits, tokens, rank], splits = ceil(k / slice); scales f32 [adapters]; y T rows of n, y_stride apart, updated in
// place. Rows without an adapter are neither read nor written. Adapters of smaller ranks are padded with zeros. rank %
// 8 == 0, <= 64 (entries _r16: <= 16); k % 8 == n % 8 == 0; slice % 32 == 0; x_stride % 8 == 0, y_stride % 2 == 0;
// pointers aligned to 16 bytes (y: 4).
// Grids: shrink (ceil(tokens / 16), splits), expand (ceil(tokens / 16), ceil(n / 128)); 128 threads.
//
// Numbers, k = n = 4096, rank 16, bf16: shrink reads 128 KB of A an adapter and 8 KB of x a row, expand 128 KB of B and
// 16 KB of y a row. Batch 32 with 8 adapters: 2.4 MB, 0.6 us at 4.3 TB/s, so both are launch-bound (2 to 3 us each).
// 8192 rows of one adapter: 67 MB and 134 MB, 50 us at 4.3 TB/s; 2 x 1.1 GFLOP are nothing.
#include "device.cuh"

namespace llmctl {
namespace lora {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 16;
constexpr int kStep = 32;     // columns of x a warp multiplies at a time
constexpr int kColumns = 32;  // of y, a warp

// The adapters of a block's 16 rows, one after another; the same in every warp.
struct Adapters {
    int own;      // lanes 0..15: the row's
    u32 left;     // rows not yet done
    int current;  // adapter
    u32 members;  // its rows

    LLMCTL_METHOD Adapters(const int* adapters, int first, int tokens) {
        const int row = first + lane_index();
        own = lane_index() < kRows && row < tokens ? adapters[row] : -1;
        left = vote_ballot(own >= 0);
        current = -1;
        members = 0;
    }
    LLMCTL_METHOD bool next() {
        if (left == 0) return false;
        current = shuffle(own, population_count(~left & (left - 1)));
        members = vote_ballot(own == current);
        left &= ~members;
        return true;
    }
    LLMCTL_METHOD bool has(int row) const { return (members >> row & 1u) != 0; }
};

template <typename T, int kRanks>
LLMCTL_DEVICE void shrink(const T* x, const T* a, const int* adapters, float* h, int tokens, int k, int rank,
                          int x_stride, int slice) {
    constexpr int kTiles = kRanks / 8;
    __shared__ float sums[kWarps][kRows][kRanks];
    const int first = block_index() * kRows, g = lane_index() / 4, t = lane_index() % 4;
    const int begin = block_index_y() * slice, end = begin + slice < k ? begin + slice : k;
    Adapters mine(adapters, first, tokens);
    while (mine.next()) {
        const T* weights = a + static_cast<long long>(mine.current) * rank * k;
        float d[kTiles][4] = {};
        for (int at = begin + warp_index() * kStep + 8 * t; at - 8 * t < end; at += kWarps * kStep) {
            Vec16 rows[2] = {};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const long long row = first + g + 8 * i;
                if (at < end && mine.has(g + 8 * i)) rows[i] = load16_const(x + row * x_stride + at);
            }
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                if (8 * n >= rank) break;
                Vec16 column{};
                if (at < end) column = load16_const(weights + static_cast<long long>(8 * n + g) * k + at);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const u32 left[4] = {rows[0].w[2 * half], rows[1].w[2 * half], rows[0].w[2 * half + 1],
                                         rows[1].w[2 * half + 1]};
                    const u32 right[2] = {column.w[2 * half], column.w[2 * half + 1]};
                    mma16816<T>(d[n], left, right);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[warp_index()][g + e / 2 * 8][8 * n + 2 * t + e % 2] = d[n][e];
        }
        block_sync();
        for (int i = thread_index(); i < kRows * rank; i += kThreads) {
            const int row = i / rank, column = i % rank;
            if (!mine.has(row)) continue;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += sums[w][row][column];
            h[(static_cast<long long>(block_index_y()) * tokens + first + row) * rank + column] = sum;
        }
        block_sync();
    }
}

// Four consecutive ranks of a row of h, summed over the splits.
LLMCTL_DEVICE void add_splits(const float* h, int splits, long long split_stride, float (&v)[4]) {
    for (int s = 0; s < splits; ++s) {
        const Vec16 part = load16_const(h + s * split_stride);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] += bits_to_float(part.w[j]);
    }
}

template <typename T, int kRanks>
LLMCTL_DEVICE void expand(const float* h, const T* b, const float* scales, const int* adapters, T* y, int tokens, int n,
                          int rank, int splits, int y_stride) {
    constexpr int kSteps = kRanks / 16;
    const int first = block_index() * kRows, g = lane_index() / 4, t = lane_index() % 4;
    const int base = (block_index_y() * kWarps + warp_index()) * kColumns;
    Adapters mine(adapters, first, tokens);
    while (mine.next()) {
        u32 left[kSteps][4];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float v[4] = {};
                const int from = 16 * step + 4 * t;
                if (from < rank && mine.has(g + 8 * i)) {
                    add_splits(h + static_cast<long long>(first + g + 8 * i) * rank + from, splits,
                               static_cast<long long>(tokens) * rank, v);
                }
                left[step][i] = packed_from_floats<T>(v[0], v[1]);
                left[step][2 + i] = packed_from_floats<T>(v[2], v[3]);
            }
        }
        const T* weights = b + static_cast<long long>(mine.current) * n * rank;
        const float scale = scales[mine.current];
#pragma unroll
        for (int tile = 0; tile < kColumns / 8; ++tile) {
            const int column = base + 8 * tile;
            if (column >= n) break;
            float d[4] = {};
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const int from = 16 * step + 4 * t;
                Vec8 v{};
                if (from < rank) v = load8(weights + static_cast<long long>(column + g) * rank + from);
                const u32 right[2] = {v.w[0], v.w[1]};
                mma16816<T>(d, left[step], right);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (!mine.has(g + 8 * i)) continue;
                const long long row = first + g + 8 * i;
                u32* to = reinterpret_cast<u32*>(y + row * y_stride + column + 2 * t);
                const u32 old = *to;
                *to = packed_from_floats<T>(to_float(T{static_cast<u16>(old)}) + scale * d[2 * i],
                                            to_float(T{static_cast<u16>(old >> 16)}) + scale * d[2 * i + 1]);
            }
        }
    }
}

}  // namespace lora
}  // namespace llmctl

#define LLMCTL_LORA(T, RANKS)                                                                                     \
    LLMCTL_KERNEL(llmctl::lora::kThreads, 4)                                                                      \
    lora_shrink_##T##_r##RANKS(const llmctl::T* x, const llmctl::T* a, const int* adapters, float* h, int tokens, \
                               int k, int rank, int x_stride, int slice) {                                        \
        llmctl::lora::shrink<llmctl::T, RANKS>(x, a, adapters, h, tokens, k, rank, x_stride, slice);              \
    }                                                                                                             \
    LLMCTL_KERNEL(llmctl::lora::kThreads, 4)                                                                      \
    lora_expand_##T##_r##RANKS(const float* h, const llmctl::T* b, const float* scales, const int* adapters,      \
                               llmctl::T* y, int tokens, int n, int rank, int splits, int y_stride) {             \
        llmctl::lora::expand<llmctl::T, RANKS>(h, b, scales, adapters, y, tokens, n, rank, splits, y_stride);     \
    }

LLMCTL_LORA(f16, 16)
LLMCTL_LORA(f16, 64)
LLMCTL_LORA(bf16, 16)
LLMCTL_LORA(bf16, 64)
