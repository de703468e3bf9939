// Micro-kernels of the GEMMs y[m][n] = sum_k x[m][k] * w[n][k]: int8 activations with 4- or 8-bit weights, bf16, fp32,
// fp32 activations with weights of a code book.
//
// Weights are packed for the target when the engine is built (targets/cpu/layout.py), in tiles of 32 outputs:
//   w4     per 4 columns one 64-byte line; byte 4*lane+j holds column k+j of outputs `lane` (low nibble), 16+lane (high)
//   w8     per 4 columns two lines of whole bytes: outputs 0..15, then 16..31
//   bf16   per 2 columns two lines of 16 outputs x 2 columns
//   fp32   per column two lines of 16 outputs
//   e4m3   per column 32 bytes of 32 outputs
//   book4  per column 16 bytes: outputs 0..15 (low nibbles), then 16..31 (high)
// Codes of 2 and 3 bits are w4, of 5 and 6 bits w8, that lie by their bits (fields.h).
// w4 and w8 come with scales fp16 [tiles][groups][32] and zeros u8 [tiles][groups][32]: w = (code - zero) * scale; or,
// in place of the zeros, with minimums fp16 [tiles][groups][32]: w = code * scale + minimum. Where all codes have one zero
// it is stored once, 32 times over, and zero_step is 0. e4m3 and book4 come with scales fp32 [tiles][groups][32]:
// w = float8(code) * scale, w = book[code] * scale. Scales and minimums may be nested (nested.h), but for e4m3, of which
// either half of a tile may have one scale a group, [tiles][groups][2], spread out before it is read.
//
// Reduction order: integer dot products are exact; groups (or columns) are added in fp32 in ascending order. It depends
// neither on M, nor on the row's place in the batch, nor on the number of threads: a row's result is the same in any batch.
#pragma once
#include "acts.h"
#include "fields.h"
#include "nested.h"
#include "tables.h"

