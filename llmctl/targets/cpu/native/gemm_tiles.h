// Products of integer weights with int8 activations in tile registers: to the bits of gemm.h's int_tile, since the sums
// over an activation group are exact and what follows them is the same arithmetic in the same order.
//
// Up to 32 rows meet a tile of 32 outputs in four tiles of sums, each of which is read only after the next group's
// products have begun (measured: the loop takes 17 ns a tile of sums so, about what its fp32 arithmetic does alone).
#pragma once
#include <algorithm>

#include "gemm.h"

namespace llmctl {

constexpr int64_t kPairRows = 2 * kTileRows;

// fp32 totals of up to 32 rows of a tile.
struct PairTotals {
  f32x16 at[kPairRows / 8][8][2];
  f32x16* row(int64_t r) { return at[r / 8][r % 8]; }
};

#if defined(LLMCTL_AMX)
// A tile of weights as the second operand of tile products: [groups][half][parts][columns / 4][64].
struct TiledWeights {
  int8_t* codes;   // code - zero (w4), code - 128 (w8)
  bool corrected;  // zero points of w8, or of none, are in the codes
  static int64_t bytes(int64_t k, int64_t act_group) {
    return k / act_group * TileGroup(act_group).row_bytes() * kTile;
  }
};

static inline void configure_for(int64_t act_group) {
  const int64_t columns = TileGroup(act_group).columns;
  TileShapes shapes;
  for (int t = 0; t < 2; t++) shapes.set(t, kTileRows, columns);
  for (int t = 2; t < 4; t++) shapes.set(t, columns / 4, kTileBytes);
  for (int t = 4; t < 8; t++) shapes.set(t, kTileRows, kTileBytes);
  configure_tiles(shapes);
}

template <int kBits, bool kMin>
static inline TiledWeights make_tiled(const Weights& w, int64_t tile, int64_t act_group, int8_t* to) {
  const uint8_t* codes = w.data + tile * w.k * kTile * kBits / 8;
  const int64_t groups = w.k / w.group, half_bytes = TileGroup(act_group).row_bytes() * kLanes;
  const uint8_t* zeros = kMin ? nullptr : w.zeros + tile * groups * kTile;
  TiledWeights out{to, kBits == 4 || !kMin};
  if (kBits == 8 && !kMin)
    for (int64_t i = 0; i < groups * kTile; i += kLanes)
      for (int j = 0; j < kLanes; j++) out.corrected &= zeros[i + j] == 128;
  for (int64_t k = 0; k < w.k; to += 2 * half_bytes) {
    u8x64 zero0{}, zero1{};
    if constexpr (kBits == 4 && !kMin) {
      zero0 = (u8x64)(u8_to_i32(zeros + k / w.group * kTile) * 0x01010101);
      zero1 = (u8x64)(u8_to_i32(zeros + k / w.group * kTile + kLanes) * 0x01010101);
    }
    int8_t* line = to;
    for (const int64_t end = k + act_group; k < end; k += 4, codes += kBits * 16, line += 64) {
      const u8x64 packed = load<u8x64>(codes);
      store(line, kBits == 4 ? (packed & 15) - zero0 : packed ^ 0x80);
      store(line + half_bytes, kBits == 4 ? high_nibbles(packed) - zero1 : load<u8x64>(codes + 64) ^ 0x80);
    }
  }
  return out;
}

// What the sums of one activation group of 16 rows become a part of the totals with.
struct GroupScales {
  const uint16_t *scales, *minimums;  // [32]
  const uint8_t* zeros;               // [32]
  const float* xs;                    // [16]
  const int32_t* negated_sums;        // [16]
};

// totals [16][2], one half of them += sums [16][16] * scales.
static inline __attribute__((always_inline)) void add_tile(const int32_t* sums, f32x16 scale, const float* xs,
                                                           f32x16* totals) {
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++)
    totals[2 * r] = fused(to_f32(load<i32x16>(sums + r * kLanes)), scale * xs[r], totals[2 * r]);
}

// The same for fewer rows, zero points that are not in the codes, or minimums.
template <int kBits, bool kMin>
static inline void add_rows(const int32_t* sums, const GroupScales& group, int half, int64_t rows, bool corrected,
                            f32x16* totals) {
  const f32x16 scale = f16_to_f32x16(group.scales + half * kLanes);
  i32x16 zero{};
  f32x16 minimum{};
  if (!corrected) zero = (kMin ? i32x16{} : u8_to_i32(group.zeros + half * kLanes)) - 128;
  if constexpr (kMin) minimum = f16_to_f32x16(group.minimums + half * kLanes);
  for (int64_t r = 0; r < rows; r++) {
    i32x16 sum = load<i32x16>(sums + r * kLanes);
    if (!corrected) sum += mul_small(zero, group.negated_sums[r]);
    f32x16 total = fused(to_f32(sum), scale * group.xs[r], totals[2 * r]);
    if constexpr (kMin) total = fused(minimum, float(-group.negated_sums[r]) * group.xs[r], total);
    totals[2 * r] = total;
  }
}

