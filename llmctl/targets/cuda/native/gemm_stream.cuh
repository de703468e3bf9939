// The bandwidth kernel: y = x @ w.T for 1..16 rows of x, bound by reading the codes once.
//
// A block owns one tile of 32 rows; its warps, and the blocks of grid y, share out the steps of K (128 columns of 4-bit
// codes, 64 of 8-bit ones: 2 KiB) in contiguous runs. Every warp runs its own ring of cp.async stages, three steps
// (6 KiB) in flight, with no block barrier until the sums are done; it multiplies on tensor cores, where 8 rows of x
// cost what one does. x is read through L1, 16 bytes a lane and chunk: the fragment itself. All partial sums of a tile
// meet in shared memory, so that only narrow weights (fewer tiles than SMs) split K over blocks.
//
// kTokenTiles: 1 for up to 8 rows of x, 2 for up to 16.
// kGroupChunks: columns a group / 32 within a step: 1 for groups of 32, 2 for 64, 4 for multiples of 128 and per
// channel (K padded); 8-bit steps hold two chunks, so that 2 serves 64 and everything above. 0: groups of 16.
// Sums of one row do not depend on the other rows, and the sharing of K not on M: a row has the same bits in any batch.
#pragma once
#include "dequant.cuh"
#include "gemm_tail.cuh"

namespace llmctl {
namespace gemm {

constexpr int kStreamThreads = 256;
constexpr int kStreamStages = 4;
constexpr int kStreamStride = kTileRows + 4;  // 2 t * 36 = 8 t mod 32: the fragment's lanes fall into distinct banks

// One stage of a warp's ring: the codes of a step, then its groups' scales (64 bytes each), then zeros (32 bytes each)
// or minimums (64).
template <int kBits, int kGroupChunks, typename Values>
struct StreamStage {
    static constexpr int kChunks = 16 / kBits;
    static constexpr int kGroups = kGroupChunks ? kChunks / (kGroupChunks ? kGroupChunks : 1) : 2 * kChunks;
    static constexpr int kVectors = kChunks * Codes<kBits>::kVectors;
    static constexpr int kCodeBytes = kChunks * Codes<kBits>::kBytes;
    static constexpr int kScales = kCodeBytes;
    static constexpr int kZeros = kScales + kGroups * kTileRows * 2;
    static constexpr int kBytes = kZeros + kGroups * kTileRows * (kHasMinimums<Values> ? 2 : 1);
    static constexpr int kRing = kBytes * kStreamStages;
};

// A tile's planes; group_steps: steps a group, when a group has whole steps.
struct StreamSource {
    const u8* codes;
    const f16* scales;
    const u8* zeros;
    const f16* minimums;
    int group_steps;
};

template <int kBits, int kGroupChunks, typename Values>
LLMCTL_DEVICE void copy_step(u8* stage, const StreamSource& from, int step) {
    using Stage = StreamStage<kBits, kGroupChunks, Values>;
    const int lane = lane_index();
    const u8* const codes = from.codes + static_cast<long long>(step) * Stage::kCodeBytes;
#pragma unroll
    for (int i = 0; i < Stage::kVectors; ++i) {
        cp_async16(stage + (i * kWarp + lane) * 16, codes + (i * kWarp + lane) * 16);
    }
    const int group = Stage::kGroups == 1 ? step / from.group_steps : step * Stage::kGroups;
    if (lane < Stage::kGroups * 4) {
        cp_async16(stage + Stage::kScales + lane * 16, from.scales + group * kTileRows + lane * 8);
        if (kHasMinimums<Values> && from.minimums) {
            cp_async16(stage + Stage::kZeros + lane * 16, from.minimums + group * kTileRows + lane * 8);
        }
    } else if (from.zeros && lane >= 16 && lane < 16 + Stage::kGroups * 2) {
        cp_async16(stage + Stage::kZeros + (lane - 16) * 16, from.zeros + group * kTileRows + (lane - 16) * 16);
    }
}

template <typename T, int kBits, int kGroupChunks, int kTokenTiles, typename Values>
LLMCTL_DEVICE void multiply_step(float (&total)[kTokenTiles][2][4], const u8* stage, bool has_zeros,
                                 const Vec16 (&x)[kTokenTiles][16 / kBits], const Values& book) {
    using Stage = StreamStage<kBits, kGroupChunks, Values>;
    const int lane = lane_index(), g = lane / 4;
#pragma unroll
    for (int group = 0; group < Stage::kGroups; ++group) {
        const u8* const zero_at = stage + Stage::kZeros + group * kTileRows + g * 4;
        const u32 zeros = has_zeros ? *reinterpret_cast<const u32*>(zero_at) : kSymmetricZeros<kBits>;
        const ZeroPair zero[2] = {zero_pair<T, kBits>(zeros, 0), zero_pair<T, kBits>(zeros, 1)};
        float sum[kTokenTiles][2][4] = {};
#pragma unroll
        for (int i = 0; i < kGroupChunks; ++i) {
            const int chunk = group * kGroupChunks + i;
            Codes<kBits> codes;
#pragma unroll
            for (int v = 0; v < Codes<kBits>::kVectors; ++v) {
                codes.vector[v] = load16(stage + ((chunk * Codes<kBits>::kVectors + v) * kWarp + lane) * 16);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    u32 a[4];
                    fragment<T, kBits>(a, codes, r, s, zero[r], book);
#pragma unroll
                    for (int j = 0; j < kTokenTiles; ++j) {
                        const u32 b[2] = {x[j][chunk].w[2 * s], x[j][chunk].w[2 * s + 1]};
                        mma16816<T>(sum[j][r], a, b);
                    }
                }
            }
        }
        float scale[4];
        unpack_scales(scale, load8(stage + Stage::kScales + group * kTileRows * 2 + g * 8));
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float& to = total[j][i / 4][i % 4];
                to = fused_multiply_add(scale[i / 2], sum[j][i / 4][i % 4], to);
            }
        }
    }
}

