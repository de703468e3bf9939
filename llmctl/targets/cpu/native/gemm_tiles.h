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
static inline void configure_for(int64_t act_group) {
  const int64_t columns = TileGroup(act_group).columns;
  TileShapes shapes;
  for (int t = 0; t < 2; t++) shapes.set(t, kTileRows, columns);
  for (int t = 2; t < 4; t++) shapes.set(t, columns / 4, kTileBytes);
  for (int t = 4; t < 8; t++) shapes.set(t, kTileRows, kTileBytes);
  configure_tiles(shapes);
}

// Unpacks a tile of weights, one activation group after the other, as the second operand of tile products:
// [half][parts][columns / 4][64] of code - zero (w4) or code - 128 (w8).
template <int kBits, bool kMin>
struct Unpacker {
  const uint8_t *codes, *zeros;
  int64_t act_group, half_bytes, ratio, zero_step, part = 0;

  Unpacker(const Weights& w, int64_t tile, int64_t act_group)
      : codes(w.codes_of(tile)),
        zeros(kMin ? nullptr : w.zeros_of(tile)),
        act_group(act_group),
        half_bytes(TileGroup(act_group).row_bytes() * kLanes),
        ratio(w.group / act_group),
        zero_step(w.zero_step) {}

  void next(int8_t* to) {
    u8x64 zero0{}, zero1{};
    if constexpr (kBits == 4 && !kMin) {
      zero0 = (u8x64)(u8_to_i32(zeros) * 0x01010101);
      zero1 = (u8x64)(u8_to_i32(zeros + kLanes) * 0x01010101);
      if (++part == ratio) part = 0, zeros += zero_step;
    }
    for (int64_t k = 0; k < act_group; k += 4, codes += kBits * 16, to += 64) {
      const u8x64 packed = load<u8x64>(codes);
      store(to, kBits == 4 ? (packed & 15) - zero0 : packed ^ 0x80);
      store(to + half_bytes, kBits == 4 ? high_nibbles(packed) - zero1 : load<u8x64>(codes + 64) ^ 0x80);
    }
  }
};

// Whether the unpacked codes need no zero points beside them.
template <int kBits, bool kMin>
static inline bool zeros_in_codes(const Weights& w, int64_t tile) {
  if (kBits == 4) return true;
  if (kMin) return false;
  const int64_t count = w.zero_step ? w.k / w.group * kTile : kTile;
  const uint8_t* zeros = w.zeros_of(tile);
  bool all = true;
  for (int64_t i = 0; i < count; i++) all &= zeros[i] == 128;
  return all;
}

// What the sums of one activation group of a block of 16 rows become a part of the totals with.
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
  for (int r = 0; r < kTileRows; r++)
    totals[2 * r] = fused(to_f32(load<i32x16>(sums + r * kLanes)), scale * xs[r], totals[2 * r]);
}

