// The arithmetic of attention, for one warp: scores, online softmax (Milakov & Gimelshein 2018; Dao 2023), weighted
// sum.
//
// The query heads of one KV head are packed: row r of a sequence is token r / group, query head r % group, so that
// every key and value that is loaded serves all of them. A warp holds kTiles x 16 rows; scores are in units of log2.
//
// With int8 values (a scale per position) the maximum that weights are taken relative to is that of score + exponent of
// the scale, so that weight * scale, which is rounded to f16, stays near 1 however small the scales are.
#pragma once
#include "attention_cache.cuh"

namespace llmctl {
namespace attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kNever = -1e30f;  // below every score; finite, so that differences are too

// A launch, in the order of the entries' first parameters. q, out: rows of [tokens, heads * head dim], strides in
// elements. keys, values: [slots, kv_heads, head dim]. query_start: i32 [sequences + 1], rows of each sequence.
template <typename T, typename KV>
struct Call {
    const T* q;
    const KV *keys, *values;
    const float *key_scales, *value_scales;
    const int *block_tables, *seq_lens, *query_start;
    int heads, kv_heads, block_size, table_stride, q_stride, window;
    float scale, softcap, key_scale, value_scale;
};

template <typename S>
LLMCTL_DEVICE Cache<S> cache_of(const Call<typename S::T, typename S::KV>& c, int sequence, int kv_head) {
    return Cache<S>{c.keys,
                    c.values,
                    c.key_scales,
                    c.value_scales,
                    c.block_tables,
                    c.block_size,
                    c.kv_heads,
                    kv_head,
                    c.seq_lens[sequence],
                    sequence * c.table_stride};
}

// From the product q . k to the score in log2 units.
struct Scoring {
    float factor, cap;  // cap 0: none

    // cap * tanh of scaled / (2 log2 e)
    LLMCTL_METHOD float capped(float scaled) const {
        return cap - 2.0f * cap * fast_reciprocal(fast_exp2(scaled) + 1.0f);
    }
};

template <typename S>
LLMCTL_DEVICE Scoring scoring_of(const Call<typename S::T, typename S::KV>& c) {
    const float scale = c.scale * (S::kBytes && !S::Rule::kScaled ? c.key_scale * S::Rule::kKeyUnit : 1.0f);
    if (c.softcap == 0.0f) return Scoring{scale * kLog2e, 0.0f};
    return Scoring{scale / c.softcap * (2.0f * kLog2e), c.softcap * kLog2e};
}

// Copies kRows rows of q, first_row on, to shared memory for ldmatrix; rows from `rows` on are zeros.
template <typename S, int kRows, int kThreads>
LLMCTL_DEVICE void load_queries(u8* shared, const Call<typename S::T, typename S::KV>& c, long long first_token,
                                int kv_head, int first_row, int rows) {
    const int group = c.heads / c.kv_heads;
    for (int i = thread_index(); i < kRows * S::kQueryChunks; i += kThreads) {
        const int row = i / S::kQueryChunks, chunk = i % S::kQueryChunks, at = first_row + row;
        Vec16 v{};
        if (at < rows) {
            const long long head = kv_head * group + at % group;
            v = load16_const(c.q + (first_token + at / group) * c.q_stride + head * S::kDim + chunk * 8);
        }
        u32* to = reinterpret_cast<u32*>(shared + row * S::kQueryRow + chunk / 2 * (2 * kChunk));
        if constexpr (S::kBytes) {
#pragma unroll
            for (int j = 0; j < 4; ++j) to[permuted_word<S>(chunk % 2 * 4 + j)] = v.w[j];
        } else {
            store16(to + chunk % 2 * 4, v);
        }
    }
}

// floor(log2) of a scale, no less than -64: with zero scales alone, weights stay finite.
LLMCTL_DEVICE float exponent_of(float scale) {
    const int exponent = static_cast<int>(float_to_bits(scale) >> 23) - 127;
    return static_cast<float>(exponent < -64 ? -64 : exponent);
}

// The state of a warp's rows. Element e of a fragment is row lane / 4 + 8 (e / 2), column 2 (lane % 4) + e % 2.
template <typename S, int kTiles, int kUnits>
struct Flash {
    static constexpr int kColumns = 2 * kUnits;  // n-tiles of 8 positions

    float out[kTiles][S::kDim / 8][4];
    float most[kTiles][2];   // what weights are relative to
    float total[kTiles][2];  // this lane's share of the sum of weights

    LLMCTL_METHOD void clear() {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int n = 0; n < S::kDim / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) out[m][n][e] = 0.0f;
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) most[m][h] = kNever, total[m][h] = 0.0f;
        }
    }

    // scores = q @ keys^T for kUnits units that lie kUnitBytes apart.
    LLMCTL_METHOD void multiply(float (&scores)[kTiles][kColumns][4], const u8* queries, const u8* keys) const {
        const int lane = lane_index();
        const u8* query = queries + lane % 16 * S::kQueryRow + lane / 16 * kChunk;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
            }
        }