namespace llmctl {

constexpr int kTile = 32;

struct Weights {
  const uint8_t* data;
  const uint16_t* scales;
  const uint8_t* zeros;
  const uint16_t* minimums;
  const float *scales32, *book;
  int64_t n, k, group;  // n padded to kTile; k padded to the group (integer) or to 2 (bf16)
  int64_t zero_step;    // from the zeros of a group to those of the next: kTile, or 0
  NestedScales nested;
  MappedScales mapped;
  int64_t tile_step;    // from the scales of a tile to those of the next; 0: they are of the tile at hand alone
  int64_t code_bits;    // of codes that lie in fields; 0: they lie in lines
  int64_t code_step;    // from the codes of a tile to those of the next; 0: they are of the tile at hand alone
  const uint8_t* codes_of(int64_t tile) const { return data + tile * code_step; }
  const uint16_t* scales_of(int64_t tile) const { return scales + tile * tile_step; }
  const float* scales32_of(int64_t tile) const { return scales32 + tile * tile_step; }
  const uint16_t* minimums_of(int64_t tile) const { return minimums + tile * tile_step; }
  const uint8_t* zeros_of(int64_t tile) const { return zeros + tile * (k / group) * zero_step; }
};

// One tile made ready for many rows. Products of unsigned activations code + 128 with signed weights need no work on zero
// points in the loop over rows: they are off the weights, and the 128 are undone by the sums that the products start from.
struct ReadyTile {
  int8_t* codes;     // [K/4][2][64]: code - zero (w4), code - 128 (w8); outputs 0..15, then 16..31
  int32_t* offsets;  // [activation groups][32]: -128 * sum of the group's bytes
  static int64_t bytes(int64_t k, int64_t act_group) { return k * kTile + k / act_group * kTile * 4; }
};

template <int kBits, bool kMin>
static inline void make_ready(const Weights& w, int64_t tile, int64_t act_group, const ReadyTile& out) {
  const u8x64 one = u8x64{} + 1;
  const uint8_t *codes = w.codes_of(tile), *zeros = kMin ? nullptr : w.zeros_of(tile);
  int8_t* to = out.codes;
  int32_t* offsets = out.offsets;
  for (int64_t k = 0; k < w.k; offsets += kTile) {
    // A zero point in each byte of its output's lane.
    u8x64 zero0{}, zero1{};
    if constexpr (!kMin) {
      zero0 = (u8x64)(u8_to_i32(zeros + k / w.group * w.zero_step) * 0x01010101);
      zero1 = (u8x64)(u8_to_i32(zeros + k / w.group * w.zero_step + kLanes) * 0x01010101);
    }
    i32x16 sum0{}, sum1{};
    for (const int64_t end = k + act_group; k < end; k += 4, codes += kBits * 16, to += 128) {
      const u8x64 line = load<u8x64>(codes);
      const i8x64 first = (i8x64)(kBits == 4 ? (line & 15) - zero0 : line ^ 0x80);
      const i8x64 second = (i8x64)(kBits == 4 ? high_nibbles(line) - zero1 : load<u8x64>(codes + 64) ^ 0x80);
      sum0 = dot4<true>(sum0, one, first);
      sum1 = dot4<true>(sum1, one, second);
      store(to, first);
      store(to + 64, second);
    }
    store(offsets, sum0 * -128);
    store(offsets + kLanes, sum1 * -128);
  }
}

// Bytes to be fetched while something else is computed.
struct Ahead {
  const uint8_t* next;
  int64_t bytes;  // from `next` on
  // One of `parts` equal shares, rounded up to lines.
  void fetch(int64_t parts) {
    const int64_t share = (bytes / parts + 63) / 64 * 64;
    prefetch(next, share);
    next += share;
  }
  // The next few lines, to the second-level cache; false when all are fetched.
  bool fetch_some() {
    if (bytes <= 0) return false;
    for (int64_t i = 0; i < 512; i += 64) __builtin_prefetch(next + i, 0, 2);
    next += 512, bytes -= 512;
    return true;
  }
};

// Few rows: a tile to be read next is fetched from four places in turn. A core reads several sequential streams faster
// than one (measured, two cores: one stream 33 GB/s, four 48).
struct NextTile {
  const uint8_t* start;
  int64_t quarter;
  template <int kLine>
  void fetch(int64_t line) const {
    const uint8_t* p = start + line % 4 * quarter + line / 4 * kLine;
    __builtin_prefetch(p);
    if (kLine == 128) __builtin_prefetch(p + 64);
  }
};

// acc[r][half] += the products of four columns, codes of the outputs of either half. xp: four activations a row.
template <bool kSmall, bool kMany, int R>
static inline __attribute__((always_inline)) void add_halves(u8x64 first, u8x64 second, const int8_t* xp,
                                                             i32x16 (&acc)[R][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    if constexpr (kMany) {
      const u8x64 x = splat4<u8x64>(xp + 4 * r);
      acc[r][0] = dot4<kSmall>(acc[r][0], x, (i8x64)first);
      acc[r][1] = dot4<kSmall>(acc[r][1], x, (i8x64)second);
    } else {
      const i8x64 x = splat4<i8x64>(xp + 4 * r);
      acc[r][0] = dot4<kSmall>(acc[r][0], first, x);
      acc[r][1] = dot4<kSmall>(acc[r][1], second, x);
    }
  }
}

// The same of one line of w4 or two of w8; many rows: two lines of a ReadyTile.
template <int kBits, bool kMany, int R>
static inline __attribute__((always_inline)) void add_products(const uint8_t* codes, const int8_t* xp,
                                                               i32x16 (&acc)[R][2]) {
  const u8x64 first = load<u8x64>(codes);
  if (kBits == 4 && !kMany) return add_halves<true, kMany>(first & 15, high_nibbles(first), xp, acc);
  add_halves<kBits == 4, kMany>(first, load<u8x64>(codes + 64), xp, acc);
}

// What the sums of an activation group start from: what makes them sums of (code - zero) * x, or of code * x.
// offsets: of a ReadyTile's group, for many rows. kFields: see int_tile.
template <int kBits, int kFields, bool kMany, bool kMin, int R>
static inline __attribute__((always_inline)) void start_sums(const int32_t* offsets, const uint8_t* zeros,
                                                             const int32_t* negated_sums, i32x16 (&acc)[R][2]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    i32x16 zero{}, offset{};
    if (!kMin && (!kMany || kBits == 8))
      zero = u8_to_i32(zeros + half * kLanes) - (kMany ? 128 : kFields ? field_bias(kBits, kMin, kFields) : 0);
    if (kMin && kMany && kBits == 8) zero -= 128;
    if (kMany) offset = load<i32x16>(offsets + half * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      acc[r][half] = offset;
      if (kMin ? kMany && kBits == 8 : !kMany || kBits == 8) acc[r][half] += mul_small(zero, negated_sums[r]);
    }
  }
}

