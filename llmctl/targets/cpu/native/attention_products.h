// The products of attention: queries with tiles of K, softmax weights with tiles of V, for every type of cache.
#pragma once
#include <type_traits>

#include "kv_cache.h"
#include "quads.h"

namespace llmctl {

constexpr int64_t kSegment = 256;                // keys a segment, a multiple of kKeys
constexpr int64_t kTiles = kSegment / kKeys;
constexpr int kQueries = 8;                      // queries sharing the loads of one K/V head
constexpr float kLog2E = 1.44269504088896341f;

// Queries of one K/V head; position[i] is query i's own position: it sees keys lo[i] .. position[i].
struct Queries {
  int count;
  int64_t position[kQueries] = {}, lo[kQueries] = {};
  alignas(64) float q[kQueries][kMaxHead];            // scaled, times log2 e: the softmax is one of powers of 2
  alignas(64) uint16_t q16[kQueries][kMaxHead];       // bf16
  alignas(64) QueryQuad quads[kQueries][kMaxHead / 4];  // q = code * scale
  int32_t offset[kQueries] = {};                      // what kKeyOffset adds to a product, negated
  float scale[kQueries] = {};                         // of a score as score_tiles returns it
  float softcap;
};

#if defined(LLMCTL_AVX512_BF16)
constexpr bool kDotPairs = true;  // vdpbf16ps multiplies pairs as they lie in the cache
#else
constexpr bool kDotPairs = false;  // pairs are widened to fp32, the other operand stays fp32
#endif

// Every line of a tile is read together with a prefetch of the same line of the tile kAhead places on (lists of tiles
// hold that many more). Decode of 32 sequences: in bursts of a tile it takes 1.09 times as long, without 1.35 times.
constexpr int64_t kAhead = 8;

// What meets the cache's elements (queries meet K, softmax weights meet V).
template <KvType kType>
using QueryOperand = std::conditional_t<kType == kKvS8, QueryQuad,
                                        std::conditional_t<kType == kKvBf16 && kDotPairs, uint16_t, float>>;
template <KvType kType>
using WeightOperand = std::conditional_t<kType == kKvS8, WeightQuad, QueryOperand<kType>>;

template <KvType kType>
constexpr int64_t kStep = kType == kKvF32 ? 1 : kType == kKvBf16 ? 2 : 4;  // elements of a lane of the cache
template <KvType kType>
constexpr int64_t kPerStep = kType == kKvS8 ? 1 : kStep<kType>;  // operands that meet them

template <KvType kType>
static inline const QueryOperand<kType>* query(const Queries& qs, int i) {
  if constexpr (kType == kKvS8) return qs.quads[i];
  else if constexpr (kType == kKvBf16 && kDotPairs) return qs.q16[i];
  else return qs.q[i];
}

// acc += a line of the cache (16 lanes of kStep elements) . the operands at x.
template <KvType kType>
static inline __attribute__((always_inline)) void multiply(i32x16& acc, const uint8_t* line, const QueryQuad* x) {
  acc = dot_keys(acc, line, x);
}
template <KvType kType>
static inline __attribute__((always_inline)) void multiply(ValueSum& acc, const uint8_t* line, const WeightQuad* x) {
  dot_values(acc, line, x);
}
template <KvType kType>
static inline __attribute__((always_inline)) void multiply(f32x16& acc, const uint8_t* line, const uint16_t* x) {
  acc = dot2_bf16(acc, (const uint16_t*)line, x);
}
template <KvType kType>
static inline __attribute__((always_inline)) void multiply(f32x16& acc, const uint8_t* line, const float* x) {
  if constexpr (kType == kKvF32) {
    acc = fused(load<f32x16>(line), *x, acc);
  } else {
    const u32x16 both = load<u32x16>(line), even = both << 16, odd = both & 0xffff0000u;
    acc = fused(load<f32x16>(&odd), x[1], fused(load<f32x16>(&even), x[0], acc));
  }
}

// scores[i * kTiles + t] = K of tile t . query i, but for the query's scale; every sum runs over ascending d.
template <KvType kType, int kWide, int kCount>
static inline __attribute__((always_inline)) void score_tiles(const Queries& qs, const uint8_t* const* tiles,
                                                              int64_t padded, f32x16* scores) {
  std::conditional_t<kType == kKvS8, i32x16, f32x16> acc[kWide][kCount] = {};
  if constexpr (kType == kKvS8) {
#pragma GCC unroll 8
    for (int t = 0; t < kWide; t++)
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++) acc[t][i] += qs.offset[i];
  }
  for (int64_t step = 0; step < padded / kStep<kType>; step++)
#pragma GCC unroll 8
    for (int t = 0; t < kWide; t++) {
      __builtin_prefetch(tiles[t + kAhead] + step * 64);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++)
        multiply<kType>(acc[t][i], tiles[t] + step * 64, query<kType>(qs, i) + step * kPerStep<kType>);
    }
