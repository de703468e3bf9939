// The tensor-core kernel: y = x @ w.T for middle numbers of rows, weights and x through cp.async stages.
//
// A block makes 128 rows (4 tiles, a warp each) by 8 kTokenTiles tokens, over the share of K that grid z gives it. A
// block of 256 threads has two halves of four warps that share K once more and add their sums in shared memory. A stage
// holds 64 columns: of each warp's own tile the codes, scales and zeros; of x the fragments, 16 bytes a lane (8 of
// int8), [chunk][token][32 columns]. One barrier a stage: it publishes x and retires the slot to be filled next.
// Codes are dequantised in registers to exact integers code - zero, multiplied with kTokenTiles x 8 tokens, and the
// fp32 (int8: exact int32) sums scaled at the end of each group. Groups are any multiple of 32 columns; beside minimums
// 16 or 32.
#pragma once
#include "dequant.cuh"
#include "gemm_tail.cuh"

namespace llmctl {
namespace gemm {

constexpr int kTileWarps = 4;
constexpr int kBlockRows = kTileWarps * kTileRows;
constexpr int kHalfThreads = kTileWarps * kWarp;
constexpr int kStageChunks = 2;
constexpr int kBlockStride = kBlockRows + 4;  // 2 t * 132 = 8 t mod 32: distinct banks

// What the kernel multiplies: X is f16, bf16, or s8 (int8 activations and 8-bit codes around 128).
template <typename X, int kBits, int kTokenTiles, typename Values = NoBook>
struct TileShape {
    static constexpr bool kHalves = kHasMinimums<Values>;  // groups may end within a chunk
    static constexpr int kStageParts = kHalves ? 2 * kStageChunks : kStageChunks;  // the most groups of a stage
    static constexpr bool kInt8 = sizeof(X) == 1;
    static constexpr int kTokens = 8 * kTokenTiles;
    static constexpr int kRowBytes = kChunkColumns * static_cast<int>(sizeof(X));
    static constexpr int kXBytes = kStageChunks * kTokens * kRowBytes;
    static constexpr int kCodeBytes = kStageChunks * Codes<kBits>::kBytes;           // of a warp
    static constexpr int kScaleBytes = kStageParts * kTileRows * 2;
    static constexpr int kWarpBytes = kCodeBytes + kScaleBytes + kStageParts * kTileRows * (kHalves ? 2 : 1);
    static constexpr int kStageBytes = kXBytes + kTileWarps * kWarpBytes;
    static constexpr int kStages = kStageBytes > 12 * 1024 ? 3 : 4;
    static constexpr int kRing = kStages * kStageBytes;  // of a half
    static_assert(kRing >= kTokens * kBlockStride * 4, "the sums reuse the ring");
};

template <typename X>
struct TileSource {
    const X* x;        // of the block's first token
    const u8* codes;   // of the warp's tile, as are scales and zeros
    const f16* scales;
    const u8* zeros;
    const f16* minimums;
    int tokens, k, group_parts;  // chunks a group; beside minimums, halves of chunks
};

template <typename X, int kBits, int kTokenTiles, typename Values>
LLMCTL_DEVICE void copy_stage(u8* stage, const TileSource<X>& from, int step) {
    using Shape = TileShape<X, kBits, kTokenTiles, Values>;
    constexpr int kPieces = Shape::kRowBytes / 16;  // of one token's chunk
    constexpr int kPerPiece = 16 / static_cast<int>(sizeof(X));
    const int thread = thread_index() % kHalfThreads, lane = lane_index();
#pragma unroll
    for (int i = 0; i < Shape::kXBytes / 16; i += kHalfThreads) {
        const int piece = i + thread;
        const int token = piece / kPieces % Shape::kTokens, chunk = piece / (kPieces * Shape::kTokens);
        const int column = (step * kStageChunks + chunk) * kChunkColumns + piece % kPieces * kPerPiece;
        const bool there = token < from.tokens && column < from.k;
        const X* const at = there ? from.x + static_cast<long long>(token) * from.k + column : from.x;
        if (Shape::kXBytes / 16 % kHalfThreads == 0 || piece < Shape::kXBytes / 16) {
            // Pieces of 8 bytes of a token's 64 are read by 16 lanes of four tokens: every second pair of tokens has its
            // halves exchanged, so that they fall into distinct banks.
            const int place = Shape::kHalves ? piece ^ (token >> 1 & 1) << 1 : piece;
            cp_async16_zero_fill(stage + place * 16, at, there ? 16 : 0);
        }
    }
    u8* const mine = stage + Shape::kXBytes + warp_index() % kTileWarps * Shape::kWarpBytes;
    const u8* const codes = from.codes + static_cast<long long>(step) * Shape::kCodeBytes;
#pragma unroll
    for (int i = 0; i < Shape::kCodeBytes; i += 16 * kWarp) cp_async16(mine + i + lane * 16, codes + i + lane * 16);
    const int first = step * Shape::kStageParts / from.group_parts;
    const int count = (step * Shape::kStageParts + Shape::kStageParts - 1) / from.group_parts - first + 1;
    if (lane < count * 4) {
        cp_async16(mine + Shape::kCodeBytes + lane * 16, from.scales + first * kTileRows + lane * 8);
        if (Shape::kHalves && from.minimums) {
            cp_async16(mine + Shape::kCodeBytes + Shape::kScaleBytes + lane * 16,
                       from.minimums + first * kTileRows + lane * 8);
        }
    } else if (from.zeros && lane >= 16 && lane < 16 + count * 2) {
        cp_async16(mine + Shape::kCodeBytes + Shape::kScaleBytes + (lane - 16) * 16,
                   from.zeros + first * kTileRows + (lane - 16) * 16);
    }
}

// The sums of one chunk: sum[j] += (code - zero) of the tile times token tile j.
template <typename X, int kBits, int kTokenTiles, typename Sum, typename Values>
LLMCTL_DEVICE void multiply_chunk(Sum (&sum)[kTokenTiles][2][4], const Codes<kBits>& codes, const u8* x, u32 zeros,
                                  const Values& book) {
    using Shape = TileShape<X, kBits, kTokenTiles>;
    const int lane = lane_index();
    if constexpr (Shape::kInt8) {
        u32 a[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = codes.vector[i / 4].w[i % 4] ^ 0x80808080u;
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
            const Vec8 v = load8(x + (j * kWarp + lane) * 8);
#pragma unroll
            for (int r = 0; r < 2; ++r) mma16832_s8(sum[j][r], a[r], v.w);
        }
    } else {
        u32 a[2][2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const ZeroPair zero = zero_pair<X, kBits>(zeros, r);
#pragma unroll
            for (int s = 0; s < 2; ++s) fragment<X, kBits>(a[r][s], codes, r, s, zero, book);
        }
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
            const Vec16 v = load16(x + (j * kWarp + lane) * 16);
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const u32 b[2] = {v.w[2 * s], v.w[2 * s + 1]};
#pragma unroll
                for (int r = 0; r < 2; ++r) mma16816<X>(sum[j][r], a[r][s], b);
            }
        }
    }
}

