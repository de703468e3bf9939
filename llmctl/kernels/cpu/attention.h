// Paged attention for decode and (chunked) prefill over a cache of bf16 or fp32.
//
// Cache layout, per layer: [block][kv_head][16-token subtile] of one K tile and one V tile, head size padded to D % 16 == 0
//   bf16  K [D/2][16 tokens][2]     V [8 token pairs][D][2]      (operands of vdpbf16ps)
//   fp32  K [D][16 tokens]          V [16 tokens][D]
// A query attends to keys in tiles of 16 and segments of kSegment keys, both at absolute positions; within a segment the
// softmax is online (Milakov & Gimelshein 2018), segments are merged in ascending order (flash-decoding, Dao et al. 2023).
// So the order of every sum depends on positions alone: not on the batch, the chunking of a prefill or the threads.
#pragma once
#include <type_traits>

#include "rowops.h"

namespace llmctl {

constexpr int64_t kKeys = 16;        // keys a tile
constexpr int64_t kSegment = 256;    // keys a segment, a multiple of kKeys
constexpr int kQueries = 8;          // queries sharing the loads of one K/V head
constexpr int64_t kMaxHead = 256;

struct KvLayer {
  uint8_t* base;
  int64_t kv_heads, dim, padded;  // padded: dim rounded up to 16
  bool bf16;
  int64_t block_size;  // a multiple of kKeys
  int64_t half_bytes() const { return kKeys * padded * (bf16 ? 2 : 4); }  // one K or V tile
  uint8_t* tile(int64_t block, int64_t head, int64_t offset) const {
    return base + (((block * kv_heads + head) * (block_size / kKeys) + offset / kKeys) * 2) * half_bytes();
  }
};

// Writes one token's K and V of one head at `slot` (block * block_size + offset).
static inline void kv_store(const KvLayer& kv, int64_t slot, int64_t head, const float* k, const float* v) {
  const int64_t block = slot / kv.block_size, offset = slot % kv.block_size, lane = offset % kKeys;
  uint8_t* tile = kv.tile(block, head, offset);
  if (kv.bf16) {
    uint16_t *kt = (uint16_t*)tile + lane * 2;
    uint16_t *vt = (uint16_t*)(tile + kv.half_bytes()) + lane / 2 * kv.padded * 2 + lane % 2;
    int64_t d = 0;
    for (; d + 16 <= kv.dim; d += 16) {
      uint16_t ks[16], vs[16];
      store(ks, f32_to_bf16(load<f32x16>(k + d)));
      store(vs, f32_to_bf16(load<f32x16>(v + d)));
      for (int i = 0; i < 16; i += 2) std::memcpy(kt + (d + i) * kKeys, ks + i, 4);
      for (int i = 0; i < 16; i++) vt[(d + i) * 2] = vs[i];
    }
    for (; d < kv.dim; d++) {
      kt[d / 2 * 32 + d % 2] = f32_to_bf16(k[d]);
      vt[d * 2] = f32_to_bf16(v[d]);
    }
  } else {
    float *kt = (float*)tile, *vt = (float*)(tile + kv.half_bytes());
    for (int64_t d = 0; d < kv.dim; d++) {
      kt[d * kKeys + lane] = k[d];
      vt[lane * kv.padded + d] = v[d];
    }
  }
}

// Running softmax of up to kQueries queries over some keys: out = sum exp(s - top) v, sum = sum exp(s - top).
struct Partial {
  alignas(64) float out[kQueries][kMaxHead];
  float top[kQueries], sum[kQueries];
};

// Queries of one K/V head; position[i] is query i's own position: it sees keys lo[i] .. position[i].
struct Queries {
  int count;
  int64_t position[kQueries], lo[kQueries];
  alignas(64) float q[kQueries][kMaxHead];  // scaled
  alignas(64) uint16_t q16[kQueries][kMaxHead];
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

// acc[t][i] += line_t . pair i, where a line holds 16 pairs of bf16 and x(i) is query i's pair.
template <int kTiles, int kCount, class Line, class Pair>
static inline __attribute__((always_inline)) void multiply_pairs(f32x16 (&acc)[kTiles][kCount], Line line, Pair pair) {
#pragma GCC unroll 8
  for (int t = 0; t < kTiles; t++) {
    if constexpr (kDotPairs) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++) acc[t][i] = dot2_bf16(acc[t][i], line(t), pair(i));
    } else {
      const u32x16 both = load<u32x16>(line(t)), even = both << 16, odd = both & 0xffff0000u;
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++) {
        acc[t][i] += load<f32x16>(&even) * pair(i)[0];
        acc[t][i] += load<f32x16>(&odd) * pair(i)[1];
      }
    }
  }
}

// scores[t][i] = K of tile t . query i, for kTiles tiles; every sum runs over ascending d.
template <bool kBf16, int kTiles, int kCount>
static inline __attribute__((always_inline)) void score_tiles(const Queries& qs, const uint8_t* const* tiles,
                                                              int64_t padded, f32x16 (*scores)[kCount]) {
  f32x16 acc[kTiles][kCount];
#pragma GCC unroll 8
  for (int t = 0; t < kTiles; t++)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) acc[t][i] = f32x16{};
  if constexpr (kBf16) {
    for (int64_t d = 0; d < padded; d += 2) {
      const auto line = [&](int t) { return (const uint16_t*)tiles[t] + d * kKeys; };
      if constexpr (kDotPairs) multiply_pairs(acc, line, [&](int i) { return qs.q16[i] + d; });
      else multiply_pairs(acc, line, [&](int i) { return qs.q[i] + d; });
    }
  } else {
    for (int64_t d = 0; d < padded; d++)
#pragma GCC unroll 8
      for (int t = 0; t < kTiles; t++) {
        const f32x16 keys = load<f32x16>((const float*)tiles[t] + d * kKeys);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; i++) acc[t][i] += keys * qs.q[i][d];
      }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTiles; t++)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) scores[t][i] = acc[t][i];
}

