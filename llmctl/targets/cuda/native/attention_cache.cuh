// How attention reads the paged KV cache that rope_kv.cu writes: units of 16 positions of one KV head, copied to shared
// memory as they are stored, and turned into mma.m16n8k16 fragments from there.
//
// A unit never crosses a cache block (block_size is 16, 32 or 64). Its rows in shared memory lie an odd number of
// 16-byte chunks apart, so that the eight rows of an ldmatrix fall into different banks, for every head size.
//
// Bytes (s8, e4m3) are widened in registers, without a pass through shared memory:
//   keys    ldmatrix gives a lane 4 consecutive dims of a position where it would give 2 of 16 bits. mma adds over k in
//           any order, so they become its 4 k-indices, and q is stored permuted to match (permuted_word).
//   values  transposed ldmatrix gives a lane, for 2 positions, the dims 2g and 2g + 1: one to each of two n-tiles. So
//           the outputs of tiles 2j and 2j + 1 that a lane holds are the dims 16j + 4t .. 16j + 4t + 3.
// An e4m3 code moved into an f16's bits is value / 256 (kKeyUnit, kValueUnit); weights times byte values are always
// f16, which holds every code exactly.
#pragma once
#include "numeric.cuh"

namespace llmctl {
namespace attention {

constexpr int kUnit = 16;  // positions
constexpr int kChunk = 16;  // bytes

// What a cache of KV means to attention in T. Weight: the type of softmax weights in the second product. kScaled: a
// scale per position and head.
template <typename T, typename KV>
struct Format {
    using Weight = T;
    static constexpr int kKeyUnit = 1, kValueUnit = 1;
    static constexpr bool kScaled = false;
};
template <typename T>
struct Format<T, s8> {
    using Weight = f16;
    static constexpr int kKeyUnit = 1, kValueUnit = 1;
    static constexpr bool kScaled = true;
};
template <>
struct Format<f16, e4m3> {
    using Weight = f16;
    static constexpr int kKeyUnit = 256, kValueUnit = 256;
    static constexpr bool kScaled = false;
};
template <>
struct Format<bf16, e4m3> {
    using Weight = f16;
    static constexpr int kKeyUnit = 1, kValueUnit = 256;
    static constexpr bool kScaled = false;
};

template <typename T_, typename KV_, int kHeadDim>
struct Shape {
    using T = T_;
    using KV = KV_;
    using Rule = Format<T, KV>;
    using Weight = typename Rule::Weight;
    static constexpr int kDim = kHeadDim;
    static constexpr bool kBytes = sizeof(KV) == 1;
    static constexpr int kCacheChunks = kDim * static_cast<int>(sizeof(KV)) / kChunk;
    static constexpr int kCacheRow = (kCacheChunks | 1) * kChunk;  // bytes in shared memory
    static constexpr int kUnitBytes = kUnit * kCacheRow;
    static constexpr int kQueryChunks = kDim * 2 / kChunk;
    static constexpr int kQueryRow = (kQueryChunks | 1) * kChunk;
    static_assert(kDim % 16 == 0 && kDim <= 256);
};

// ---- widening bytes ------------------------------------------------------------------------------------------------

// Bytes kLow and kHigh of `word` as a pair of T; codes of e4m3 in units of 1 / kKeyUnit (T = f16) or exactly (bf16).
template <typename T, int kLow, int kHigh>
struct Widen;

template <int kLow, int kHigh>
struct Widen<f16, kLow, kHigh> {
    // 1024 + (code + 128), less 1152.
    LLMCTL_METHOD u32 operator()(s8, u32 word) const {
        const u32 biased = byte_permute(word ^ 0x80808080u, 0x64646464u, kLow | 4 << 4 | kHigh << 8 | 4 << 12);
        return packed_sub<f16>(biased, 0x64806480u);
    }
    LLMCTL_METHOD u32 operator()(e4m3, u32 word) const {
        const u32 pair = byte_permute(word, 0u, 4 | kLow << 4 | 4 << 8 | kHigh << 12);
        return e4m3_bits<f16>(pair);
    }
};

template <int kLow, int kHigh>
struct Widen<bf16, kLow, kHigh> {
    // 2^23 + (code + 128) as fp32, less 2^23 + 128: a float whose upper half is the bf16.
    LLMCTL_METHOD u32 operator()(s8, u32 word) const {
        const u32 biased = word ^ 0x80808080u;
        const float low = bits_to_float(byte_permute(biased, 0x4b000000u, 0x7540 | kLow)) - 8388736.0f;
        const float high = bits_to_float(byte_permute(biased, 0x4b000000u, 0x7540 | kHigh)) - 8388736.0f;
        return byte_permute(float_to_bits(low), float_to_bits(high), 0x7632);
    }
    LLMCTL_METHOD u32 operator()(e4m3, u32 word) const {
        const u32 pair = byte_permute(word, 0u, 4 | kLow << 4 | 4 << 8 | kHigh << 12);
        return packed_fma<bf16>(e4m3_bits<bf16>(pair), 0x7b807b80u, 0u);
    }
};

// ---- fragments of a unit in shared memory --------------------------------------------------------------------------

// Operand b of scores = q @ keys^T, dims 16 step .. 16 step + 15: positions 0..7 (low) and 8..15 (high) of the unit.
template <typename S>
LLMCTL_DEVICE void key_fragments(const u8* unit, int step, u32 (&low)[2], u32 (&high)[2]) {
    const int lane = lane_index();
    if constexpr (S::kBytes) {
        u32 words[2];
        ldmatrix_x2(words, unit + lane % 16 * S::kCacheRow + step * kChunk);
        const typename S::KV kind{};
        low[0] = Widen<typename S::T, 0, 1>()(kind, words[0]);
        low[1] = Widen<typename S::T, 2, 3>()(kind, words[0]);
        high[0] = Widen<typename S::T, 0, 1>()(kind, words[1]);
        high[1] = Widen<typename S::T, 2, 3>()(kind, words[1]);
    } else {
        u32 words[4];
        const int row = lane % 8 + lane / 16 * 8;
        ldmatrix_x4(words, unit + row * S::kCacheRow + (2 * step + lane / 8 % 2) * kChunk);
        low[0] = words[0], low[1] = words[1], high[0] = words[2], high[1] = words[3];
    }
}

// Operand b of out += weights @ values for the n-tiles 2 group and 2 group + 1 (dims 16 group .. 16 group + 15).
template <typename S>
LLMCTL_DEVICE void value_fragments(const u8* unit, int group, u32 (&even)[2], u32 (&odd)[2]) {
    const int lane = lane_index();
    if constexpr (S::kBytes) {
        u32 words[2];
        ldmatrix_x2_trans(words, unit + lane % 16 * S::kCacheRow + group * kChunk);
        const typename S::KV kind{};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            even[i] = Widen<f16, 0, 2>()(kind, words[i]);
            odd[i] = Widen<f16, 1, 3>()(kind, words[i]);
        }
    } else {
        u32 words[4];
        ldmatrix_x4_trans(words, unit + lane % 16 * S::kCacheRow + (2 * group + lane / 16) * kChunk);
        even[0] = words[0], even[1] = words[1], odd[0] = words[2], odd[1] = words[3];
    }
}

// Dim, within its 16, of column `column` (2t or 2t + 1) of n-tile `tile` (0 or 1 within the 16).
template <typename S>
LLMCTL_DEVICE int output_dim(int tile, int column) {
    return S::kBytes ? 2 * column + tile : 8 * tile + column;
}

// Where word w (dims 2w, 2w + 1) of 16 dims of q goes, so that ldmatrix hands out the dims that key_fragments does.
template <typename S>
LLMCTL_DEVICE int permuted_word(int w) {
    return S::kBytes ? w / 2 + w % 2 * 4 : w;
}

// ---- the cache in global memory ------------------------------------------------------------------------------------

// One sequence's view of one KV head. The pointers are the launch's own, which take no registers; what is the head's
// and the sequence's is added at each use.
template <typename S>
struct Cache {
    using KV = typename S::KV;
    const KV *keys, *values;
    const float *key_scales, *value_scales;
    const int* tables;
    int block_size, kv_heads, head, length;
    int table;  // where the sequence's begins; of fewer than 2^31 entries in all