// The sums of k-step s of a chunk, beside minimums: sum[j] as above, of_x[j] += x of token tile j.
template <typename T, int kBits, int kTokenTiles>
LLMCTL_DEVICE void multiply_half(float (&sum)[kTokenTiles][2][4], float (&of_x)[kTokenTiles][4],
                                 const Codes<kBits>& codes, const u8* x, int s, const Minimums& minimums) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    const ZeroPair zero = zero_pair<T, kBits>(zeros_beside<kBits>(minimums), 0);
    u32 a[2][4], one[4];
#pragma unroll
    for (int r = 0; r < 2; ++r) fragment<T, kBits>(a[r], codes, r, s, zero, minimums);
    ones<T>(one);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
        const Vec8 v = load8(x + (8 * j + g) * 64 + (s ^ (g >> 1 & 1)) * 32 + t * 8);  // see copy_stage
#pragma unroll
        for (int r = 0; r < 2; ++r) mma16816<T>(sum[j][r], a[r], v.w);
        if (minimums.plane) mma16816<T>(of_x[j], one, v.w);
    }
}

// Sums are fp32, but exact integers with int8 activations.
template <typename X>
struct SumOf {
    using type = float;
};
template <>
struct SumOf<s8> {
    using type = int;
};

template <int kTokenTiles, typename Sum>
LLMCTL_DEVICE void scale_sums(float (&total)[kTokenTiles][2][4], Sum (&sum)[kTokenTiles][2][4], const Vec8& scales) {
    float scale[4];
    unpack_scales(scale, scales);
#pragma unroll
    for (int i = 0; i < 8 * kTokenTiles; ++i) {
        float& to = total[i / 8][i / 4 % 2][i % 4];
        Sum& from = sum[i / 8][i / 4 % 2][i % 4];
        to = fused_multiply_add(scale[i / 2 % 4], static_cast<float>(from), to);
        from = 0;
    }
}

