// Paged attention for decode and (chunked) prefill over a cache of fp32, bf16 or int8.
//
// A query attends to keys in tiles of 16 and segments of kSegment keys, both at absolute positions; within a segment the
// softmax is online (Milakov & Gimelshein 2018), segments are merged in ascending order (flash-decoding, Dao et al.
// 2023). So the order of every sum depends on positions alone: not on the batch, the chunking of a prefill or the
// threads. Over an int8 cache queries and softmax weights are 16-bit integers and the sums are exact: with a segment of
// at most 256 keys and heads of at most 256 columns, 2^15 * 2^7 * 2^8 stays below 2^31.
#pragma once
#include <type_traits>

#include "kv_cache.h"
#include "rowops.h"

namespace llmctl {

constexpr int64_t kSegment = 256;    // keys a segment, a multiple of kKeys
constexpr int kQueries = 8;          // queries sharing the loads of one K/V head

// Running softmax of up to kQueries queries over some keys: out = sum exp(s - top) v, sum = sum exp(s - top).
struct Partial {
  alignas(64) float out[kQueries][kMaxHead];
  float top[kQueries], sum[kQueries];
};

// Queries of one K/V head; position[i] is query i's own position: it sees keys lo[i] .. position[i].
struct Queries {
  int count;
  int64_t position[kQueries] = {}, lo[kQueries] = {};
  alignas(64) float q[kQueries][kMaxHead];  // scaled
  alignas(64) uint16_t q16[kQueries][kMaxHead];  // bf16
  alignas(64) int16_t codes[kQueries][kMaxHead];  // q = code * code_scale
  float code_scale[kQueries] = {};
  float softcap;
};

// Independent sums in flight, to cover the latency of an addition: accumulators are [kWide][kCount].
template <int kCount>
constexpr int kWide = !kManyRegisters ? 1 : kCount <= 2 ? 8 : kCount <= 4 ? 4 : 2;

#if defined(LLMCTL_AVX512_BF16)
constexpr bool kDotPairs = true;  // vdpbf16ps multiplies pairs as they lie in the cache
#else
constexpr bool kDotPairs = false;  // pairs are widened to fp32, the other operand stays fp32
#endif

// What meets the cache's elements (queries meet K, softmax weights meet V), and what their products are summed in.
template <KvType kType>
using Operand = std::conditional_t<kType == kKvInt8, int16_t, std::conditional_t<kType == kKvBf16 && kDotPairs, uint16_t, float>>;
template <KvType kType>
using Sum = std::conditional_t<kType == kKvInt8, i32x16, f32x16>;
template <KvType kType>
constexpr int64_t kStep = kType == kKvF32 ? 1 : 2;  // elements of an operand that meet one line of the cache

template <KvType kType>
static inline const Operand<kType>* query(const Queries& qs, int i) {
  if constexpr (kType == kKvInt8) return qs.codes[i];
  else if constexpr (kType == kKvBf16 && kDotPairs) return qs.q16[i];
  else return qs.q[i];
}

// acc[t][i] += line t of the cache (16 lanes of kStep elements) . the operand's kStep elements at x(i).
template <KvType kType, int kLines, int kCount, class Line, class X>
static inline __attribute__((always_inline)) void multiply(Sum<kType> (&acc)[kLines][kCount], Line line, X x) {
#pragma GCC unroll 8
  for (int t = 0; t < kLines; t++) {
    if constexpr (kType == kKvInt8) {
      const i16x32 wide = i8_to_i16((const int8_t*)line(t));
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++) acc[t][i] = dot2_i16(acc[t][i], wide, x(i));
    } else if constexpr (kType == kKvF32) {
      const f32x16 values = load<f32x16>(line(t));
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++) acc[t][i] += values * *x(i);
    } else if constexpr (kDotPairs) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++) acc[t][i] = dot2_bf16(acc[t][i], (const uint16_t*)line(t), x(i));
    } else {
      const u32x16 both = load<u32x16>(line(t)), even = both << 16, odd = both & 0xffff0000u;
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++) {
        acc[t][i] += load<f32x16>(&even) * x(i)[0];
        acc[t][i] += load<f32x16>(&odd) * x(i)[1];
      }
    }
  }
}

// Bytes of one line of the cache.
template <KvType kType>
constexpr int64_t kLineBytes = kType == kKvInt8 ? 32 : 64;

