// Attention of up to 16 queries over an int8 cache in tile registers: to the bits of attention.h's attend(), since the
// products of queries with keys and of softmax weights with values are exact integers.
//
// A K tile of the cache is the second operand of a tile product as it lies. V's lie 16 keys at a time, a quarter of
// what a product takes, and are gathered first.
#pragma once
#include "attention.h"

namespace llmctl {

// Query tiles are of one half, or of two with tile registers.
constexpr int kHalves = kTilesCompiled ? 2 : 1;

#if defined(LLMCTL_AMX)
constexpr int64_t kPartKeys = kTileBytes;             // keys that a product of softmax weights takes
constexpr int64_t kParts = kSegment / kPartKeys;
constexpr int64_t kPartTiles = kPartKeys / kKeys;

// Tiles 1 and 3 hold `last` columns of queries and of K, the others whole operands and sums.
static inline void configure_for_heads(int64_t last) {
  TileShapes shapes;
  for (int t = 0; t < 8; t++) shapes.set(t, t == 3 ? last / 4 : kTileRows, t == 1 ? last : kTileBytes);
  configure_tiles(shapes);
}
static inline void configure_for_heads(const KvLayer& kv) { configure_for_heads((kv.padded - 1) % kTileBytes + 1); }

// Codes of 16 queries as tiles: [columns / 64][16][64].
struct QueryTiles {
  alignas(64) int8_t codes[kMaxHead / kTileBytes][kTileRows][kTileBytes];

  QueryTiles(const Queries (&halves)[kHalves], int64_t padded) {
    for (int64_t d = 0; d < padded; d += kTileBytes)
      for (int64_t r = 0; r < kTileRows; r++) {
        const Queries& half = halves[r / kQueries];
        int8_t* const row = codes[d / kTileBytes][r];
        if (r % kQueries < half.count) std::memcpy(row, half.quads[r % kQueries] + d / 4, kTileBytes);
        else std::memset(row, 0, kTileBytes);
      }
  }
};

// scores[r][t] of 16 queries and the tiles of a segment, as score_tiles() makes them.
static inline void score_tiled(const Queries (&halves)[kHalves], const QueryTiles& queries, const uint8_t* const* tiles,
                               int64_t count, int64_t padded, f32x16 (*scores)[kTiles]) {
  alignas(64) int32_t sums[4][kTileRows * kLanes];
  const auto multiply = [&](int64_t t, auto sum) {
    constexpr int kSum = decltype(sum)::value;
    tile_zero<kSum>();
    int64_t d = 0;
    for (; d + kTileBytes < padded; d += kTileBytes) {
      tile_load<0>(queries.codes[d / kTileBytes], kTileBytes);
      tile_load<2>(tiles[t] + d * kKeys, 64);
      dot_with_unsigned<kSum, 0, 2>();
    }
    tile_load<3>(tiles[t] + d * kKeys, 64);
    dot_with_unsigned<kSum, 1, 3>();
  };
  const auto convert = [&](int64_t t, const int32_t* from) {
    const f32x16 scale = load<f32x16>(tiles[t] + padded * kKeys);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; r++)
      scores[r][t] = to_f32(load<i32x16>(from + r * kLanes) + halves[r / kQueries].offset[r % kQueries]) * scale;
  };
  tile_load<1>(queries.codes[(padded - 1) / kTileBytes], kTileBytes);
  for (int64_t t = 0; t < count; t += 4) {
    multiply(t, std::integral_constant<int, 4>{});
    if (t + 1 < count) multiply(t + 1, std::integral_constant<int, 5>{});
    if (t + 2 < count) multiply(t + 2, std::integral_constant<int, 6>{});
    if (t + 3 < count) multiply(t + 3, std::integral_constant<int, 7>{});
    // Of the four before, while these products run.
    for (int64_t i = 0; t && i < 4; i++) convert(t - 4 + i, sums[i]);
    tile_store<4>(sums[0], 64), tile_store<5>(sums[1], 64), tile_store<6>(sums[2], 64), tile_store<7>(sums[3], 64);
  }
  for (int64_t t = (count - 1) / 4 * 4; t < count; t++) convert(t, sums[t % 4]);
}

// Softmax weights of 16 queries, 0 .. 32767, as two planes of bytes: [part][16][64 keys]. The keys of a part lie as
// packing leaves them: the first quad of each of its four tiles, then their second quads, and so on.
struct WeightPlanes {
  alignas(64) uint8_t high[kParts][kTileRows][kPartKeys], low[kParts][kTileRows][kPartKeys];