template <typename X, int kBits, int kTokenTiles, typename Values>
LLMCTL_DEVICE void tile_sums(float (&total)[kTokenTiles][2][4], const TileSource<X>& source, const Values& book,
                             u8* ring, int begin, int end, int rounds) {
    using Shape = TileShape<X, kBits, kTokenTiles, Values>;
    const int lane = lane_index(), g = lane / 4;
#pragma unroll
    for (int i = 0; i < Shape::kStages - 1; ++i) {
        if (begin + i < end) {
            copy_stage<X, kBits, kTokenTiles, Values>(ring + i * Shape::kStageBytes, source, begin + i);
        }
        cp_async_commit();
    }
    typename SumOf<X>::type sum[kTokenTiles][2][4] = {};
    [[maybe_unused]] float of_x[Shape::kHalves ? kTokenTiles : 1][4] = {};
    int left = source.group_parts - begin * Shape::kStageParts % source.group_parts;  // parts to the end of the group
    int slot = 0;
    const int last = begin + rounds;
#pragma unroll 1
    for (int step = begin; step < last; ++step) {
        cp_async_wait<Shape::kStages - 2>();
        block_sync();
        const int fill = slot == 0 ? Shape::kStages - 1 : slot - 1;
        if (step + Shape::kStages - 1 < end) {
            copy_stage<X, kBits, kTokenTiles, Values>(ring + fill * Shape::kStageBytes, source,
                                                      step + Shape::kStages - 1);
        }
        cp_async_commit();
        if (step < end) {
            const u8* const x = ring + slot * Shape::kStageBytes;
            const u8* const mine = x + Shape::kXBytes + warp_index() % kTileWarps * Shape::kWarpBytes;
            int group = 0;
#pragma unroll
            for (int chunk = 0; chunk < kStageChunks; ++chunk) {
                Codes<kBits> codes;
#pragma unroll
                for (int v = 0; v < Codes<kBits>::kVectors; ++v) {
                    codes.vector[v] = load16(mine + ((chunk * Codes<kBits>::kVectors + v) * kWarp + lane) * 16);
                }
                const u8* const of_chunk = x + chunk * Shape::kTokens * Shape::kRowBytes;
                if constexpr (Shape::kHalves) {
#pragma unroll
                    for (int s = 0; s < 2; ++s) {
                        multiply_half<X, kBits, kTokenTiles>(sum, of_x, codes, of_chunk, s, book);
                        if (--left == 0) {  // a group of 16 or 32 columns ends in its stage
                            const u8* const at = mine + Shape::kCodeBytes + (group * kTileRows + g * 4) * 2;
                            const u8* const side = at + (book.plane ? Shape::kScaleBytes : 0);
                            scale_group(total, sum, of_x, load8(at), load8(side), book.plane != nullptr);
                            left = source.group_parts;
                            ++group;
                        }
                    }
                } else {
                    u32 zeros = kSymmetricZeros<kBits>;
                    if (source.zeros) {
                        zeros = *reinterpret_cast<const u32*>(mine + Shape::kCodeBytes + Shape::kScaleBytes +
                                                              group * kTileRows + g * 4);
                    }
                    multiply_chunk<X, kBits, kTokenTiles>(sum, codes, of_chunk, zeros, book);
                    if (--left == 0 || (chunk == kStageChunks - 1 && step + 1 == end)) {
                        scale_sums(total, sum, load8(mine + Shape::kCodeBytes + (group * kTileRows + g * 4) * 2));
                        left = source.group_parts;
                        ++group;
                    }
                }
            }
        }
        slot = slot == Shape::kStages - 1 ? 0 : slot + 1;
    }
    block_sync();
}