// scores[t][i] = K of tile t . query i, for kTiles tiles; every sum runs over ascending d.
template <KvType kType, int kTiles, int kCount>
static inline __attribute__((always_inline)) void score_tiles(const Queries& qs, const uint8_t* const* tiles,
                                                              int64_t padded, f32x16 (*scores)[kCount]) {
  Sum<kType> acc[kTiles][kCount] = {};
  for (int64_t d = 0; d < padded; d += kStep<kType>)
    multiply<kType>(acc, [&](int t) { return tiles[t] + d / kStep<kType> * kLineBytes<kType>; },
                    [&](int i) { return query<kType>(qs, i) + d; });
#pragma GCC unroll 8
  for (int t = 0; t < kTiles; t++) {
    if constexpr (kType == kKvInt8) {
      const f32x16 scale = load<f32x16>(tiles[t] + padded * kKeys);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++) scores[t][i] = to_f32(acc[t][i]) * (scale * qs.code_scale[i]);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++) scores[t][i] = acc[t][i];
    }
  }
}

// Softmax weights of one segment's keys, in the type that meets V; over int8, weight * V's scale = at * scale.
template <KvType kType, int kCount>
struct SegmentWeights {
  alignas(64) Operand<kType> at[kCount][kSegment];
  float scale[kCount];
};

// part.out[i][d ..] = sum over the segment's keys of weight * V for kVectors vectors of columns, in ascending key order.
template <KvType kType, int kVectors, int kCount>
static inline __attribute__((always_inline)) void sum_columns(const SegmentWeights<kType, kCount>& weights,
                                                              const uint8_t* const* tiles, int64_t count,
                                                              int64_t padded, int64_t d, Partial& part) {
  Sum<kType> acc[kVectors][kCount] = {};
  for (int64_t t = 0; t < count; t++)
    for (int64_t key = 0; key < kKeys; key += kStep<kType>) {
      const uint8_t* line = tiles[t] + (key / kStep<kType> * padded + d) * (kLineBytes<kType> / 16);
      multiply<kType>(acc, [&](int j) { return line + j * kLineBytes<kType>; },
                      [&](int i) { return weights.at[i] + t * kKeys + key; });
    }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; j++)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) {
      float* out = part.out[i] + d + j * 16;
      if constexpr (kType == kKvInt8) store(out, to_f32(acc[j][i]) * weights.scale[i]);
      else store(out, acc[j][i]);
    }
}

template <KvType kType, int kCount>
static inline void sum_values(const SegmentWeights<kType, kCount>& weights, const uint8_t* const* tiles, int64_t count,
                              int64_t padded, Partial& part) {
  constexpr int kVectors = kWide<kCount> < 4 ? kWide<kCount> : 4;
  int64_t d = 0;
  for (; d + kVectors * 16 <= padded; d += kVectors * 16)
    sum_columns<kType, kVectors, kCount>(weights, tiles, count, padded, d, part);
  for (; d < padded; d += 16) sum_columns<kType, 1, kCount>(weights, tiles, count, padded, d, part);
}

// One query's weights of a segment as the operand that meets V. tiles: V.
template <KvType kType, int kCount>
static inline void pack_weights(const f32x16 (*w)[kCount], int i, const uint8_t* const* tiles, int64_t count,
                                int64_t padded, SegmentWeights<kType, kCount>& weights) {
  if constexpr (kType == kKvInt8) {
    f32x16 top{}, scaled[kSegment / kKeys];
    for (int64_t t = 0; t < count; t++) {
      scaled[t] = w[t][i] * load<f32x16>(tiles[t] + padded * kKeys);
      top = vmax(top, scaled[t]);
    }
    const float largest = reduce_max(top), inverse = inverse_scale(largest, 32767.0f);
    weights.scale[i] = largest / 32767.0f;
    for (int64_t t = 0; t < count; t++) store(weights.at[i] + t * kKeys, f32_to_i16(scaled[t] * inverse));
  } else {
    for (int64_t t = 0; t < count; t++) {
      if constexpr (kType == kKvBf16 && kDotPairs) store(weights.at[i] + t * kKeys, f32_to_bf16(w[t][i]));
      else store(weights.at[i] + t * kKeys, w[t][i]);
    }
  }
}

// Soft cap and mask of the scores of keys `key` .. `key + 15`.
template <int kCount>
static inline void mask_scores(const Queries& qs, int64_t key, f32x16 (&scores)[kCount]) {
  const f32x16 at = f32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + float(key), never = splat(-INFINITY);
  for (int i = 0; i < kCount; i++) {
    f32x16 s = scores[i];
    if (qs.softcap > 0) s = vtanh(s / qs.softcap) * qs.softcap;
    if (key + kKeys - 1 > qs.position[i]) s = at > float(qs.position[i]) ? never : s;
    if (key < qs.lo[i]) s = at < float(qs.lo[i]) ? never : s;
    scores[i] = s;
  }
}