#pragma unroll
        for (int step = 0; step < S::kDim / 16; ++step) {
            u32 a[kTiles][4];
#pragma unroll
            for (int m = 0; m < kTiles; ++m) ldmatrix_x4(a[m], query + m * 16 * S::kQueryRow + step * 2 * kChunk);
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                u32 low[2], high[2];
                key_fragments<S>(keys + u * S::kUnitBytes, step, low, high);
#pragma unroll
                for (int m = 0; m < kTiles; ++m) {
                    mma16816<typename S::T>(scores[m][2 * u], a[m], low);
                    mma16816<typename S::T>(scores[m][2 * u + 1], a[m], high);
                }
            }
        }
    }

    // Products to scores. `scales`: the units' key scales, in shared memory (int8 only).
    LLMCTL_METHOD void score(float (&scores)[kTiles][kColumns][4], const Scoring& scoring, const float* scales) const {
        const int t = lane_index() % 4;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float by = S::Rule::kScaled ? scoring.factor * scales[8 * n + 2 * t + e % 2] : scoring.factor;
#pragma unroll
                for (int m = 0; m < kTiles; ++m) scores[m][n][e] *= by;
            }
        }
        if (scoring.cap == 0.0f) return;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) scores[m][n][e] = scoring.capped(scores[m][n][e]);
            }
        }
    }

    // Hides positions after the rows' own, last(row), and, with a window, those window and more before it.
    template <typename Last>
    LLMCTL_METHOD void mask(float (&scores)[kTiles][kColumns][4], int position, const Last& last, int window) const {
        const int t = lane_index() % 4;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int ahead = last(16 * m + 8 * h + lane_index() / 4) - position - 2 * t;
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int back = ahead - 8 * n - e;
                        if (back < 0 || (window > 0 && back >= window)) scores[m][n][2 * h + e] = kNever;
                    }
                }
            }
        }
    }

    // Scores to weights; what was summed before is brought to the new maximum. `scales`: the units' value scales.
    LLMCTL_METHOD void soften(float (&scores)[kTiles][kColumns][4], const float* scales) {
        const int t = lane_index() % 4;
        bool same = true;
        float shrink[kTiles][2];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float highest = kNever;
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float exponent = S::Rule::kScaled ? exponent_of(scales[8 * n + 2 * t + e]) : 0.0f;
                        highest = fmaxf(highest, scores[m][n][2 * h + e] + exponent);
                    }
                }
                highest = fmaxf(highest, shuffle_xor(highest, 1));
                highest = fmaxf(fmaxf(highest, shuffle_xor(highest, 2)), most[m][h]);
                // No position seen yet: any finite reference makes every weight 0.
                const float reference = highest == kNever ? 0.0f : highest;
                shrink[m][h] = fast_exp2(most[m][h] - reference);
                same = same && highest == most[m][h];
                most[m][h] = highest;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float weight = fast_exp2(scores[m][n][2 * h + e] - reference);
                        sum += weight;
                        scores[m][n][2 * h + e] = S::Rule::kScaled ? weight * scales[8 * n + 2 * t + e] : weight;
                    }
                }
                total[m][h] = total[m][h] * shrink[m][h] + sum;
            }
        }
        // The maximum seldom moves after the first tiles; to skip is exact, for then nothing is to be rescaled.
        if (!vote_all(same)) rescale(shrink);
    }

    LLMCTL_METHOD void rescale(const float (&by)[kTiles][2]) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int n = 0; n < S::kDim / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) out[m][n][e] *= by[m][e / 2];
            }
        }
    }

    // out += weights @ values.
    LLMCTL_METHOD void accumulate(const float (&weights)[kTiles][kColumns][4], const u8* values) {
        using Weight = typename S::Weight;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            u32 a[kTiles][4];
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* pair = &weights[m][2 * u + i / 2][2 * (i % 2)];
                    a[m][i] = packed_from_floats<Weight>(pair[0], pair[1]);
                }
            }
#pragma unroll
            for (int group = 0; group < S::kDim / 16; ++group) {
                u32 even[2], odd[2];
                value_fragments<S>(values + u * S::kUnitBytes, group, even, odd);
#pragma unroll
                for (int m = 0; m < kTiles; ++m) {
                    mma16816<Weight>(out[m][2 * group], a[m], even);
                    mma16816<Weight>(out[m][2 * group + 1], a[m], odd);
                }
            }
        }
    }

    // Sum of a row's weights over the four lanes that share it.
    LLMCTL_METHOD float row_total(int m, int h) const {
        float sum = total[m][h] + shuffle_xor(total[m][h], 1);
        return sum + shuffle_xor(sum, 2);
    }
};

}  // namespace attention
}  // namespace llmctl

// What the entries of both kernels share: their first parameters, the sizes, the factors, and the Call of them all.
#define LLMCTL_ATTENTION_POINTERS(T, KV)                                                                  \
    const llmctl::T *q, const llmctl::KV *keys, const llmctl::KV *values, const float *key_scales,        \
        const float *value_scales, const int *block_tables, const int *seq_lens, const int *query_start
#define LLMCTL_ATTENTION_SIZES int heads, int kv_heads, int block_size, int table_stride, int q_stride, int window
#define LLMCTL_ATTENTION_FACTORS float scale, float softcap, float key_scale, float value_scale
#define LLMCTL_ATTENTION_CALL                                                                                      \
    {q, keys, values, key_scales, value_scales, block_tables, seq_lens, query_start, heads, kv_heads, block_size,  \
     table_stride, q_stride, window, scale, softcap, key_scale, value_scale}

// ENTRY(T, KV, DIM) for every pair of element types.
#define LLMCTL_ATTENTION_ALL(ENTRY, DIM) \
    ENTRY(f16, f16, DIM)                 \
    ENTRY(f16, s8, DIM)                  \
    ENTRY(f16, e4m3, DIM)                \
    ENTRY(bf16, bf16, DIM)               \
    ENTRY(bf16, s8, DIM)                 \
    ENTRY(bf16, e4m3, DIM)