template <typename T, typename X, int kBits, int kTokenTiles, typename Values>
LLMCTL_DEVICE void tile_gemm(const X* x, const u8* codes, const f16* scales, const u8* zeros, const Values& book,
                             const Tail<T>& tail, int k, int group_size, u8* shared) {
    using Shape = TileShape<X, kBits, kTokenTiles, Values>;
    const int halves = block_size() / kHalfThreads, half = warp_index() / kTileWarps;
    const int padded = (k + kStepColumns - 1) / kStepColumns * kStepColumns;
    const int steps = padded / (kStageChunks * kChunkColumns);
    const int groups = (padded + group_size - 1) / group_size;
    const int workers = halves * grid_size_z(), worker = block_index_z() * halves + half;
    const int begin = steps * worker / workers, end = steps * (worker + 1) / workers;
    // Packed rows in whole tiles: a gated weight pads gate and up alike. Warps past the last tile repeat it.
    const int rows = tail.activation == kPlain ? tail.n : (tail.n / 2 + 15) / 16 * 32;
    const int tiles = (rows + kTileRows - 1) / kTileRows;
    const int wanted = block_index_y() * kTileWarps + warp_index() % kTileWarps;
    const long long tile = wanted < tiles ? wanted : tiles - 1;
    const int token0 = block_index() * Shape::kTokens;
    const int tokens = tail.m - token0 < Shape::kTokens ? tail.m - token0 : Shape::kTokens;
    const TileSource<X> source{x + static_cast<long long>(token0) * k,
                               codes + tile * steps * Shape::kCodeBytes,
                               scales + tile * groups * kTileRows,
                               zeros ? zeros + tile * groups * kTileRows : nullptr,
                               minimums_at(book, tile * groups * kTileRows),
                               tokens,
                               k,
                               group_size / (Shape::kHalves ? kChunkColumns / 2 : kChunkColumns)};
    float total[kTokenTiles][2][4] = {};
    tile_sums<X, kBits, kTokenTiles>(total, source, book, shared + half * Shape::kRing, begin, end,
                                     (steps + workers - 1) / workers);
    float* const part = reinterpret_cast<float*>(shared + half * Shape::kRing);
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 8 * kTokenTiles; ++i) {
        const int token = i / 8 * 8 + 2 * t + i % 2;
        const int row = warp_index() % kTileWarps * kTileRows + g + 8 * (i / 2 % 4);
        part[token * kBlockStride + row] = total[i / 8][i / 4 % 2][i % 4];
    }
    block_sync();
    const TilePlace place{block_index_y() * kBlockRows,
                          token0,
                          tokens,
                          block_index_y() * grid_size() + block_index(),
                          grid_size() * grid_size_y(),
                          block_index_z(),
                          grid_size_z()};
    finish<T, kBlockRows, Shape::kTokens, kBlockStride>(tail, place, reinterpret_cast<float*>(shared), halves,
                                                        Shape::kRing / 4);
}

}  // namespace gemm
}  // namespace llmctl

