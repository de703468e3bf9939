// Paged attention for decode and (chunked) prefill over a cache of fp32, bf16 or int8.
//
// A query attends to keys in tiles of 16 and segments of kSegment keys, both at absolute positions; within a segment the
// softmax is exact, segments are merged in ascending order (flash-decoding, Dao et al. 2023). So the order of every sum
// depends on positions alone: not on the batch, the chunking of a prefill or the threads. Over an int8 cache queries are
// 8-bit and softmax weights 16-bit integers and the sums are exact: with a segment of at most 256 keys 2^15 * 2^7 * 2^8
// stays below 2^31.
#pragma once
#include "attention_products.h"
#include "rowops.h"

namespace llmctl {

// Softmax of up to kQueries queries over some keys: out = sum 2^(s - top) v, sum = sum 2^(s - top), s = score * log2 e.
struct Partial {
  alignas(64) float out[kQueries][kMaxHead];
  alignas(64) float top[kLanes] = {}, sum[kLanes] = {};
};

// Keys begin .. end-1 of one sequence and K/V head: at most a segment, begin a multiple of kSegment.
struct Keys {
  const int32_t* blocks;
  int64_t head, begin, end;
};

// Lists the tiles of K that hold some keys, at most `most`; those of V lie half_bytes() behind. Returns how many.
static inline int64_t list_tiles(const KvLayer& kv, const Keys& keys, int64_t most, const uint8_t** tiles) {
  int64_t block = keys.begin / kv.block_size, offset = keys.begin % kv.block_size, count = 0;
  for (int64_t key = keys.begin; key < keys.end && count < most; key += kKeys) {
    tiles[count++] = kv.tile(keys.blocks[block], keys.head, offset);
    offset += kKeys;
    if (offset == kv.block_size) block++, offset = 0;
  }
  return count;
}

// Soft cap of all scores; mask of the tiles that hold keys which a query must not see.
template <int kCount>
static inline void mask_scores(const Queries& qs, int64_t begin, int64_t count, f32x16 (*scores)[kTiles]) {
  const f32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, never = splat(-INFINITY);
  const float cap = qs.softcap * kLog2E;
  for (int i = 0; i < kCount; i++) {
    if (cap > 0)
      for (int64_t t = 0; t < count; t++) scores[i][t] = vtanh(scores[i][t] * (qs.scale[i] / cap)) * cap;
    const int64_t last = qs.position[i] - begin, first = qs.lo[i] - begin;
    for (int64_t t = last < 0 ? 0 : (last + 1) / kKeys; t < count; t++)
      scores[i][t] = lanes + float(t * kKeys) > float(last) ? never : scores[i][t];
    for (int64_t t = 0; t < count && t * kKeys < first; t++)
      scores[i][t] = lanes + float(t * kKeys) < float(first) ? never : scores[i][t];
  }
}

// A reduction for each query, in the order of reduce_add().
template <int kCount, class Op>
static inline void reduce_queries(const f32x16 (&v)[kCount], Op&& op, float* to) {
#if defined(LLMCTL_AVX512)
  if constexpr (kCount == 8) {
    const f32x16 all = reduce_eight(v, op);
    std::memcpy(to, &all, 32);
    return;
  }
#endif
#pragma GCC unroll 8
  for (int i = 0; i < kCount; i++) to[i] = reduce(v[i], op);
}

// Largest scores (times to_log2) of the queries.
template <int kCount>
static inline void find_tops(const f32x16 (*scores)[kTiles], const float* to_log2, int64_t count, float* top) {
  f32x16 high[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; i++) high[i] = splat(-INFINITY);
  for (int64_t t = 0; t < count; t++)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) high[i] = vmax(high[i], scores[i][t]);
  float highest[kCount];
  reduce_queries<kCount>(high, [](f32x16 a, f32x16 b) { return vmax(a, b); }, highest);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; i++) top[i] = highest[i] * to_log2[i];
}

// Scores -> softmax weights, their sums, and the operands that meet V (tiles); over int8 the scores become what those
// are rounded from, times inverse [kCount]. Query by query the sums would wait for each other; loops with the queries
// inside have independent ones.
template <KvType kType, int kCount>
static inline void weigh(const Queries& qs, f32x16 (*scores)[kTiles], const uint8_t* const* tiles, int64_t count,
                         int64_t padded, SegmentWeights<kType, kCount>& weights, float* inverse, Partial& part) {
  float to_log2[kCount], zero[kCount];
  for (int i = 0; i < kCount; i++) to_log2[i] = qs.softcap > 0 ? 1.0f : qs.scale[i];
  find_tops<kCount>(scores, to_log2, count, part.top);
  // A query that sees no key of this segment has top = -inf; its weights must be 0, not exp(nan).
  for (int i = 0; i < kCount; i++) zero[i] = part.top[i] == -INFINITY ? 0.0f : part.top[i];
  f32x16 sum[kCount] = {}, largest[kCount] = {};
  for (int64_t t = 0; t < count; t++) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) {
      const f32x16 w = vexp2(scores[i][t] * to_log2[i] - zero[i]);
      sum[i] += w;
      if constexpr (kType == kKvS8) {
        // What lies beyond the sequence may be a former request's, even NaN: it must not meet a weight of 0.
        scores[i][t] = w > 0.0f ? w * load<f32x16>(tiles[t] + padded * kKeys) : f32x16{};
        largest[i] = vmax(largest[i], scores[i][t]);
      } else if constexpr (kType == kKvBf16 && kDotPairs) {
        store(weights.at[i] + t * kKeys, f32_to_bf16(w));
      } else {
        store(weights.at[i] + t * kKeys, w);
      }
    }
  }
  reduce_queries<kCount>(sum, [](f32x16 a, f32x16 b) { return a + b; }, part.sum);
  if constexpr (kType == kKvS8) {
    float most[kCount];
    reduce_queries<kCount>(largest, [](f32x16 a, f32x16 b) { return vmax(a, b); }, most);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) {
      inverse[i] = inverse_scale(most[i], kMostWeight);
      weights.scale[i] = most[i] / kMostWeight;
    }
  }
}