// The same of groups of half chunks or whole ones, with minimums.
template <typename T, int kBits, int kGroupChunks, int kTokenTiles>
LLMCTL_DEVICE void multiply_minimum_step(float (&total)[kTokenTiles][2][4], const u8* stage,
                                         const Vec16 (&x)[kTokenTiles][16 / kBits], const Minimums& minimums) {
    static_assert(kGroupChunks <= 1, "groups of 16 or 32");
    using Stage = StreamStage<kBits, kGroupChunks, Minimums>;
    const int lane = lane_index(), g = lane / 4;
    const ZeroPair zero = zero_pair<T, kBits>(zeros_beside<kBits>(minimums), 0);
    u32 one[4];
    ones<T>(one);
    float sum[kTokenTiles][2][4] = {}, of_x[kTokenTiles][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < Stage::kChunks; ++chunk) {
        Codes<kBits> codes;
#pragma unroll
        for (int v = 0; v < Codes<kBits>::kVectors; ++v) {
            codes.vector[v] = load16(stage + ((chunk * Codes<kBits>::kVectors + v) * kWarp + lane) * 16);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                u32 a[4];
                fragment<T, kBits>(a, codes, r, s, zero, minimums);
#pragma unroll
                for (int j = 0; j < kTokenTiles; ++j) {
                    const u32 b[2] = {x[j][chunk].w[2 * s], x[j][chunk].w[2 * s + 1]};
                    mma16816<T>(sum[j][r], a, b);
                }
            }
            if (minimums.plane) {
#pragma unroll
                for (int j = 0; j < kTokenTiles; ++j) {
                    const u32 b[2] = {x[j][chunk].w[2 * s], x[j][chunk].w[2 * s + 1]};
                    mma16816<T>(of_x[j], one, b);
                }
            }
            if (kGroupChunks == 0 || s == 1) {
                const int at = ((kGroupChunks ? chunk : 2 * chunk + s) * kTileRows + g * 4) * 2;
                const u8* const side = stage + (minimums.plane ? Stage::kZeros : Stage::kScales);
                scale_group(total, sum, of_x, load8(stage + Stage::kScales + at), load8(side + at),
                            minimums.plane != nullptr);
            }
        }
    }
}

// A lane's columns of a chunk, as the fragments of both k-steps have them; zeros from column `limit` on. row: x's.
template <typename T, bool kHalves>
LLMCTL_DEVICE Vec16 load_columns(const T* row, int column, int limit) {
    const int t = lane_index() % 4;
    if constexpr (kHalves) {
        Vec16 found{{0, 0, 0, 0}};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const int at = column + 16 * s + 4 * t;
            if (at < limit) {
                const Vec8 half = load8(row + at);
                found.w[2 * s] = half.w[0];
                found.w[2 * s + 1] = half.w[1];
            }
        }
        return found;
    } else {
        const int at = column + 8 * t;
        return at < limit ? load16_const(row + at) : Vec16{{0, 0, 0, 0}};
    }
}