    // First slot of a unit; its 16 positions are consecutive.
    LLMCTL_METHOD long long slot(int block, int unit) const {
        return static_cast<long long>(block) * block_size + (unit * kUnit & (block_size - 1));
    }
    LLMCTL_METHOD int block_of(int unit) const { return tables[table + unit * kUnit / block_size]; }

    // Starts the copy of a unit by kThreads threads, of which this is thread `self`. Rows from `length` on become
    // zeros: what lies there was never written, and 0 * NaN would reach the output.
    template <int kThreads>
    LLMCTL_METHOD void copy(u8* shared, const KV* plane, long long slot, int unit, int self) const {
        const u8* rows = reinterpret_cast<const u8*>(plane + (slot * kv_heads + head) * S::kDim);
        const int live = length - unit * kUnit;
#pragma unroll
        for (int i = 0; i < (kUnit * S::kCacheChunks + kThreads - 1) / kThreads; ++i) {
            const int chunk = i * kThreads + self, row = chunk / S::kCacheChunks, column = chunk % S::kCacheChunks;
            if (kUnit * S::kCacheChunks % kThreads != 0 && row >= kUnit) break;
            const int row_bytes = kv_heads * S::kDim * static_cast<int>(sizeof(KV));
            cp_async16_zero_fill(shared + row * S::kCacheRow + column * kChunk,
                                 rows + row * row_bytes + column * kChunk, row < live ? kChunk : 0);
        }
    }

    // Scale of key (which = 0) or value (1) at `position`, slots of whose unit begin at `slot`.
    LLMCTL_METHOD float scale(int which, long long slot, int position) const {
        if (position >= length) return 0.0f;
        // Not (a ? b : c)[i % n]: GCC 12 with -fsanitize=integer-divide-by-zero reads element 0 there.
        const float* from = which ? value_scales : key_scales;
        return from[(slot + position % kUnit) * kv_heads + head];
    }
};

}  // namespace attention
}  // namespace llmctl
