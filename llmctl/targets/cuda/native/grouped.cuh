// Products of a mixture's experts: each row of x by the matrix of the expert that it chose, over blocks of rows.
//
// A slot is one choice of one token: slot / chosen is the token, and y has a row a slot. A block takes one tile of 32
// packed rows of one expert's matrix, and up to 8 (entries _m16: 16) slots that chose that expert: `blocks` says which,
// i32 [blocks][4]: expert, first place in `order`, slots, 0; `order`: the slots, by expert (group_slots of experts.cu
// makes both). Null: block z takes slot z alone, which is how a token that is alone reads its experts' weights and no
// others. x has a row for every `share` slots: chosen where a token's choices share its row, 1 where each has its own.
// Nothing is shared out over blocks, and a slot's sums know no other slot: a row has the same bits in any batch.
#pragma once
#include "gemm_stream.cuh"

namespace llmctl {
namespace grouped {

// A block's slots as gemm_tail.cuh's rows.
struct Slots {
    const int* order;
    int first, share;

    LLMCTL_METHOD int slot(int token) const { return order ? order[first + token] : first; }
    LLMCTL_METHOD long long x(int token) const { return slot(token) / share; }
    LLMCTL_METHOD long long y(int token) const { return slot(token); }
};

struct Block {
    int expert, first, count;
};

LLMCTL_DEVICE Block block_of(const int* chosen, const int* blocks) {
    const int z = block_index_z();
    if (!blocks) return Block{chosen[z], z, 1};
    return Block{blocks[4 * z], blocks[4 * z + 1], blocks[4 * z + 2]};
}

template <typename T>
LLMCTL_DEVICE gemm::Tail<T> tail_of(T* y, const Block& block, int n, int activation) {
    return gemm::Tail<T>{nullptr, nullptr, nullptr, y, nullptr, nullptr, block.count, n, activation};
}

template <typename T, int kBits, int kGroupChunks, int kTokenTiles, typename Values>
LLMCTL_DEVICE void quantized(const T* x, const int* chosen, const int* order, const int* blocks, const u8* codes,
                             const f16* scales, const u8* zeros, const Values& book, T* y, int n, int k, int share,
                             int group_size, int activation, u8* shared) {
    const Block block = block_of(chosen, blocks);
    if (block.count == 0) return;
    const Slots slots{order, block.first, share};
    gemm::stream<T, kBits, kGroupChunks, kTokenTiles>(x, codes, scales, zeros, book,
                                                      tail_of(y, block, n, activation), k, group_size, shared,
                                                      static_cast<long long>(block.expert) * grid_size(), slots);
}

constexpr int kChunk = 32;   // columns: 8 a lane, the fragment itself, as x has it in gemm_stream.cuh
constexpr int kUnrolled = 2;  // chunks whose loads are under way together: 8 x 16 bytes a lane

// The sums of a dense tile over this warp's chunks. row: the weight's four rows of this lane, null past the end.
template <typename T, int kTokenTiles>
LLMCTL_DEVICE void dense_sums(float (&total)[kTokenTiles][2][4], const T* const (&row)[4], const T* x, int k,
                              const Slots& slots, int count) {
    const int g = lane_index() / 4, t = lane_index() % 4, stride = block_size() / kWarp * kChunk;
    const T* token[kTokenTiles];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) token[j] = g + 8 * j < count ? x + slots.x(g + 8 * j) * k : nullptr;
#pragma unroll 1
    for (int at = warp_index() * kChunk; at < k; at += kUnrolled * stride) {
        Vec16 w[kUnrolled][4], v[kUnrolled][kTokenTiles];
#pragma unroll
        for (int u = 0; u < kUnrolled; ++u) {
            const int column = at + u * stride + 8 * t;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                w[u][i] = row[i] && column < k ? load16_stream(row[i] + column) : Vec16{{0, 0, 0, 0}};
            }
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
                v[u][j] = token[j] && column < k ? load16_const(token[j] + column) : Vec16{{0, 0, 0, 0}};
            }
        }
#pragma unroll
        for (int u = 0; u < kUnrolled; ++u) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = i / 2, s = i % 2;
                const u32 a[4] = {w[u][2 * r].w[2 * s], w[u][2 * r + 1].w[2 * s], w[u][2 * r].w[2 * s + 1],
                                  w[u][2 * r + 1].w[2 * s + 1]};
#pragma unroll
                for (int j = 0; j < kTokenTiles; ++j) {
                    const u32 b[2] = {v[u][j].w[2 * s], v[u][j].w[2 * s + 1]};
                    mma16816<T>(total[j][r], a, b);
                }
            }
        }
    }
}