// total[r][half]: outputs 16*half .. 16*half+15 of the tile for the R rows of the block starting at `row`.
// With integer sums s = sum of (code - zero) * x over an activation group, exact in 32 bits,
// total = sum over groups of s * (weight scale * activation scale), and with minimums of minimum * sum of x.
// Meanwhile `ahead` is fetched: the tile to be read next; many rows: bytes of it, `ready` being the tile at hand.
// kFields: width of codes that are read by their bits (few rows), whole units an activation group; 0: of lines.
template <int kBits, int kFields, bool kMany, bool kMin, int R>
static inline __attribute__((always_inline)) void int_tile(const Weights& w, const ReadyTile& ready, const IntActs& x,
                                                           int64_t tile, int64_t row, Ahead ahead,
                                                           f32x16 (&total)[R][2]) {
  constexpr int kLine = kFields ? 64 : kMany ? 128 : kBits * 16;  // bytes of four columns; of a line of a unit
  constexpr int kChains = !kManyRegisters ? 1 : R == 1 ? 4 : R == 2 ? 2 : 1;  // sums in flight, to cover their latency
  const int64_t groups = w.k / w.group, ratio = w.group / x.group;  // activation groups never span weight groups
  const uint16_t* scales = w.scales_of(tile);
  const uint8_t* zeros = kMin ? nullptr : w.zeros_of(tile);
  const uint16_t* minimums = kMin ? w.minimums_of(tile) : nullptr;
  const uint8_t* codes = kMany ? (const uint8_t*)ready.codes : w.codes_of(tile);
  const int64_t lines = kFields ? w.k / kUnitColumns * kFields : w.k / 4;
  const NextTile next{ahead.next, (lines * kLine / 4 + kLine - 1) / kLine * kLine};
  int64_t line = 0;
  const int32_t* offsets = ready.offsets;
  const int8_t* xp = x.codes + row * x.k;
  const float* xs = x.scales + row * x.groups();
  const int32_t* sums = x.negated_sums + row * x.groups();
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) total[r][0] = total[r][1] = f32x16{};
  for (int64_t g = 0; g < groups; g++, scales += kTile) {
    if (kMany) ahead.fetch(groups);
    for (int64_t part = 0; part < ratio; part++, xs += R, sums += R) {
      i32x16 acc[kChains][R][2] = {};
      start_sums<kBits, kFields, kMany, kMin, R>(offsets, zeros, sums, acc[0]);
      if (kMany) offsets += kTile;
      const int8_t* end = xp + x.group * R;
      if constexpr (kFields) {
        for (; xp != end; xp += kUnitColumns * R, codes += 64 * kFields) {
          const Unit<kFields> unit(codes);
#pragma GCC unroll 6
          for (int i = 0; i < kFields; i++) next.fetch<kLine>(line++);
#pragma GCC unroll 4
          for (int c = 0; c < 4; c++)
            add_halves<true, false>(unit.codes(2 * c), unit.codes(2 * c + 1), xp + 4 * R * c, acc[c % kChains]);
        }
      }
      for (; xp + 4 * R * kChains <= end; xp += 4 * R * kChains) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; c++, codes += kLine) {
          if (!kMany) next.fetch<kLine>(line++);
          add_products<kBits, kMany, R>(codes, xp + 4 * R * c, acc[c]);
        }
      }
      for (; kChains > 1 && xp != end; xp += 4 * R, codes += kLine) add_products<kBits, kMany, R>(codes, xp, acc[0]);
#pragma GCC unroll 4
      for (int c = 1; c < kChains; c++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[0][r][0] += acc[c][r][0], acc[0][r][1] += acc[c][r][1];
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const f32x16 scale = f16_to_f32x16(scales + half * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) total[r][half] = fused(to_f32(acc[0][r][half]), scale * xs[r], total[r][half]);
        if constexpr (kMin) {
          const f32x16 minimum = f16_to_f32x16(minimums + half * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) total[r][half] = fused(minimum, float(-sums[r]) * xs[r], total[r][half]);
        }
      }
      // Eight rows' totals and sums would fill all 32 registers: totals stay in memory, or the compiler spills both.
      if (R == 8) asm volatile("" : : "r"(&total) : "memory");
    }
    if constexpr (kMin) minimums += kTile;
    else zeros += w.zero_step;
  }
}

