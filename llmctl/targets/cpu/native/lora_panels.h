// Products of a panel of an adapter's matrix, 16 of its outputs, and up to kLoraRows rows: floats, or codes by codes.
#pragma once
#include <type_traits>

#include "acts.h"
#include "lora_rows.h"
#include "program.h"
#include "simd.h"

namespace llmctl {

// Columns of an output that lie together.
template <class T>
constexpr int kLineStep = sizeof(T) == 2 ? 2 : 1;

// A line of a panel: its 16 outputs' columns, each as fp32.
static inline __attribute__((always_inline)) void widen(const uint16_t* line, f32x16 (&columns)[2]) {
  const u32x16 both = load<u32x16>(line);
  columns[0] = (f32x16)(both << 16), columns[1] = (f32x16)(both & 0xffff0000u);
}
static inline __attribute__((always_inline)) void widen(const float* line, f32x16 (&columns)[2]) {
  columns[0] = load<f32x16>(line), columns[1] = load<f32x16>(line + kLanes);
}

// The last column of an odd number; in bf16 a column of zeros lies beside it.
static inline f32x16 last_column(const uint16_t* line) { return (f32x16)(load<u32x16>(line) << 16); }
static inline f32x16 last_column(const float* line) { return load<f32x16>(line); }

// total[r] = the panel [len][16] by x[r] [len]: even columns, then odd ones; where kAhead, `ahead` is fetched meanwhile, as
// many bytes as are read.
template <class T, int R, bool kAhead>
static inline __attribute__((always_inline)) void panel_rows(const T* panel, int64_t len, const float* const* x,
                                                             const T* ahead, f32x16 (&total)[R]) {
  f32x16 even[R], odd[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) even[r] = odd[r] = f32x16{};
  int64_t k = 0;
  for (; k + 2 <= len; k += 2, panel += 2 * kLanes) {
    f32x16 columns[2];
    widen(panel, columns);
    if (kAhead) {
      __builtin_prefetch(ahead + k * kLanes);
      if (sizeof(T) == 4) __builtin_prefetch(ahead + (k + 1) * kLanes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      even[r] = fused(columns[0], x[r][k], even[r]);
      odd[r] = fused(columns[1], x[r][k + 1], odd[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    if (k < len) even[r] = fused(last_column(panel), x[r][k], even[r]);
    total[r] = even[r] + odd[r];
  }
}

// Calls f with the number of rows of a tile as a constant: loops over them are unrolled, and their sums stay in registers.
template <class F>
static inline __attribute__((always_inline)) void with_count(int count, F&& f) {
  static_assert(kLoraRows == 4, "");
  switch (count) {
    case 4: return f(std::integral_constant<int, 4>());
    case 3: return f(std::integral_constant<int, 3>());
    case 2: return f(std::integral_constant<int, 2>());
    default: return f(std::integral_constant<int, 1>());
  }
}

static inline bool of_codes(const OpDesc& op) { return op.lora_dtype == kW8; }

// sum[r] += `lines` lines of a panel, four columns each, by x[r], whose columns lie step[r] bytes apart from four to four;
// `ahead` is fetched meanwhile. kFlip: x holds codes + 128, too.
template <bool kFlip, int R>
static inline __attribute__((always_inline)) void add_lines(const uint8_t*& panel, const uint8_t*& ahead, int64_t lines,
                                                            const int8_t* (&x)[R], const int64_t (&step)[R],
                                                            i32x16 (&sum)[R]) {
  const auto add_one = [&](int64_t i) __attribute__((always_inline)) {
    const u8x64 line = load<u8x64>(panel + i * 64);
    __builtin_prefetch(ahead + i * 64);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      i8x64 four = splat4<i8x64>(x[r] + i * step[r]);
      if constexpr (kFlip) four ^= int8_t(0x80);
      sum[r] = dot4<false>(sum[r], line, four);
    }
  };
  const auto pass = [&](int64_t i) __attribute__((always_inline)) {
    panel += i * 64, ahead += i * 64;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) x[r] += i * step[r];
  };
  for (; lines >= 4; lines -= 4) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; i++) add_one(i);
    pass(4);
  }
  for (; lines > 0; lines--) add_one(0), pass(1);
}

// total[r] = the panel [len / 4][16][4] of codes + 128 by activation groups [group, group_end) of x[r]; `ahead` is fetched
// meanwhile. kFlip: x holds codes + 128, too. kTiled: it lies in tiles.
template <bool kFlip, bool kTiled, int R>
static inline __attribute__((always_inline)) void panel_groups(const uint8_t* panel, const IntActs& acts, int64_t group,
                                                               int64_t group_end, const ActRow* x, const uint8_t* ahead,
                                                               f32x16 (&total)[R]) {
  const TileGroup tile(acts.group);
  const int64_t parts = kTiled ? tile.parts : 1, columns = kTiled ? tile.columns : acts.group;
  const int64_t row_bytes = kTiled ? tile.row_bytes() : acts.group;
  int64_t step[R], in_block[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    total[r] = f32x16{};
    in_block[r] = kTiled ? kTileRows : x[r].in_block, step[r] = kTiled ? 4 : 4 * in_block[r];
  }
  for (int64_t g = group; g < group_end; g++) {
    i32x16 sum[R];
    const int8_t* codes[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      codes[r] = x[r].codes + g * row_bytes * in_block[r];
      sum[r] = 128 * x[r].negated_sums[g * in_block[r]] - i32x16{};
    }
    for (int64_t part = 0; part < parts; part++) {
      add_lines<kFlip, R>(panel, ahead, std::min(columns, acts.group - part * columns) / 4, codes, step, sum);
      // The next part is a tile of 16 rows further on.
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) codes[r] += kTiled ? columns * (kTileRows - 1) : 0;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) total[r] = fused(to_f32(sum[r]), x[r].scales[g * in_block[r]], total[r]);
  }
}

}  // namespace llmctl