// Rows [row, row_end) by a tile of weights; calls finish(first row, rows, totals) for each 32 of them. row: the first of
// a block. `ahead` is fetched meanwhile.
template <int kBits, bool kMin, class Finish>
static void multiply_tiles(const Weights& w, const TiledWeights& tiled, const IntActs& x, int64_t tile, int64_t row,
                           int64_t row_end, Ahead ahead, Finish&& finish) {
  alignas(64) int32_t sums[2][4][kTileRows * kLanes];
  PairTotals totals{};
  const TileGroup shape(x.group);
  const int64_t groups = x.groups(), ratio = w.group / x.group, weight_groups = w.k / w.group, columns = shape.columns;
  const int64_t half_bytes = shape.row_bytes() * kLanes, block_bytes = groups * shape.row_bytes() * kTileRows;
  const int64_t pairs = (row_end - row + kPairRows - 1) / kPairRows, steps = pairs * groups;
  const int64_t share = (ahead.bytes / steps + 63) / 64 * 64;
  int64_t fetched = 0;
  const int8_t* const codes = x.codes + row / kTileRows * block_bytes;
  struct At {  // a step's pair of row blocks and its group
    int64_t pair = 0, group = 0;
    void advance(int64_t groups) {
      if (++group == groups) pair++, group = 0;
    }
  } next, done;
  const auto both = [&](int64_t pair) { return row + pair * kPairRows + kTileRows < row_end; };
  const auto scales_of = [&](int64_t block) {
    const int64_t group = (tile * weight_groups + done.group / ratio) * kTile;
    const int64_t at = (row / kTileRows + block) * groups * kTileRows + done.group * kTileRows;
    return GroupScales{w.scales + group, kMin ? w.minimums + group : nullptr, kMin ? nullptr : w.zeros + group,
                       x.scales + at, x.negated_sums + at};
  };
  // Of the group before last; the products of this one are running.
  const auto add = [&](int half, int block, const int32_t* from) {
    const int64_t first = row + done.pair * kPairRows + block * kTileRows, rows = row_end - first;
    if (rows <= 0) return;
    const GroupScales group = scales_of(2 * done.pair + block);
    f32x16* const to = totals.row(block * kTileRows) + half;
    if (!kMin && rows >= kTileRows && tiled.corrected)
      add_tile(from, f16_to_f32x16(group.scales + half * kLanes), group.xs, to);
    else
      add_rows<kBits, kMin>(from, group, half, std::min(rows, kTileRows), tiled.corrected, to);
  };
  bool was_both = false;
  for (int64_t step = 0; step < steps + 2; step++) {
    const bool begin = step < steps, keep = step > 0 && step <= steps, end = step > 1, two = begin && both(next.pair);
    const int8_t* a = codes + 2 * next.pair * block_bytes + next.group * shape.row_bytes() * kTileRows;
    const int8_t* b = tiled.codes + next.group * 2 * half_bytes;
    int32_t(*const to)[kTileRows * kLanes] = sums[step & 1];
    int32_t(*const from)[kTileRows * kLanes] = sums[~step & 1];
    if (begin) {
      tile_load<2>(b, 64), tile_load<3>(b + half_bytes, 64), tile_load<0>(a, columns);
      if (fetched < ahead.bytes) prefetch(ahead.next + fetched, share), fetched += share;
    }
    if (keep) tile_store<4>(to[0], 64);
    if (begin) tile_zero<4>(), dot_signed<4, 0, 2>();
    if (end) add(0, 0, from[0]);
    if (keep) tile_store<5>(to[1], 64);
    if (begin) tile_zero<5>(), dot_signed<5, 0, 3>();
    if (end) add(1, 0, from[1]);
    if (two) tile_load<1>(a + block_bytes, columns);
    if (keep && was_both) tile_store<6>(to[2], 64);
    if (two) tile_zero<6>(), dot_signed<6, 1, 2>();
    if (end) add(0, 1, from[2]);
    if (keep && was_both) tile_store<7>(to[3], 64);
    if (two) tile_zero<7>(), dot_signed<7, 1, 3>();
    if (end) add(1, 1, from[3]);
    if (begin && shape.parts == 2) {
      a += columns * kTileRows, b += columns * kLanes;
      tile_load<2>(b, 64), tile_load<3>(b + half_bytes, 64), tile_load<0>(a, columns);
      dot_signed<4, 0, 2>(), dot_signed<5, 0, 3>();
      if (two) tile_load<1>(a + block_bytes, columns), dot_signed<6, 1, 2>(), dot_signed<7, 1, 3>();
    }
    was_both = two;
    if (begin) next.advance(groups);
    if (!end) continue;
    if (done.group + 1 == groups) {
      const int64_t first = row + done.pair * kPairRows;
      finish(first, std::min(row_end - first, kPairRows), totals);
      totals = {};
    }
    done.advance(groups);
  }
}
#endif

}  // namespace llmctl