// The sums of steps begin .. end - 1. A lane's tokens are g and g + 8; those past m, like columns past k, are zeros.
template <typename T, int kBits, int kGroupChunks, int kTokenTiles, typename Values, typename Rows>
LLMCTL_DEVICE void stream_sums(float (&total)[kTokenTiles][2][4], const T* x, int m, int k, const Rows& rows,
                               const StreamSource& source, const Values& book, u8* ring, int begin, int end) {
    using Stage = StreamStage<kBits, kGroupChunks, Values>;
    const int g = lane_index() / 4;
    const T* row[kTokenTiles];
    int limit[kTokenTiles];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
        const int token = g + 8 * j;
        row[j] = x + rows.x(token < m ? token : 0) * k;
        limit[j] = token < m ? k : 0;
    }
#pragma unroll
    for (int i = 0; i < kStreamStages - 1; ++i) {
        if (begin + i < end) copy_step<kBits, kGroupChunks, Values>(ring + i * Stage::kBytes, source, begin + i);
        cp_async_commit();
    }
    int slot = 0;
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
        Vec16 fragment_x[kTokenTiles][Stage::kChunks];
#pragma unroll
        for (int i = 0; i < kTokenTiles * Stage::kChunks; ++i) {
            const int j = i / Stage::kChunks, chunk = i % Stage::kChunks;
            const int column = (step * Stage::kChunks + chunk) * kChunkColumns;
            fragment_x[j][chunk] = load_columns<T, kHasMinimums<Values>>(row[j], column, limit[j]);
        }
        cp_async_wait<kStreamStages - 2>();
        warp_sync();  // the copies of all lanes have come, and all lanes are done with the slot to be filled
        const int fill = slot == 0 ? kStreamStages - 1 : slot - 1;
        if (step + kStreamStages - 1 < end) {
            copy_step<kBits, kGroupChunks, Values>(ring + fill * Stage::kBytes, source, step + kStreamStages - 1);
        }
        cp_async_commit();
        const u8* const stage = ring + slot * Stage::kBytes;
        if constexpr (kHasMinimums<Values>) {
            multiply_minimum_step<T, kBits, kGroupChunks, kTokenTiles>(total, stage, fragment_x, book);
        } else {
            multiply_step<T, kBits, kGroupChunks, kTokenTiles>(total, stage, source.zeros != nullptr, fragment_x, book);
        }
        slot = slot == kStreamStages - 1 ? 0 : slot + 1;
    }
    warp_sync();
}

// A lane's sums as part of a tile, f32 [8 * kTokenTiles][kStreamStride]; see mma16816 for who holds what.
template <int kTokenTiles>
LLMCTL_DEVICE void store_sums(float* part, const float (&total)[kTokenTiles][2][4]) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 8 * kTokenTiles; ++i) {
        const int token = i / 8 * 8 + 2 * t + i % 2, row = g + 8 * (i / 2 % 4);
        part[token * kStreamStride + row] = total[i / 8][i / 4 % 2][i % 4];
    }
}

// y = tail(x @ w.T) for tail.m tokens of the rows that `rows` says; `first_tile`: of the weight's tiles, this product's.
template <typename T, int kBits, int kGroupChunks, int kTokenTiles, typename Values, typename Rows = InOrder>
LLMCTL_DEVICE void stream(const T* x, const u8* codes, const f16* scales, const u8* zeros, const Values& book,
                          const Tail<T>& tail, int k, int group_size, u8* shared, long long first_tile = 0,
                          const Rows& rows = Rows()) {
    using Stage = StreamStage<kBits, kGroupChunks, Values>;
    const int warps = block_size() / kWarp, warp = warp_index();
    const int padded = (k + kStepColumns - 1) / kStepColumns * kStepColumns;
    const int steps = padded / (Stage::kChunks * kChunkColumns);
    const int groups = (padded + group_size - 1) / group_size;
    const int workers = warps * grid_size_y(), worker = block_index_y() * warps + warp;
    const long long tile = first_tile + block_index();
    const StreamSource source{codes + tile * steps * Stage::kCodeBytes, scales + tile * groups * kTileRows,
                              zeros ? zeros + tile * groups * kTileRows : nullptr,
                              minimums_at(book, tile * groups * kTileRows),
                              group_size / (Stage::kChunks * kChunkColumns)};
    u8* const ring = shared + warp * Stage::kRing;
    float total[kTokenTiles][2][4] = {};
    stream_sums<T, kBits, kGroupChunks, kTokenTiles>(total, x, tail.m, k, rows, source, book, ring,
                                                     steps * worker / workers, steps * (worker + 1) / workers);
    store_sums<kTokenTiles>(reinterpret_cast<float*>(ring), total);
    block_sync();
    const TilePlace place{block_index() * kTileRows, 0,           tail.m,         block_index(),
                          grid_size(),               block_index_y(), grid_size_y()};
    finish<T, kTileRows, 8 * kTokenTiles, kStreamStride>(tail, place, reinterpret_cast<float*>(shared), warps,
                                                         Stage::kRing / 4, rows);
}

}  // namespace gemm
}  // namespace llmctl

