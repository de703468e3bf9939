// Int8 activations: one scale per row and group, rows interleaved for the micro-kernels of gemm.h.
//
// M rows are cut into blocks of 8, then 4, 2, 1. A block of R rows holds, per 4 columns, R consecutive runs of 4 codes
// ([K/4][R][4]), so that a micro-kernel reads one pointer; scales and sums are [groups][R].
// A block starts where a row-major matrix would have its first row, whatever R.
//
// Few rows: codes are signed, the unsigned operand of the dot product is the weight. Many rows: every code is stored as
// code + 128, unsigned, so that the weights can have their zero points taken off beforehand (gemm.h).
#pragma once
#include "simd.h"

namespace llmctl {

struct IntActs {
  int8_t* codes;          // [M * k], or as many unsigned bytes
  float* scales;          // [M * groups]
  int32_t* negated_sums;  // [M * groups], minus the sum of the group's codes: meets the weights' zero points
  int64_t k, group;       // group: a multiple of 4, at most 128 (so that sums fit 16 bits)
  int64_t groups() const { return k / group; }
};

// Rows from which codes are stored as code + 128.
constexpr int64_t kManyRows = 16;

static inline uint8_t flip_of(int64_t rows) { return rows >= kManyRows ? 0x80 : 0; }

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
  uint8_t flip;  // of every code: its top bit, which adds 128, or nothing
};

static inline ActRow act_row_of(const IntActs& out, int64_t row, int64_t rows) {
  const int64_t start = block_start(row, rows), lane = row - start, groups = out.groups();
  return {out.codes + start * out.k + lane * 4, out.scales + start * groups + lane,
          out.negated_sums + start * groups + lane, block_rows(start, rows), flip_of(rows)};
}

// Quantises columns begin .. begin+group-1 of a row, x being the first of them: scale = max|x| / 127, round to nearest even.
static inline void quantize_group(const float* x, int64_t group, int64_t begin, const ActRow& row) {
  const int64_t vectors = group / 16 * 16;
  const float largest = max_abs(x, group);
  const float inverse = inverse_scale(largest, 127.0f);
  int8_t* codes = row.codes + begin * row.in_block;
  i32x16 total{};
  for (int64_t i = 0; i < vectors; i += 16) {
    const i32x16 code = round_to_i32(load<f32x16>(x + i) * inverse);
    total += code;
    const i8x16 bytes = i32_to_i8(code) ^ int8_t(row.flip);
    int8_t* to = codes + i * row.in_block;
    for (int j = 0; j < 4; j++) std::memcpy(to + j * row.in_block * 4, (const char*)&bytes + 4 * j, 4);
  }
  int32_t sum = reduce_add(total);
  for (int64_t i = vectors; i < group; i++) {
    const int32_t code = int32_t(std::nearbyint(x[i] * inverse));
    codes[i / 4 * row.in_block * 4 + i % 4] = int8_t(uint8_t(code) ^ row.flip);
    sum += code;
  }
  const int64_t at = begin / group * row.in_block;
  row.scales[at] = largest / 127.0f;
  row.negated_sums[at] = -sum;
}

#if defined(LLMCTL_AVX512)
// quantize_group() for the eight rows of a block, x [8][ld]; the group a multiple of 16. To the same bits for finite
// values; codes are interleaved in registers (measured, norms of a prefill of 512: 4.9 ms for 6.2).
static inline void quantize_block(const float* x, int64_t ld, int64_t begin, const IntActs& out, int64_t start,
                                  uint8_t flip) {
  const int64_t at = start * out.groups() + begin / out.group * 8;
  float inverse[8];
  for (int r = 0; r < 8; r++) {
    const float largest = max_abs(x + r * ld, out.group);
    out.scales[at + r] = largest / 127.0f;
    inverse[r] = inverse_scale(largest, 127.0f);
  }
  const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), odd = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const u8x64 one = u8x64{} + 1;
  i32x16 sums[2] = {};  // lane 4 * c + r: row r's sum over columns 4 * c .. 4 * c + 3 of every sixteen
  int8_t* codes = out.codes + start * out.k + begin * 8;
  for (int64_t i = 0; i < out.group; i += 16, codes += 128) {
    i8x64 four[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      i32x16 code[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++)
        code[r] = round_to_i32(load<f32x16>(x + (4 * half + r) * ld + i) * inverse[4 * half + r]);
      four[half] = interleave_rows(code);
      sums[half] = dot4<true>(sums[half], one, four[half]);
      four[half] ^= int8_t(flip);
    }
    store(codes, _mm512_permutex2var_epi64((__m512i)four[0], even, (__m512i)four[1]));
    store(codes + 64, _mm512_permutex2var_epi64((__m512i)four[0], odd, (__m512i)four[1]));
  }
  for (int r = 0; r < 8; r++) {
    const i32x16& sum = sums[r / 4];
    out.negated_sums[at + r] = -(sum[r % 4] + sum[4 + r % 4] + sum[8 + r % 4] + sum[12 + r % 4]);
  }
}
#endif

// Rows [first, last) of `rows`; first is where a block starts.
struct RowRange {
  int64_t first, last, rows;
};

// Quantises a group of columns, those from `begin` on, of a range of rows; x [last - first][ld] holds just them.
static inline void quantize_columns(const float* x, int64_t ld, int64_t begin, const IntActs& out, const RowRange& range) {
  for (int64_t row = range.first; row < range.last; x += ld, row++) {
#if defined(LLMCTL_AVX512)
    for (; out.group % 16 == 0 && row < range.last && block_rows(row, range.rows) == 8; x += 8 * ld, row += 8)
      quantize_block(x, ld, begin, out, row, flip_of(range.rows));
    if (row >= range.last) return;
#endif
    quantize_group(x, out.group, begin, act_row_of(out, row, range.rows));
  }
}

}  // namespace llmctl