// Entry points by activation dtype, code width and tokens a block; see the .cu files.
#define LLMCTL_TILE_GEMM_OF(NAME, T, BITS, TOKENS, VALUES)                                                            \
    LLMCTL_KERNEL(2 * llmctl::gemm::kHalfThreads, 1)                                                                  \
    NAME##_##T##_t##TOKENS(const llmctl::T* x, const u8* codes, const llmctl::f16* scales, const u8* zeros,           \
                           const llmctl::T* bias, const llmctl::T* residual, llmctl::T* y, float* workspace,          \
                           u32* counters, int m, int n, int k, int group_size, int activation) {                      \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                \
        const llmctl::gemm::Tail<llmctl::T> tail{bias, residual, nullptr, y, workspace, counters, m, n, activation};  \
        llmctl::gemm::tile_gemm<llmctl::T, llmctl::T, BITS, TOKENS / 8>(                                              \
            x, codes, scales, zeros, llmctl::gemm::VALUES{}, tail, k, group_size, shared);                            \
    }

#define LLMCTL_TILE_GEMM(NAME, T, BITS, TOKENS) LLMCTL_TILE_GEMM_OF(NAME, T, BITS, TOKENS, NoBook)
#define LLMCTL_FLOAT8_GEMM(NAME, T, TOKENS) LLMCTL_TILE_GEMM_OF(NAME, T, 8, TOKENS, Float8)

// Of groups of 16 or 32 columns, with minimums unless they are null.
#define LLMCTL_MINIMUM_GEMM(NAME, T, BITS, TOKENS)                                                                    \
    LLMCTL_KERNEL(2 * llmctl::gemm::kHalfThreads, 1)                                                                  \
    NAME##_##T##_t##TOKENS(const llmctl::T* x, const u8* codes, const llmctl::f16* scales,                            \
                           const llmctl::f16* minimums, const llmctl::T* bias, const llmctl::T* residual,             \
                           llmctl::T* y, float* workspace, u32* counters, int m, int n, int k, int group_size,        \
                           int activation) {                                                                          \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                \
        const llmctl::gemm::Tail<llmctl::T> tail{bias, residual, nullptr, y, workspace, counters, m, n, activation};  \
        llmctl::gemm::tile_gemm<llmctl::T, llmctl::T, BITS, TOKENS / 8>(                                              \
            x, codes, scales, nullptr, llmctl::gemm::Minimums{minimums}, tail, k, group_size, shared);                \
    }

// Of 4-bit codes of a code book; book: its values, f32 [16].
#define LLMCTL_BOOK_GEMM(NAME, T, TOKENS)                                                                             \
    LLMCTL_KERNEL(2 * llmctl::gemm::kHalfThreads, 1)                                                                  \
    NAME##_##T##_t##TOKENS(const llmctl::T* x, const u8* codes, const llmctl::f16* scales, const float* book,         \
                           const llmctl::T* bias, const llmctl::T* residual, llmctl::T* y, float* workspace,          \
                           u32* counters, int m, int n, int k, int group_size, int activation) {                      \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                \
        const llmctl::gemm::Tail<llmctl::T> tail{bias, residual, nullptr, y, workspace, counters, m, n, activation};  \
        llmctl::gemm::tile_gemm<llmctl::T, llmctl::T, 4, TOKENS / 8>(                                                 \
            x, codes, scales, nullptr, llmctl::gemm::read_book<llmctl::T>(book), tail, k, group_size, shared);        \
    }

#define LLMCTL_INT8_GEMM(NAME, T, TOKENS)                                                                             \
    LLMCTL_KERNEL(2 * llmctl::gemm::kHalfThreads, 1)                                                                  \
    NAME##_##T##_t##TOKENS(const s8* x, const float* token_scales, const u8* codes, const llmctl::f16* scales,        \
                           const llmctl::T* bias, const llmctl::T* residual, llmctl::T* y, float* workspace,          \
                           u32* counters, int m, int n, int k, int group_size, int activation) {                      \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                \
        const llmctl::gemm::Tail<llmctl::T> tail{bias, residual, token_scales, y, workspace, counters, m, n,          \
                                                 activation};                                                         \
        llmctl::gemm::tile_gemm<llmctl::T, s8, 8, TOKENS / 8>(x, codes, scales, nullptr, llmctl::gemm::NoBook{},      \
                                                              tail, k, group_size, shared);                           \
    }