// w: T [experts][n][k], of a gated one gate's rows above up's; they meet as if interleaved by eights.
template <typename T, int kTokenTiles>
LLMCTL_DEVICE void dense(const T* x, const int* chosen, const int* order, const int* blocks, const T* w, T* y, int n,
                         int k, int share, int activation, u8* shared) {
    const Block block = block_of(chosen, blocks);
    if (block.count == 0) return;
    const Slots slots{order, block.first, share};
    const T* const matrix = w + static_cast<long long>(block.expert) * n * k;
    const int g = lane_index() / 4, warps = block_size() / kWarp, row0 = block_index() * gemm::kTileRows;
    const bool gated = activation != gemm::kPlain;
    const T* row[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int outputs = gated ? n / 2 : n;
        const int output = gated ? row0 / 2 + i / 2 * 8 + g : row0 + i * 8 + g;
        const long long at = output + (gated && i % 2 ? outputs : 0);
        row[i] = output < outputs ? matrix + at * k : nullptr;
    }
    float total[kTokenTiles][2][4] = {};
    dense_sums<T, kTokenTiles>(total, row, x, k, slots, block.count);
    constexpr int kPart = 8 * kTokenTiles * gemm::kStreamStride;
    float* const parts = reinterpret_cast<float*>(shared);
    gemm::store_sums<kTokenTiles>(parts + warp_index() * kPart, total);
    block_sync();
    const gemm::TilePlace place{row0, 0, block.count, 0, 1, 0, 1};
    gemm::finish<T, gemm::kTileRows, 8 * kTokenTiles, gemm::kStreamStride>(tail_of(y, block, n, activation), place, parts,
                                                                     warps, kPart, slots);
}

}  // namespace grouped
}  // namespace llmctl

// Entry points by activation dtype, code width, group and slots a block; registers as LLMCTL_STREAM's.
#define LLMCTL_GROUPED_OF(NAME, T, BITS, GROUP, ROWS, VALUES)                                                          \
    LLMCTL_KERNEL(llmctl::gemm::kStreamThreads, GROUP == 32 && ROWS == 16 ? 1 : 2)                                     \
    NAME##_##T##_g##GROUP##_m##ROWS(const llmctl::T* x, const int* chosen, const int* order, const int* blocks,       \
                                    const u8* codes, const llmctl::f16* scales, const u8* zeros, llmctl::T* y, int n,  \
                                    int k, int share, int group_size, int activation) {                                \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                 \
        llmctl::grouped::quantized<llmctl::T, BITS, GROUP / 32, ROWS / 8>(x, chosen, order, blocks, codes, scales,     \
                                                                          zeros, llmctl::gemm::VALUES{}, y, n, k,      \
                                                                          share, group_size, activation, shared);      \
    }

#define LLMCTL_GROUPED(NAME, T, BITS, GROUP, ROWS) LLMCTL_GROUPED_OF(NAME, T, BITS, GROUP, ROWS, NoBook)
#define LLMCTL_FLOAT8_GROUPED(NAME, T, GROUP, ROWS) LLMCTL_GROUPED_OF(NAME, T, 8, GROUP, ROWS, Float8)

// Of groups of 16 or 32 columns, with minimums unless they are null.
#define LLMCTL_MINIMUM_GROUPED(NAME, T, BITS, GROUP, ROWS)                                                             \
    LLMCTL_KERNEL(llmctl::gemm::kStreamThreads, ROWS == 16 ? 1 : 2)                                                    \
    NAME##_##T##_g##GROUP##_m##ROWS(const llmctl::T* x, const int* chosen, const int* order, const int* blocks,        \
                                    const u8* codes, const llmctl::f16* scales, const llmctl::f16* minimums,           \
                                    llmctl::T* y, int n, int k, int share, int group_size, int activation) {           \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                 \
        llmctl::grouped::quantized<llmctl::T, BITS, GROUP / 32, ROWS / 8>(                                             \
            x, chosen, order, blocks, codes, scales, nullptr, llmctl::gemm::Minimums{minimums}, y, n, k, share,        \
            group_size, activation, shared);                                                                           \
    }

// Of 4-bit codes of a code book; book: its values, f32 [16].
#define LLMCTL_BOOK_GROUPED(NAME, T, GROUP, ROWS)                                                                      \
    LLMCTL_KERNEL(llmctl::gemm::kStreamThreads, GROUP == 32 && ROWS == 16 ? 1 : 2)                                     \
    NAME##_##T##_g##GROUP##_m##ROWS(const llmctl::T* x, const int* chosen, const int* order, const int* blocks,        \
                                    const u8* codes, const llmctl::f16* scales, const float* book, llmctl::T* y,       \
                                    int n, int k, int share, int group_size, int activation) {                         \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                 \
        llmctl::grouped::quantized<llmctl::T, 4, GROUP / 32, ROWS / 8>(                                                \
            x, chosen, order, blocks, codes, scales, nullptr, llmctl::gemm::read_book<llmctl::T>(book), y, n, k,       \
            share, group_size, activation, shared);                                                                    \
    }