#pragma GCC unroll 8
  for (int t = 0; t < kWide; t++)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) {
      if constexpr (kType == kKvS8) scores[i * kTiles + t] = to_f32(acc[t][i]) * load<f32x16>(tiles[t] + padded * kKeys);
      else scores[i * kTiles + t] = acc[t][i];
    }
}

// Softmax weights of one segment's keys, as they meet V; over int8, weight * V's scale = at * scale.
template <KvType kType, int kCount>
struct SegmentWeights {
  alignas(64) WeightOperand<kType> at[kCount][kSegment / kStep<kType> * kPerStep<kType>];
  float scale[kCount];
};

// out[i][d ..] = sum over the segment's keys of weight * V for kVectors vectors of columns and queries `first` ..
// `first` + kRows - 1, in ascending key order.
template <KvType kType, int kVectors, int kRows, int kCount>
static inline __attribute__((always_inline)) void sum_columns(const SegmentWeights<kType, kCount>& weights, int first,
                                                              const uint8_t* const* tiles, int64_t count,
                                                              int64_t padded, int64_t d, float (*out)[kMaxHead]) {
  std::conditional_t<kType == kKvS8, ValueSum, f32x16> acc[kVectors][kRows] = {};
  constexpr int64_t kSteps = kKeys / kStep<kType>;
  for (int64_t t = 0; t < count; t++)
    for (int64_t step = 0; step < kSteps; step++) {
      const int64_t at = (step * padded + d) * 4;
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j++) {
        __builtin_prefetch(tiles[t + kAhead] + at + j * 64);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++)
          multiply<kType>(acc[j][i], tiles[t] + at + j * 64,
                          weights.at[first + i] + (t * kSteps + step) * kPerStep<kType>);
      }
    }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; j++)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
      float* to = out[first + i] + d + j * 16;
      if constexpr (kType == kKvS8) store(to, to_f32(acc[j][i].total()) * weights.scale[first + i]);
      else store(to, acc[j][i]);
    }
}

template <KvType kType, int kRows, int kCount>
static inline void sum_rows(const SegmentWeights<kType, kCount>& weights, int first, const uint8_t* const* tiles,
                            int64_t count, int64_t padded, float (*out)[kMaxHead]) {
  constexpr int kVectors = !kManyRegisters ? 1 : kRows <= 4 ? (kType == kKvS8 && kRows == 4 ? 2 : 4) : 2;
  int64_t d = 0;
  for (; d + kVectors * 16 <= padded; d += kVectors * 16)
    sum_columns<kType, kVectors, kRows, kCount>(weights, first, tiles, count, padded, d, out);
  for (; d < padded; d += 16) sum_columns<kType, 1, kRows, kCount>(weights, first, tiles, count, padded, d, out);
}

template <KvType kType, int kCount>
static inline void sum_values(const SegmentWeights<kType, kCount>& weights, const uint8_t* const* tiles,
                              int64_t count, int64_t padded, float (*out)[kMaxHead]) {
  if constexpr (kType != kKvS8 || kCount <= 3) {
    sum_rows<kType, kCount>(weights, 0, tiles, count, padded, out);
  } else if constexpr (kCount % 3 == 0) {
    for (int i = 0; i < kCount; i += 3) sum_rows<kType, 3>(weights, i, tiles, count, padded, out);
  } else {
    for (int i = 0; i < kCount; i += 4) sum_rows<kType, 4>(weights, i, tiles, count, padded, out);
  }
}

}  // namespace llmctl
