// Int8 activations: one scale per row and group, rows interleaved for the micro-kernels of gemm_int.h.
//
// M rows are cut into blocks of 8, then 4, 2, 1. A block of R rows holds, per 4 columns, R consecutive runs of 4 codes
// ([K/4][R][4]), so that a micro-kernel reads one pointer; scales and scaled sums are [groups][R].
// A block starts where a row-major matrix would have its first row, whatever R.
#pragma once
#include "simd.h"

namespace llmctl {

struct IntActs {
  int8_t* codes;       // [M * k]
  float* scales;       // [M * groups]
  float* scaled_sums;  // [M * groups], scale * sum of the group's codes
  int64_t k, group;
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

// Quantises x [width] as row `row` of `rows`; columns from width to k are zero. scale = max|x| / 127, round to nearest.
static inline void quantize_row(const float* x, int64_t width, const IntActs& out, int64_t row, int64_t rows) {
  const int64_t start = block_start(row, rows), lane = row - start;
  const int64_t in_block = block_rows(start, rows), groups = out.groups();
  int8_t* codes = out.codes + start * out.k + lane * 4;
  float* scales = out.scales + start * groups + lane;
  float* sums = out.scaled_sums + start * groups + lane;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t begin = g * out.group, end = begin + out.group;
    float largest = 0;
    int64_t i = begin;
    if (end <= width) {
      f32x16 top{};
      for (; i + 16 <= end; i += 16) {
        const f32x16 v = load<f32x16>(x + i);
        top = vmax(top, vmax(v, -v));
      }
      largest = reduce_max(top);
    }
    for (; i < end && i < width; i++) largest = std::fmax(largest, std::fabs(x[i]));
    const float scale = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    i = begin;
    if (end <= width) {
      i32x16 total{};
      for (; i + 16 <= end; i += 16) {
        // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low mantissa bits.
        const f32x16 shifted = load<f32x16>(x + i) * inverse + 12582912.0f;
        const i32x16 code = load<i32x16>(&shifted) - 0x4b400000;
        total += code;
        typedef int8_t i8x16 __attribute__((vector_size(16)));
        const i8x16 bytes = __builtin_convertvector(code, i8x16);
        for (int j = 0; j < 4; j++) std::memcpy(codes + (i / 4 + j) * in_block * 4, (const char*)&bytes + 4 * j, 4);
      }
      for (int j = 0; j < 16; j++) sum += total[j];
    }
    for (; i < end; i++) {
      const int32_t code = i < width ? int32_t(std::nearbyint(x[i] * inverse)) : 0;
      codes[(i / 4) * in_block * 4 + i % 4] = int8_t(code);
      sum += code;
    }
    scales[g * in_block] = scale;
    sums[g * in_block] = scale * float(sum);
  }
}

}  // namespace llmctl