// x: bf16 row-major, row stride ldx (a multiple of 2, zero-padded to w.k).
template <int R>
static inline __attribute__((always_inline)) void bf16_tile(const Weights& w, const uint16_t* x, int64_t ldx,
                                                            int64_t tile, int64_t row, f32x16 (&total)[R][2]) {
  const uint16_t* line = (const uint16_t*)w.data + tile * w.k * kTile;
  const uint16_t* xp = x + row * ldx;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) total[r][0] = total[r][1] = f32x16{};
  for (int64_t k = 0; k < w.k; k += 2, line += 64) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      total[r][0] = dot2_bf16(total[r][0], line, xp + r * ldx + k);
      total[r][1] = dot2_bf16(total[r][1], line + 32, xp + r * ldx + k);
    }
  }
}

// x: fp32 row-major, row stride ldx.
template <int R>
static inline __attribute__((always_inline)) void f32_tile(const Weights& w, const float* x, int64_t ldx, int64_t tile,
                                                           int64_t row, f32x16 (&total)[R][2]) {
  const float* line = (const float*)w.data + tile * w.k * kTile;
  const float* xp = x + row * ldx;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) total[r][0] = total[r][1] = f32x16{};
  for (int64_t k = 0; k < w.k; k++, line += 32) {
    const f32x16 first = load<f32x16>(line), second = load<f32x16>(line + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float value = xp[r * ldx + k];
      total[r][0] = fused(first, value, total[r][0]);
      total[r][1] = fused(second, value, total[r][1]);
    }
  }
}

// Weights decoded in registers; products are summed within a group, then scaled. Any group size: the last may be shorter.
template <int kBits, int R>
static inline __attribute__((always_inline)) void book_tile(const Weights& w, const float* x, int64_t ldx, int64_t tile,
                                                            int64_t row, f32x16 (&total)[R][2]) {
  constexpr int kLine = kTile * kBits / 8;
  const uint8_t* line = w.data + tile * w.k * kLine;
  const f32x16 book = kBits == 4 ? load<f32x16>(w.book) : f32x16{};
  const float* scales = w.scales32_of(tile);
  const float* xp = x + row * ldx;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) total[r][0] = total[r][1] = f32x16{};
  for (int64_t k = 0; k < w.k; scales += kTile) {
    f32x16 sum[R][2] = {};
    for (const int64_t end = k + w.group < w.k ? k + w.group : w.k; k < end; k++, line += kLine) {
      __builtin_prefetch(line + 1024);
      f32x16 first, second;
      if constexpr (kBits == 4) {
        const i32x16 codes = u8_to_i32(line);
        first = look_up(book, codes), second = look_up(book, codes >> 4);
      } else {
        first = e4m3_to_f32x16(line), second = e4m3_to_f32x16(line + kLanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const float value = xp[r * ldx + k];
        sum[r][0] = fused(first, value, sum[r][0]);
        sum[r][1] = fused(second, value, sum[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      total[r][0] = fused(sum[r][0], load<f32x16>(scales), total[r][0]);
      total[r][1] = fused(sum[r][1], load<f32x16>(scales + kLanes), total[r][1]);
    }
  }
}

// The first n weights of one output of a packed integer weight.
template <int kBits, bool kMin>
static inline void unpack_row(const Weights& w, int64_t row, int64_t n, float* y) {
  const int64_t tile = row / kTile, lane = row % kTile % kLanes, half = row % kTile / kLanes;
  const uint8_t* const codes = w.codes_of(tile);
  const uint8_t* const lines = codes + (kBits == 8 ? half * 64 : 0) + 4 * lane;
  for (int64_t k = 0; k < n; k++) {
    const int64_t group = k / w.group, at = group * kTile + row % kTile;
    const uint8_t* const zero = kMin ? nullptr : w.zeros_of(tile) + k / w.group * w.zero_step + row % kTile;
    int code;
    if (w.code_bits) {
      code = joined_code(int(w.code_bits), codes, k, row % kTile) + field_bias(kBits, kMin, w.code_bits);
    } else {
      const uint8_t byte = lines[k / 4 * kBits * 16 + k % 4];
      code = kBits == 8 ? byte : half ? byte >> 4 : byte & 15;
    }
    float scale, minimum = 0;
    if (w.nested.shared) {
      scale = w.nested.one<kMin, 0>(tile * (w.k / w.group) + group, row % kTile);
      if constexpr (kMin) minimum = w.nested.one<kMin, 1>(tile * (w.k / w.group) + group, row % kTile);
    } else {
      scale = f16_to_f32(w.scales_of(tile)[at]);
      if constexpr (kMin) minimum = f16_to_f32(w.minimums_of(tile)[at]);
    }
    y[k] = kMin ? fused(float(code), scale, minimum) : float(code - *zero) * scale;
  }
}

}  // namespace llmctl
