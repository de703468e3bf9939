// Int8 activations: one scale per row and group, rows interleaved for the micro-kernels of gemm.h.
//
// M rows are cut into blocks of 8, then 4, 2, 1. A block of R rows holds, per 4 columns, R consecutive runs of 4 codes
// ([K/4][R][4]), so that a micro-kernel reads one pointer; scales and sums are [groups][R].
// A block starts where a row-major matrix would have its first row, whatever R.
//
// Few rows: codes are signed, the unsigned operand of the dot product is the weight. Many rows: every code is stored as
// code + 128, unsigned, so that the weights can have their zero points taken off beforehand (gemm.h). Many rows and tile
// registers: blocks are of 16 rows, the last one too, and hold signed codes as tiles, see TileGroup.
#pragma once
#include "amx.h"

namespace llmctl {

struct IntActs {
  int8_t* codes;          // [M * k], or as many unsigned bytes
  float* scales;          // [M * groups]
  int32_t* negated_sums;  // [M * groups], minus the sum of the group's codes: meets the weights' zero points
  int64_t k, group;       // group: a multiple of 4, at most 128 (so that sums fit 16 bits)
  int32_t wide;           // whether all weights that meet it are of 8 bits
  int32_t grouped;        // rows of experts, each expert's a matrix of its own
  int64_t groups() const { return k / group; }
};

// How the codes of a step lie.
enum class Layout { kSigned, kUnsigned, kTiled };

// Rows from which codes are no longer signed and interleaved, by what the kernels take then (measured on two cores of a
// Xeon with AMX, shapes of a 135M model). Tiles: 11 rows take 1.1 to 1.4 times as long without, 8 rows 0.7 to 0.8 times;
// of 8-bit weights, which are unpacked to twice the bytes, 24 rows 0.9 times, 32 rows 1.1 times. Unsigned codes: of 8-bit
// weights 16 rows take 1.2 times as long as two passes over 8, 32 rows 1.05 times.
constexpr int64_t kTiledRows = 11, kTiledRowsOfWide = 32;
constexpr int64_t kUnsignedRows = 16, kUnsignedRowsOfWide = 48;

static inline Layout layout_of(const IntActs& acts, int64_t rows) {
  // The last tile of an expert's rows would reach into the next one's.
  const bool tiled = have_tiles() && !acts.grouped;
  const int64_t narrow = tiled ? kTiledRows : kUnsignedRows, wide = tiled ? kTiledRowsOfWide : kUnsignedRowsOfWide;
  return rows < (acts.wide ? wide : narrow) ? Layout::kSigned : tiled ? Layout::kTiled : Layout::kUnsigned;
}
static inline uint8_t flip_of(Layout layout) { return layout == Layout::kUnsigned ? 0x80 : 0; }

// An activation group of 16 rows as tiles [parts][16][columns]: one, or two of equal width, which may have columns of
// padding behind the group's own, with codes of 0.
struct TileGroup {
  int64_t parts, columns;
  explicit TileGroup(int64_t group)
      : parts(group <= kTileBytes ? 1 : 2), columns(group <= kTileBytes ? group : (group + 7) / 8 * 4) {}
  int64_t row_bytes() const { return parts * columns; }
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

// Where one row's groups go: `in_block` rows are interleaved, or lie in tiles.
struct ActRow {
  int8_t* codes;
  float* scales;
  int32_t* negated_sums;
  int64_t in_block;
  uint8_t flip;  // of every code: its top bit, which adds 128, or nothing
  bool tiled;
};

static inline ActRow act_row_of(const IntActs& out, int64_t row, int64_t rows) {
  const int64_t groups = out.groups();
  const Layout layout = layout_of(out, rows);
  if (layout == Layout::kTiled) {
    const TileGroup tile(out.group);
    const int64_t start = row / kTileRows * kTileRows, lane = row - start;
    return {out.codes + start * groups * tile.row_bytes() + lane * tile.columns, out.scales + start * groups + lane,
            out.negated_sums + start * groups + lane, kTileRows, 0, true};
  }
  const int64_t start = block_start(row, rows), lane = row - start;
  return {out.codes + start * out.k + lane * 4, out.scales + start * groups + lane,
          out.negated_sums + start * groups + lane, block_rows(start, rows), flip_of(layout), false};
}

// Where column i of a row's group goes; to: its first column.
static inline int8_t* place(int8_t* to, int64_t i, const ActRow& row, const TileGroup& tile) {
  if (row.tiled) return to + i + (i < tile.columns ? 0 : tile.columns * (kTileRows - 1));
  return to + i / 4 * 4 * row.in_block + i % 4;
}

// Quantises columns begin .. begin+group-1 of a row, x being the first of them: scale = max|x| / 127, round to nearest even.
static inline void quantize_group(const float* x, int64_t group, int64_t begin, const ActRow& row) {
  const TileGroup tile(group);
  const int64_t vectors = group / 16 * 16;
  const float largest = max_abs(x, group);
  const float inverse = inverse_scale(largest, 127.0f);
  int8_t* const codes = row.codes + (row.tiled ? begin / group * tile.row_bytes() : begin) * row.in_block;
  const bool whole = row.tiled && tile.columns % 16 == 0;
  i32x16 total{};
  for (int64_t i = 0; i < vectors; i += 16) {
    const i32x16 code = round_to_i32(load<f32x16>(x + i) * inverse);
    total += code;
    const i8x16 bytes = i32_to_i8(code) ^ int8_t(row.flip);
    if (whole) {
      store(place(codes, i, row, tile), bytes);
      continue;
    }
    for (int j = 0; j < 4; j++) std::memcpy(place(codes, i + 4 * j, row, tile), (const char*)&bytes + 4 * j, 4);
  }
  int32_t sum = reduce_add(total);
  for (int64_t i = vectors; i < group; i++) {
    const int32_t code = int32_t(std::nearbyint(x[i] * inverse));
    *place(codes, i, row, tile) = int8_t(uint8_t(code) ^ row.flip);
    sum += code;
  }
  for (int64_t i = group; row.tiled && i < tile.row_bytes(); i++) *place(codes, i, row, tile) = 0;
  const int64_t at = begin / group * row.in_block;
  row.scales[at] = largest / 127.0f;
  row.negated_sums[at] = -sum;
}

#if defined(LLMCTL_AVX512)
// Scales and inverse scales of eight rows' groups, x [8][ld]; lanes 0 .. 7.
struct EightScales {
  f32x16 scale, inverse;
  EightScales(const float* x, int64_t ld, int64_t group) {
    f32x16 top[8] = {};
    for (int64_t i = 0; i < group; i += 16)
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++) {
        const f32x16 v = load<f32x16>(x + r * ld + i);
        top[r] = vmax(top[r], vmax(v, -v));
      }
    const f32x16 largest = reduce_eight(top, [](f32x16 a, f32x16 b) { return vmax(a, b); });
    scale = largest / 127.0f;
    inverse = largest > 1e-30f ? 127.0f / largest : f32x16{};
  }
};
template <class V>
static inline void store_eight(void* to, V v) {
  std::memcpy(to, &v, 32);
}

// quantize_group() for the eight rows of a block, x [8][ld]; the group a multiple of 16. To the same bits for finite
// values; codes are interleaved in registers (measured, norms of a prefill of 512: 4.9 ms for 6.2).
static inline void quantize_block(const float* x, int64_t ld, int64_t begin, const IntActs& out, int64_t start,
                                  uint8_t flip) {
  const int64_t at = start * out.groups() + begin / out.group * 8;
  const EightScales scales(x, ld, out.group);
  store_eight(out.scales + at, scales.scale);
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
        code[r] = round_to_i32(load<f32x16>(x + (4 * half + r) * ld + i) * scales.inverse[4 * half + r]);
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

// quantize_group() for eight rows of a tile, the first or the last of it.
static inline void quantize_tiled(const float* x, int64_t ld, int64_t begin, const IntActs& out, int64_t row) {
  const TileGroup tile(out.group);
  const int64_t start = row / kTileRows * kTileRows, lane = row - start, g = begin / out.group, groups = out.groups();
  const EightScales scales(x, ld, out.group);
  const u8x64 one = u8x64{} + 1;
  i32x16 sums[8] = {};
  int8_t* const codes = out.codes + (start * groups + g * kTileRows) * tile.row_bytes() + lane * tile.columns;
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) {
    int8_t* to = codes + r * tile.columns;
    const float* from = x + r * ld;
    const float inverse = scales.inverse[r];
    for (int64_t part = 0; part < tile.parts; part++, to += tile.columns * kTileRows, from += tile.columns) {
      int64_t i = 0;
      for (; i + 64 <= tile.columns; i += 64) {
        i32x16 code[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) code[j] = round_to_i32(load<f32x16>(from + i + 16 * j) * inverse);
        // Rows of sixteen columns lie as interleave_rows() has rows of four.
        const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const i8x64 line = (i8x64)_mm512_maskz_permutexvar_epi32(0xffff, in_order, (__m512i)interleave_rows(code));
        sums[r] = dot4<true>(sums[r], one, line);
        store(to + i, line);
      }
      for (; i < tile.columns; i += 16) {
        const i32x16 code = round_to_i32(load<f32x16>(from + i) * inverse);
        sums[r] += code;
        store(to + i, i32_to_i8(code));
      }
    }
  }
  const int64_t at = (start * groups + g * kTileRows) + lane;
  store_eight(out.scales + at, scales.scale);
  store_eight(out.negated_sums + at, -reduce_eight(sums, [](i32x16 a, i32x16 b) { return a + b; }));
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
    const Layout layout = layout_of(out, range.rows);
    if (layout == Layout::kTiled && out.group % 16 == 0 && TileGroup(out.group).columns % 16 == 0) {
      for (; row % 8 == 0 && row + 8 <= range.last; x += 8 * ld, row += 8) quantize_tiled(x, ld, begin, out, row);
    } else if (layout != Layout::kTiled && out.group % 16 == 0) {
      for (; row < range.last && block_rows(row, range.rows) == 8; x += 8 * ld, row += 8)
        quantize_block(x, ld, begin, out, row, flip_of(layout));
    }
    if (row >= range.last) return;
#endif
    quantize_group(x, out.group, begin, act_row_of(out, row, range.rows));
  }
}

}  // namespace llmctl
