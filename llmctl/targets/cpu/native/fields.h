// Codes of 2, 3, 5 and 6 bits, stored by their bits: few rows decode them in registers; for many, lines of gemm.h's w4 or
// w8 are made of them, a tile at a time, in a thread's scratch.
//
// A tile's codes lie in units of 16 columns, 512 codes: as many lines of 64 bytes as a code has bits. A code is cut into
// fields of 4, 2 and 1 bits, as many of those as its width is the sum of, the lowest bits in the widest. A unit has first
// the fields of 4 bits (4 lines), then those of 2 (2 lines), then those of 1 (1 line). Eight lines of w8, number 2 * c + h
// for the columns 4 * c .. 4 * c + 3 and half h of the outputs, have the byte of a code at the same place; field i of a
// byte of line number l is of that byte of line l * (8 / width) + i. The codes of a tile's nested scales lie so, too, 512
// of those that NestedScales says a unit.
#pragma once
#include "simd.h"

namespace llmctl {

constexpr int64_t kUnitColumns = 16, kUnitCodes = 512;

// What is added to a code on its way to a line of `line_bits`: without minimums the middle of w8 is always 128, whose
// zeros make_ready() and multiply_tiles() take for granted.
static inline uint8_t field_bias(int line_bits, bool minimums, int64_t code_bits) {
  return line_bits == 8 && !minimums ? uint8_t(128 - (1 << (code_bits - 1))) : uint8_t(0);
}

// Bits [from, from + kWidth) of each byte, moved to [to, to + kWidth).
template <int kWidth>
static inline u8x64 moved(u8x64 line, int from, int to) {
  const uint8_t mask = uint8_t(((1 << kWidth) - 1) << to);
  typedef uint16_t u16x32 __attribute__((vector_size(64)));
  const u16x32 words = (u16x32)line;  // what crosses into a neighbour's byte is masked off
  return (u8x64)(from > to ? words >> uint16_t(from - to) : words << uint16_t(to - from)) & mask;
}

// A unit's lines in registers.
template <int kBits>
struct Unit {
  static constexpr int kPairs = kBits & 4, kSingles = kPairs + (kBits & 2);  // lines before those of 2 bits, of 1 bit
  u8x64 nibbles[4], pairs[2], singles;

  explicit Unit(const uint8_t* unit) {
    if constexpr (kBits & 4)
      for (int i = 0; i < 4; i++) nibbles[i] = load<u8x64>(unit + 64 * i);
    if constexpr (kBits & 2)
      for (int i = 0; i < 2; i++) pairs[i] = load<u8x64>(unit + 64 * (kPairs + i));
    if constexpr (kBits & 1) singles = load<u8x64>(unit + 64 * kSingles);
  }
  // The codes of line `line` of w8, from bit `at` of their bytes on.
  inline __attribute__((always_inline)) u8x64 codes(int line, int at = 0) const {
    u8x64 joined{};
    if constexpr (kBits & 4) joined = line & 1 ? high_nibbles(nibbles[line / 2]) : nibbles[line / 2] & 15;
    if constexpr (kBits & 2) joined |= moved<2>(pairs[line / 4], line % 4 * 2, at + (kBits & 4));
    if constexpr (kBits & 1) joined |= moved<1>(singles, line, at + (kBits & 6));
    return joined;
  }
};

// Units to lines of w4 (kLineBits 4, codes of up to 3 bits) or of w8, to whose codes `bias` is added.
template <int kBits, int kLineBits>
static __attribute__((noinline)) void join_codes(const uint8_t* units, int64_t count, uint8_t bias, uint8_t* to) {
  for (int64_t i = 0; i < count; i++, units += 64 * kBits) {
    const Unit<kBits> unit(units);
#pragma GCC unroll 8
    for (int line = 0; line < 8; line += 8 / kLineBits, to += 64) {
      if constexpr (kLineBits == 8) store(to, unit.codes(line) + bias);
      else store(to, unit.codes(line) | unit.codes(line + 1, 4));
    }
  }
}

static inline void join_codes(int bits, const uint8_t* units, int64_t count, uint8_t bias, uint8_t* to) {
  switch (bits) {
    case 2: return join_codes<2, 4>(units, count, bias, to);
    case 3: return join_codes<3, 4>(units, count, bias, to);
    case 4: return join_codes<4, 8>(units, count, bias, to);
    case 5: return join_codes<5, 8>(units, count, bias, to);
    default: return join_codes<6, 8>(units, count, bias, to);
  }
}

// Code number `at` of units as eight lines of w8 have them, one unit behind the other.
static inline int unit_code(int bits, const uint8_t* units, int64_t at) {
  const uint8_t* from = units + at / kUnitCodes * 64 * bits;
  const int64_t line = at % kUnitCodes / 64, byte = at % 64;
  int code = 0, bit = 0;
  for (int width = 4; width; width /= 2) {
    if (!(bits & width)) continue;
    const int64_t fields = 8 / width;  // of a byte
    code |= (from[line / fields * 64 + byte] >> line % fields * width & ((1 << width) - 1)) << bit;
    bit += width, from += 64 * (8 / fields);
  }
  return code;
}

// The code of column `column` and output `output` of a tile.
static inline int joined_code(int bits, const uint8_t* tile, int64_t column, int64_t output) {
  const int64_t line = column % kUnitColumns / 4 * 2 + output / kLanes;
  return unit_code(bits, tile, column / kUnitColumns * kUnitCodes + line * 64 + output % kLanes * 4 + column % 4);
}

}  // namespace llmctl