// The same for fewer rows, zero points that are not in the codes, or minimums.
template <int kBits, bool kMin>
static __attribute__((noinline)) void add_rows(const int32_t* sums, const GroupScales& group, int half, int64_t rows,
                                               bool corrected, f32x16* totals) {
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

// Bytes of unpacked weights that multiply_tiles() takes: of all groups, or of two in turn where they serve one pair.
static inline int64_t unpacked_bytes(const IntActs& x, int64_t rows) {
  return (rows > kPairRows ? x.groups() : 2) * TileGroup(x.group).row_bytes() * kTile;
}

// Rows [row, row_end) by a tile of weights; calls finish(first row, rows, totals) for each 32 of them. row: the first of
// a block. `ahead` is fetched meanwhile. room: unpacked_bytes().
template <int kBits, bool kMin, class Finish>
static void multiply_tiles(const Weights& w, const IntActs& x, int64_t tile, int64_t row, int64_t row_end,
                           const Ahead& ahead, int8_t* room, Finish&& finish) {
  Unpacker<kBits, kMin> unpack(w, tile, x.group);
  const bool corrected = zeros_in_codes<kBits, kMin>(w, tile), in_turn = row_end - row <= kPairRows;
  alignas(64) int32_t sums[2][4][kTileRows * kLanes];
  PairTotals totals{};
  const TileGroup shape(x.group);
  const int64_t groups = x.groups(), ratio = w.group / x.group, columns = shape.columns;
  const int64_t half_bytes = shape.row_bytes() * kLanes, group_bytes = shape.row_bytes() * kTileRows;
  const int64_t block_bytes = groups * group_bytes, block_scales = groups * kTileRows;
  const int64_t steps = (row_end - row + kPairRows - 1) / kPairRows * groups;
  const int64_t share = (ahead.bytes / steps + 63) / 64 * 64;
  int64_t fetched = 0;
  // What begins: a group of up to two blocks of rows.
  const int8_t *a = x.codes + row / kTileRows * block_bytes, *b = room;
  int64_t begun_row = row, begun_group = 0;
  bool two = row + kTileRows < row_end, was_two = false;
  // What ends, two steps later.
  GroupScales of{w.scales_of(tile), kMin ? w.minimums_of(tile) : nullptr,
                 kMin ? nullptr : w.zeros_of(tile), x.scales + row / kTileRows * block_scales,
                 x.negated_sums + row / kTileRows * block_scales};
  const GroupScales first = of;
  int64_t ended_row = row, ended_group = 0, part = 0;
  bool whole = !kMin && corrected && row_end - row >= kPairRows;
  const auto add = [&](int half, int block, const int32_t* from, f32x16 scale) {
    f32x16* const to = totals.row(block * kTileRows) + half;
    if (whole) return add_tile(from, scale, of.xs + block * block_scales, to);
    const int64_t rows = std::min(row_end - ended_row - block * kTileRows, kTileRows);
    if (!kMin && corrected && rows == kTileRows) return add_tile(from, scale, of.xs + block * block_scales, to);
    GroupScales own = of;
    own.xs += block * block_scales, own.negated_sums += block * block_scales;
    if (rows > 0) add_rows<kBits, kMin>(from, own, half, rows, corrected, to);
  };
  for (int64_t g = 0; g < (in_turn ? 1 : groups); g++) unpack.next(room + g * 2 * half_bytes);
  for (int64_t step = 0; step < steps + 2; step++) {
    const bool begin = step < steps, keep = step > 0 && step <= steps, end = step > 1;
    int32_t(*const to)[kTileRows * kLanes] = sums[step & 1];
    int32_t(*const from)[kTileRows * kLanes] = sums[~step & 1];
    f32x16 scale0{}, scale1{};
    if (end) scale0 = f16_to_f32x16(of.scales), scale1 = f16_to_f32x16(of.scales + kLanes);
    if (begin) {
      tile_load<2>(b, 64), tile_load<3>(b + half_bytes, 64), tile_load<0>(a, columns);
      if (fetched < ahead.bytes) prefetch(ahead.next + fetched, share), fetched += share;
    }
    if (keep) tile_store<4>(to[0], 64);
    if (begin) tile_zero<4>(), dot_signed<4, 0, 2>();
    if (end) add(0, 0, from[0], scale0);
    if (keep) tile_store<5>(to[1], 64);
    if (begin) tile_zero<5>(), dot_signed<5, 0, 3>();
    if (begin && two) tile_load<1>(a + block_bytes, columns);
    if (end) add(1, 0, from[1], scale1);
    if (keep && was_two) tile_store<6>(to[2], 64);
    if (begin && two) tile_zero<6>(), dot_signed<6, 1, 2>();
    if (end) add(0, 1, from[2], scale0);
    if (keep && was_two) tile_store<7>(to[3], 64);
    if (begin && two) tile_zero<7>(), dot_signed<7, 1, 3>();
    if (end) add(1, 1, from[3], scale1);
    was_two = two;
    if (begin && shape.parts == 2) {
      const int8_t *a2 = a + columns * kTileRows, *b2 = b + columns * kLanes;
      tile_load<2>(b2, 64), tile_load<3>(b2 + half_bytes, 64), tile_load<0>(a2, columns);
      dot_signed<4, 0, 2>(), dot_signed<5, 0, 3>();
      if (two) tile_load<1>(a2 + block_bytes, columns), dot_signed<6, 1, 2>(), dot_signed<7, 1, 3>();
    }
    a += group_bytes, b += 2 * half_bytes;
    if (in_turn) {
      b = room + ((step + 1) & 1) * 2 * half_bytes;
      if (step + 1 < steps) unpack.next(room + ((step + 1) & 1) * 2 * half_bytes);
    }
    if (++begun_group == groups) {  // on to the next pair of blocks
      begun_group = 0, begun_row += kPairRows, two = begun_row + kTileRows < row_end;
      a += block_bytes, b = room;
    }
    if (!end) continue;
    of.xs += kTileRows, of.negated_sums += kTileRows;
    if (++part == ratio) {
      part = 0, of.scales += kTile;
      if (kMin) of.minimums += kTile;
      else of.zeros += w.zero_step;
    }
    if (++ended_group < groups) continue;
    finish(ended_row, std::min(row_end - ended_row, kPairRows), totals);
    totals = {};
    ended_group = 0, ended_row += kPairRows, whole = whole && row_end - ended_row >= kPairRows;
    of.scales = first.scales, of.minimums = first.minimums, of.zeros = first.zeros;
    of.xs += block_scales, of.negated_sums += block_scales;
  }
}
#endif

}  // namespace llmctl