// One segment [begin, end) of keys (end - begin <= kSegment, begin a multiple of kSegment) into `part`.
template <KvType kType, int kCount>
static void attend_segment(const KvLayer& kv, const int32_t* blocks, int64_t head, const Queries& qs, int64_t begin,
                           int64_t end, Partial& part) {
  alignas(64) f32x16 scores[kSegment / kKeys][kCount];
  const uint8_t* tiles[kSegment / kKeys];
  const int64_t count = (end - begin + kKeys - 1) / kKeys;
  for (int64_t t = 0; t < count; t++) {
    const int64_t key = begin + t * kKeys;
    tiles[t] = kv.tile(blocks[key / kv.block_size], head, key % kv.block_size);
  }
  int64_t t = 0;
  for (; t + kWide<kCount> <= count; t += kWide<kCount>) {
    // The K tiles of the next round, and this round's V tiles, which lie behind its K tiles.
    for (int64_t next = t; next < t + kWide<kCount>; next++) {
      if (next + kWide<kCount> < count) prefetch(tiles[next + kWide<kCount>], kv.half_bytes());
      prefetch(tiles[next] + kv.half_bytes(), kv.half_bytes());
    }
    score_tiles<kType, kWide<kCount>, kCount>(qs, tiles + t, kv.padded, scores + t);
  }
  for (; t < count; t++) score_tiles<kType, 1, kCount>(qs, tiles + t, kv.padded, scores + t);
  f32x16 top[kCount];
  for (int i = 0; i < kCount; i++) top[i] = splat(-INFINITY);
  for (t = 0; t < count; t++) {
    mask_scores(qs, begin + t * kKeys, scores[t]);
    for (int i = 0; i < kCount; i++) top[i] = vmax(top[i], scores[t][i]);
    tiles[t] += kv.half_bytes();
  }
  SegmentWeights<kType, kCount> weights;
  for (int i = 0; i < kCount; i++) {
    // A query that sees no key of this segment has top = -inf; its weights must be 0, not exp(nan).
    part.top[i] = reduce_max(top[i]);
    f32x16 sum{};
    for (t = 0; t < count; t++) {
      scores[t][i] = part.top[i] == -INFINITY ? f32x16{} : vexp(scores[t][i] - part.top[i]);
      sum += scores[t][i];
    }
    part.sum[i] = reduce_add(sum);
    pack_weights<kType, kCount>(scores, i, tiles, count, kv.padded, weights);
  }
  sum_values<kType, kCount>(weights, tiles, count, kv.padded, part);
}

template <KvType kType>
static inline void attend_counted(const KvLayer& kv, const int32_t* blocks, int64_t head, const Queries& qs,
                                  int64_t begin, int64_t end, Partial& part) {
  switch (qs.count) {
    case 1: return attend_segment<kType, 1>(kv, blocks, head, qs, begin, end, part);
    case 2: return attend_segment<kType, 2>(kv, blocks, head, qs, begin, end, part);
    case 3: return attend_segment<kType, 3>(kv, blocks, head, qs, begin, end, part);
    case 4: return attend_segment<kType, 4>(kv, blocks, head, qs, begin, end, part);
    case 6: return attend_segment<kType, 6>(kv, blocks, head, qs, begin, end, part);
    default: return attend_segment<kType, 8>(kv, blocks, head, qs, begin, end, part);
  }
}

// total <- total merged with part, query by query.
static inline void merge(Partial& total, const Partial& part, int count, int64_t padded) {
  for (int i = 0; i < count; i++) {
    if (part.top[i] == -INFINITY) continue;  // the query sees no key of this segment
    const float top = part.top[i] > total.top[i] ? part.top[i] : total.top[i];
    const float keep = total.top[i] == -INFINITY ? 0.0f : std::exp(total.top[i] - top);
    const float add = std::exp(part.top[i] - top);
    for (int64_t d = 0; d < padded; d += 16)
      store(total.out[i] + d, load<f32x16>(total.out[i] + d) * keep + load<f32x16>(part.out[i] + d) * add);
    total.sum[i] = total.sum[i] * keep + part.sum[i] * add;
    total.top[i] = top;
  }
}

// Segment `segment` of the keys, as far as the queries see it, into `part`.
static inline void attend_one(const KvLayer& kv, const int32_t* blocks, int64_t head, const Queries& qs,
                              int64_t segment, Partial& part) {
  int64_t end = 0;
  for (int i = 0; i < qs.count; i++) end = qs.position[i] + 1 > end ? qs.position[i] + 1 : end;
  const int64_t begin = segment * kSegment;
  end = begin + kSegment < end ? begin + kSegment : end;
  switch (kv.type) {
    case kKvInt8: return attend_counted<kKvInt8>(kv, blocks, head, qs, begin, end, part);
    case kKvBf16: return attend_counted<kKvBf16>(kv, blocks, head, qs, begin, end, part);
    default: return attend_counted<kKvF32>(kv, blocks, head, qs, begin, end, part);
  }
}

}  // namespace llmctl