// Scores of tiles t .. count-1, kWide at a time, so that independent sums cover the latency of an addition.
template <KvType kType, int kWide, int kCount>
static inline void score_segment(const Queries& qs, const uint8_t* const* tiles, int64_t count, int64_t padded, int64_t t,
                                 f32x16 (*scores)[kTiles]) {
  for (; t + kWide <= count; t += kWide)
    score_tiles<kType, kWide, kCount>(qs, tiles + t, padded, scores[0] + t);
  if constexpr (kWide > 1)
    if (t < count) score_segment<kType, kWide / 2, kCount>(qs, tiles, count, padded, t, scores);
}

// One segment of keys into `part`; `ahead`: those that this thread will see next.
template <KvType kType, int kCount>
static void attend_segment(const KvLayer& kv, const Keys& keys, const Queries& qs, const Keys& ahead, Partial& part) {
  alignas(64) f32x16 scores[kCount][kTiles];
  const uint8_t* tiles[2 * kTiles + kAhead];  // K, V, then what is only prefetched
  const int64_t count = list_tiles(kv, keys, kTiles, tiles);
  for (int64_t t = 0; t < count; t++) {
    tiles[count + t] = tiles[t] + kv.half_bytes();
    if (kv.type == kKvS8) __builtin_prefetch(tiles[count + t] + kv.tile_codes());  // weigh reads the scales first
  }
  for (int64_t t = list_tiles(kv, ahead, kAhead, tiles + 2 * count); t < kAhead; t++) tiles[2 * count + t] = tiles[0];
  constexpr int kWide = !kManyRegisters ? 1 : kCount <= 6 ? 4 : 2;
  score_segment<kType, kWide, kCount>(qs, tiles, count, kv.padded, 0, scores);
  mask_scores<kCount>(qs, keys.begin, count, scores);
  SegmentWeights<kType, kCount> weights;
  float inverse[kCount];
  weigh<kType, kCount>(qs, scores, tiles + count, count, kv.padded, weights, inverse, part);
  if constexpr (kType == kKvS8)
    for (int i = 0; i < kCount; i++)
      for (int64_t t = 0; t < count; t++) store_weights(scores[i][t], inverse[i], weights.at[i] + t * (kKeys / 4));
  sum_values<kType, kCount>(weights, tiles + count, count, kv.padded, part.out);
}

template <KvType kType>
static inline void attend_counted(const KvLayer& kv, const Keys& keys, const Queries& qs, const Keys& ahead,
                                  Partial& part) {
  switch (qs.count) {
    case 1: return attend_segment<kType, 1>(kv, keys, qs, ahead, part);
    case 2: return attend_segment<kType, 2>(kv, keys, qs, ahead, part);
    case 3: return attend_segment<kType, 3>(kv, keys, qs, ahead, part);
    case 4: return attend_segment<kType, 4>(kv, keys, qs, ahead, part);
    case 6: return attend_segment<kType, 6>(kv, keys, qs, ahead, part);
    default: return attend_segment<kType, 8>(kv, keys, qs, ahead, part);
  }
}

static inline void attend(const KvLayer& kv, const Keys& keys, const Queries& qs, const Keys& ahead, Partial& part) {
  switch (kv.type) {
    case kKvS8: return attend_counted<kKvS8>(kv, keys, qs, ahead, part);
    case kKvBf16: return attend_counted<kKvBf16>(kv, keys, qs, ahead, part);
    default: return attend_counted<kKvF32>(kv, keys, qs, ahead, part);
  }
}

// total <- total merged with part. A query that part has no key of keeps its total: 2^0 = 1 exactly.
static inline void merge(Partial& total, const Partial& part, int count, int64_t padded) {
  const f32x16 was = load<f32x16>(total.top), other = load<f32x16>(part.top), top = vmax(was, other);
  alignas(64) float keep[kLanes], add[kLanes];
  store(keep, vexp2(was - top));
  store(add, vexp2(other - top));
  store(total.top, top);
  for (int i = 0; i < count; i++) {
    for (int64_t d = 0; d < padded; d += 16)
      store(total.out[i] + d,
            fused(load<f32x16>(total.out[i] + d), keep[i], load<f32x16>(part.out[i] + d) * add[i]));
    total.sum[i] = fused(total.sum[i], keep[i], part.sum[i] * add[i]);
  }
}

}  // namespace llmctl