// Entry points by activation dtype, code width, group and rows; see the .cu files. Two blocks of eight warps fit an SM;
// groups of 32 with 16 rows need a few registers more than that leaves, and would spill.
#define LLMCTL_STREAM_OF(NAME, T, BITS, GROUP, ROWS, VALUES)                                                          \
    LLMCTL_KERNEL(llmctl::gemm::kStreamThreads, GROUP == 32 && ROWS == 16 ? 1 : 2)                                    \
    NAME##_##T##_g##GROUP##_m##ROWS(const llmctl::T* x, const u8* codes, const llmctl::f16* scales, const u8* zeros,  \
                                    const llmctl::T* bias, const llmctl::T* residual, llmctl::T* y, float* workspace, \
                                    u32* counters, int m, int n, int k, int group_size, int activation) {             \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                \
        const llmctl::gemm::Tail<llmctl::T> tail{bias, residual, nullptr, y, workspace, counters, m, n, activation};  \
        llmctl::gemm::stream<llmctl::T, BITS, GROUP / 32, ROWS / 8>(x, codes, scales, zeros, llmctl::gemm::VALUES{},  \
                                                                    tail, k, group_size, shared);                     \
    }

#define LLMCTL_STREAM(NAME, T, BITS, GROUP, ROWS) LLMCTL_STREAM_OF(NAME, T, BITS, GROUP, ROWS, NoBook)
#define LLMCTL_FLOAT8_STREAM(NAME, T, GROUP, ROWS) LLMCTL_STREAM_OF(NAME, T, 8, GROUP, ROWS, Float8)

// Of groups of 16 or 32 columns, with minimums unless they are null.
#define LLMCTL_MINIMUM_STREAM(NAME, T, BITS, GROUP, ROWS)                                                             \
    LLMCTL_KERNEL(llmctl::gemm::kStreamThreads, ROWS == 16 ? 1 : 2)                                                   \
    NAME##_##T##_g##GROUP##_m##ROWS(const llmctl::T* x, const u8* codes, const llmctl::f16* scales,                   \
                                    const llmctl::f16* minimums, const llmctl::T* bias, const llmctl::T* residual,    \
                                    llmctl::T* y, float* workspace, u32* counters, int m, int n, int k,               \
                                    int group_size, int activation) {                                                 \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                \
        const llmctl::gemm::Tail<llmctl::T> tail{bias, residual, nullptr, y, workspace, counters, m, n, activation};  \
        llmctl::gemm::stream<llmctl::T, BITS, GROUP / 32, ROWS / 8>(x, codes, scales, nullptr,                        \
                                                                    llmctl::gemm::Minimums{minimums}, tail, k,        \
                                                                    group_size, shared);                              \
    }

// Of 4-bit codes of a code book; book: its values, f32 [16].
#define LLMCTL_BOOK_STREAM(NAME, T, GROUP, ROWS)                                                                      \
    LLMCTL_KERNEL(llmctl::gemm::kStreamThreads, GROUP == 32 && ROWS == 16 ? 1 : 2)                                    \
    NAME##_##T##_g##GROUP##_m##ROWS(const llmctl::T* x, const u8* codes, const llmctl::f16* scales,                   \
                                    const float* book, const llmctl::T* bias, const llmctl::T* residual,              \
                                    llmctl::T* y, float* workspace, u32* counters, int m, int n, int k,               \
                                    int group_size, int activation) {                                                 \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                \
        const llmctl::gemm::Tail<llmctl::T> tail{bias, residual, nullptr, y, workspace, counters, m, n, activation};  \
        llmctl::gemm::stream<llmctl::T, 4, GROUP / 32, ROWS / 8>(x, codes, scales, nullptr,                           \
                                                                 llmctl::gemm::read_book<llmctl::T>(book), tail, k,   \
                                                                 group_size, shared);                                 \
    }