// Softmax weights of one segment's keys, in the type that meets V.
template <bool kBf16, int kCount>
struct SegmentWeights {
  alignas(64) std::conditional_t<kBf16 && kDotPairs, uint16_t, float> at[kCount][kSegment];
};

// part.out[i][d ..] = sum over the segment's keys of weight * V for kVectors vectors of columns, in ascending key order.
template <bool kBf16, int kVectors, int kCount>
static inline __attribute__((always_inline)) void sum_columns(const SegmentWeights<kBf16, kCount>& weights,
                                                              const uint8_t* const* tiles, int64_t count,
                                                              int64_t padded, int64_t d, Partial& part) {
  f32x16 acc[kVectors][kCount];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; j++)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) acc[j][i] = f32x16{};
  for (int64_t t = 0; t < count; t++)
    for (int64_t key = 0; key < kKeys; key += kBf16 ? 2 : 1) {
      const auto weight = [&](int i) { return weights.at[i] + t * kKeys + key; };
      if constexpr (kBf16) {
        const uint16_t* line = (const uint16_t*)tiles[t] + key * padded + d * 2;
        multiply_pairs(acc, [&](int j) { return line + j * 32; }, weight);
      } else {
        const float* line = (const float*)tiles[t] + key * padded + d;
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; j++) {
          const f32x16 values = load<f32x16>(line + j * 16);
#pragma GCC unroll 8
          for (int i = 0; i < kCount; i++) acc[j][i] += values * *weight(i);
        }
      }
    }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; j++)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) store(part.out[i] + d + j * 16, acc[j][i]);
}

template <bool kBf16, int kCount>
static inline void sum_values(const SegmentWeights<kBf16, kCount>& weights, const uint8_t* const* tiles, int64_t count,
                              int64_t padded, Partial& part) {
  constexpr int kVectors = kWide<kCount> < 4 ? kWide<kCount> : 4;
  int64_t d = 0;
  for (; d + kVectors * 16 <= padded; d += kVectors * 16)
    sum_columns<kBf16, kVectors, kCount>(weights, tiles, count, padded, d, part);
  for (; d < padded; d += 16) sum_columns<kBf16, 1, kCount>(weights, tiles, count, padded, d, part);
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
template <bool kBf16, int kCount>
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
    score_tiles<kBf16, kWide<kCount>, kCount>(qs, tiles + t, kv.padded, scores + t);
  }
  for (; t < count; t++) score_tiles<kBf16, 1, kCount>(qs, tiles + t, kv.padded, scores + t);
  f32x16 top[kCount];
  for (int i = 0; i < kCount; i++) top[i] = splat(-INFINITY);
  for (t = 0; t < count; t++) {
    mask_scores(qs, begin + t * kKeys, scores[t]);
    for (int i = 0; i < kCount; i++) top[i] = vmax(top[i], scores[t][i]);
    tiles[t] += kv.half_bytes();
  }
  SegmentWeights<kBf16, kCount> weights;
  for (int i = 0; i < kCount; i++) {
    // A query that sees no key of this segment has top = -inf; its weights must be 0, not exp(nan).
    part.top[i] = reduce_max(top[i]);
    f32x16 sum{};
    for (t = 0; t < count; t++) {
      const f32x16 w = part.top[i] == -INFINITY ? f32x16{} : vexp(scores[t][i] - part.top[i]);
      sum += w;
      if constexpr (kBf16 && kDotPairs) store(weights.at[i] + t * kKeys, f32_to_bf16(w));
      else store(weights.at[i] + t * kKeys, w);
    }
    part.sum[i] = reduce_add(sum);
  }
  sum_values<kBf16, kCount>(weights, tiles, count, kv.padded, part);
}

template <bool kBf16>
static inline void attend_counted(const KvLayer& kv, const int32_t* blocks, int64_t head, const Queries& qs,
                                  int64_t begin, int64_t end, Partial& part) {
  switch (qs.count) {
    case 1: return attend_segment<kBf16, 1>(kv, blocks, head, qs, begin, end, part);
    case 2: return attend_segment<kBf16, 2>(kv, blocks, head, qs, begin, end, part);
    case 3: return attend_segment<kBf16, 3>(kv, blocks, head, qs, begin, end, part);
    case 4: return attend_segment<kBf16, 4>(kv, blocks, head, qs, begin, end, part);
    case 5: return attend_segment<kBf16, 5>(kv, blocks, head, qs, begin, end, part);
    case 6: return attend_segment<kBf16, 6>(kv, blocks, head, qs, begin, end, part);
    case 7: return attend_segment<kBf16, 7>(kv, blocks, head, qs, begin, end, part);
    default: return attend_segment<kBf16, 8>(kv, blocks, head, qs, begin, end, part);
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
  if (kv.bf16) attend_counted<true>(kv, blocks, head, qs, begin, end, part);
  else attend_counted<false>(kv, blocks, head, qs, begin, end, part);
}

}  // namespace llmctl
