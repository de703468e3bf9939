// Int8 activations: one scale per row and group, rows interleaved for the micro-kernels of gemm.h.
//
// M rows are cut into blocks of 8, then 4, 2, 1. A block of R rows holds, per 4 columns, R consecutive runs of 4 codes
// ([K/4][R][4]), so that a micro-kernel reads one pointer; scales and sums are [groups][R].
// A block starts where a row-major matrix would have its first row, whatever R.
#pragma once
#include "simd.h"

namespace llmctl {

struct IntActs {
  int8_t* codes;          // [M * k]
  float* scales;          // [M * groups]
  int32_t* negated_sums;  // [M * groups], minus the sum of the group's codes: meets the weights' zero points
  int64_t k, group;       // group: a multiple of 4, at most 128 (so that sums fit 16 bits)
  int64_t groups() const { return k / group; }
};

// Rows of the block that starts at `row` of `rows`.
static inline int block_rows(int64_t row, int64_t rows) {
  const int64_t left = rows - row;
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}
// First row of the block that holds `row`.
static inline int64_t block_start(int64_t row, int64_t rows) {
  const int64_t full = rows & ~int64_t(7);
  if (row < full) return row & ~int64_t(7);
  int64_t start = full;
  while (start + block_rows(start, rows) <= row) start += block_rows(start, rows);
  return start;
}

// Where one row's groups go: `in_block` rows are interleaved.
struct ActRow {
  int8_t* codes;
  float* scales;
  int32_t* negated_sums;
  int64_t in_block;
};

static inline ActRow act_row_at(const IntActs& out, int64_t start, int64_t in_block, int64_t lane) {
  const int64_t groups = out.groups();
  return {out.codes + start * out.k + lane * 4, out.scales + start * groups + lane,
          out.negated_sums + start * groups + lane, in_block};
}
static inline ActRow act_row_of(const IntActs& out, int64_t row, int64_t rows) {
  const int64_t start = block_start(row, rows);
  return act_row_at(out, start, block_rows(start, rows), row - start);
}

// Quantises columns begin .. begin+group-1 of a row, x being the first of them; those from `valid` on are zero.
// scale = max|x| / 127, round to nearest even.
static inline void quantize_group(const float* x, int64_t valid, int64_t group, int64_t begin, const ActRow& row) {
  const int64_t vectors = valid >= group ? group / 16 * 16 : 0, end = valid < group ? valid : group;
  const float largest = max_abs(x, end);
  const float inverse = inverse_scale(largest, 127.0f);
  int8_t* codes = row.codes + begin * row.in_block;
  i32x16 total{};
  for (int64_t i = 0; i < vectors; i += 16) {
    const i32x16 code = round_to_i32(load<f32x16>(x + i) * inverse);
    total += code;
    const i8x16 bytes = i32_to_i8(code);
    int8_t* to = codes + i * row.in_block;
    for (int j = 0; j < 4; j++) std::memcpy(to + j * row.in_block * 4, (const char*)&bytes + 4 * j, 4);
  }
  int32_t sum = reduce_add(total);
  for (int64_t i = vectors; i < group; i++) {
    const int32_t code = i < valid ? int32_t(std::nearbyint(x[i] * inverse)) : 0;
    codes[i / 4 * row.in_block * 4 + i % 4] = int8_t(code);
    sum += code;
  }
  const int64_t at = begin / group * row.in_block;
  row.scales[at] = largest / 127.0f;
  row.negated_sums[at] = -sum;
}

// Quantises x [width] as row `row` of `rows`; columns from width to k are zero.
static inline void quantize_row(const float* x, int64_t width, const IntActs& out, int64_t row, int64_t rows) {
  const ActRow to = act_row_of(out, row, rows);
  for (int64_t g = 0; g < out.k; g += out.group) quantize_group(x + g, width - g, out.group, g, to);
}

}  // namespace llmctl