  // A row's weights for a part, as store_weights() rounds them.
  void set(int64_t part, int64_t row, const f32x16 (&x)[kPartTiles], float inverse) {
    const __m512i word = _mm512_set1_epi32(0xffff), byte = _mm512_set1_epi16(0xff);
    __m512i v[kPartTiles];
#pragma GCC unroll 4
    for (int t = 0; t < kPartTiles; t++) v[t] = _mm512_and_si512(weight_bits(x[t], inverse), word);
    const __m512i first = _mm512_packus_epi32(v[0], v[1]), second = _mm512_packus_epi32(v[2], v[3]);
    store(low[part][row], _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte)));
    store(high[part][row], _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8)));
  }
};

// out[r][d ..] of 16 queries: sums over a segment's keys of weight * V. The tiles are of whole shape.
static inline void sum_tiled(const WeightPlanes& weights, const float (&scales)[kTileRows], const uint8_t* const* tiles,
                             int64_t count, int64_t padded, Partial (&parts)[kHalves]) {
  // V by 16 columns, two of them at a time: [part][16 quads of keys, as the weights'][16 columns][4].
  // Beyond the last key weights are 0.
  alignas(64) uint8_t values[2][kParts][kTileRows][kTileBytes];
  alignas(64) int32_t sums[2][2][kTileRows * kLanes];  // by columns, high and low
  const int64_t used = (count + kPartTiles - 1) / kPartTiles;
  const auto gather = [&](int64_t d, int which) {
    for (int64_t t = 0; t < count; t++)
#pragma GCC unroll 4
      for (int64_t quad = 0; quad < 4; quad++)
        store(values[which][t / kPartTiles][quad * kPartTiles + t % kPartTiles],
              load<u8x64>(tiles[t] + (quad * padded + d) * 4));
  };
  const auto finish = [&](int64_t d, const int32_t (*from)[kTileRows * kLanes]) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; r++) {
      const i32x16 total = (load<i32x16>(from[0] + r * kLanes) << 8) + load<i32x16>(from[1] + r * kLanes);
      store(parts[r / kQueries].out[r % kQueries] + d, to_f32(total) * scales[r]);
    }
  };
  for (int64_t d = 0; d < padded; d += 2 * kLanes) {
    const bool two = d + kLanes < padded;
    gather(d, 0);
    if (two) gather(d + kLanes, 1);
    tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
    for (int64_t part = 0; part < used; part++) {
      tile_load<0>(weights.high[part], kPartKeys), tile_load<2>(values[0][part], kTileBytes);
      dot_of_unsigned<4, 0, 2>();
      tile_load<1>(weights.low[part], kPartKeys);
      dot_of_unsigned<5, 1, 2>();
      if (!two) continue;
      tile_load<3>(values[1][part], kTileBytes);
      dot_of_unsigned<6, 0, 3>(), dot_of_unsigned<7, 1, 3>();
    }
    tile_store<4>(sums[0][0], 64), tile_store<5>(sums[0][1], 64);
    if (two) tile_store<6>(sums[1][0], 64), tile_store<7>(sums[1][1], 64);
    finish(d, sums[0]);
    if (two) finish(d + kLanes, sums[1]);
  }
}

// attend() for two halves of queries over an int8 cache; the tiles are configured, and are afterwards.
static void attend_tiled(const KvLayer& kv, const Keys& keys, const Queries (&halves)[kHalves],
                         const QueryTiles& queries, Partial (&parts)[kHalves]) {
  alignas(64) f32x16 scores[kTileRows][kTiles];
  const uint8_t* tiles[2 * kTiles];
  const int64_t count = list_tiles(kv, keys, kTiles, tiles);
  for (int64_t t = 0; t < count; t++) tiles[count + t] = tiles[t] + kv.half_bytes();
  score_tiled(halves, queries, tiles, count, kv.padded, scores);
  WeightPlanes weights;
  float scales[kTileRows];
  for (int h = 0; h < kHalves; h++) {
    f32x16(*const own)[kTiles] = scores + h * kQueries;
    mask_scores<kQueries>(halves[h], keys.begin, count, own);
    float inverse[kQueries];
    SegmentWeights<kKvS8, kQueries> scaled;
    weigh<kKvS8, kQueries>(halves[h], own, tiles + count, count, kv.padded, scaled, inverse, parts[h]);
    for (int i = 0; i < kQueries; i++) {
      scales[h * kQueries + i] = scaled.scale[i];
      for (int64_t part = 0; part * kPartTiles < count; part++) {
        f32x16 x[kPartTiles] = {};
        for (int64_t t = 0; t < kPartTiles && part * kPartTiles + t < count; t++) x[t] = own[i][part * kPartTiles + t];
        weights.set(part, h * kQueries + i, x, inverse[i]);
      }
    }
  }
  const bool other_shapes = kv.padded % kTileBytes != 0;
  if (other_shapes) configure_for_heads(kTileBytes);
  sum_tiled(weights, scales, tiles + count, count, kv.padded, parts);
  if (other_shapes) configure_for_heads(kv);
}
#endif

}  // namespace llmctl
