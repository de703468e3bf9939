// Scales and minimums that are stored as codes, multiplied out to the floats that kernels read: a tile at a time, into a
// thread's scratch (measured, w4 in groups of 32, one core, 90 MB that a cache holds: a step of one row takes 0.97 of what
// it takes with 97 MB of fp16 scales, of 8 rows 1.04 to 1.06, of 32 rows 1.01).
#pragma once
#include <algorithm>

#include "fields.h"
#include "simd.h"
#include "tables.h"

namespace llmctl {

// Rounded to nearest even; |x| < 65520.
static inline uint16_t f32_to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits < 0x38800000u) {  // below 2^-14: added to 0.5, whose last bit is 2^-24, it is rounded to fp16's denormals
    float small;
    std::memcpy(&small, &bits, 4);
    const float shifted = small + 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13));
}

static inline void store_f16(uint16_t* to, f32x16 x) {
#if defined(LLMCTL_AVX512)
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (int half = 0; half < 2; half++) {
    const __m256 part = load<__m256>((const char*)&x + 32 * half);
    _mm_storeu_si128((__m128i*)(to + 8 * half), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int i = 0; i < 16; i++) to[i] = f32_to_f16(x[i]);
#endif
}

#if defined(LLMCTL_AMX) && (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 12)
#define LLMCTL_FP16 1
// A tile's scales as NestedScales has them, on fp16 units. A code and its super are exact in fp16 and their product is
// rounded once, as that of float32 numbers is, which is exact before it is rounded: the same bits (measured, 32 rows: a
// step takes 1.01 of its time with fp16 scales, without this 1.03). What has tiles has these, unless it hides them.
template <bool kMin>
__attribute__((target("avx512fp16"), noinline)) static void multiply_halves(const uint8_t* code, const uint16_t* super,
                                                                            int64_t groups, int64_t shared,
                                                                            uint16_t* to) {
  constexpr int kLine = kMin ? 64 : 32;
  for (int64_t g = 0; g < groups; super += kLine) {
    const __m512h scale = _mm512_loadu_ph(super), minimum = kMin ? _mm512_loadu_ph(super + 32) : scale;
    for (const int64_t end = g + shared; g < end; g++, code += kLine, to += 32) {
      __builtin_prefetch(code + groups * kLine);
      const __m512i first = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)code));
      if constexpr (kMin) {
        const __m512i second = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(code + 32)));
        _mm512_storeu_ph(to, _mm512_mul_ph(_mm512_cvtepu16_ph(first), scale));
        _mm512_storeu_ph(to + groups * 32, _mm512_mul_ph(_mm512_cvtepu16_ph(second), minimum));
      } else {
        const __m512i number = _mm512_sub_epi16(first, _mm512_set1_epi16(128));
        _mm512_storeu_ph(to, _mm512_mul_ph(_mm512_cvtepi16_ph(number), scale));
      }
    }
  }
}
#endif

// Of integers. With minimums: codes u8 [tiles][groups][2][32], of scales, of minimums; supers fp16
// [tiles][groups / shared][2][32]; a scale is its code times the super of its group. Without: codes [tiles][groups][32],
// supers [tiles][groups / shared][32]; it is its code - 128, times the super. Codes of fewer bits lie by them (fields.h);
// without minimums it is their middle that is taken off them.
struct NestedScales {
  const uint8_t* codes;
  const uint16_t* supers;
  int64_t shared;  // groups of a super; 0: scales are not nested
  int64_t bits;    // of codes that lie by their bits; 0: each has a byte

  template <bool kMin>
  static constexpr int64_t line = kMin ? 64 : 32;

  // A tile's codes, a byte each. room: as many bytes, where they lie by their bits.
  template <bool kMin>
  const uint8_t* joined(int64_t tile, int64_t groups, uint8_t* room) const {
    const int64_t count = groups * line<kMin>;
    if (!bits) return codes + tile * count;
    const uint8_t* const units = codes + tile * count * bits / 8;
    prefetch(units + count * bits / 8, count * bits / 8);
    join_codes(int(bits), units, count / kUnitCodes, field_bias(8, kMin, bits), room);
    return room;
  }

  // A tile's scales [groups][32], then its minimums. code: as joined() gives them.
  template <bool kMin>
  void multiply_out(const uint8_t* code, int64_t tile, int64_t groups, uint16_t* to) const {
    constexpr int kLine = kMin ? 64 : 32, kZero = kMin ? 0 : 128;
    const uint16_t* super = supers + tile * (groups / shared) * kLine;
#if defined(LLMCTL_FP16)
    static const bool on_halves = __builtin_cpu_supports("avx512fp16");
    if (on_halves) return multiply_halves<kMin>(code, super, groups, shared, to);
#endif
    for (int64_t g = 0; g < groups; super += kLine) {
      const f32x16 s0 = f16_to_f32x16(super), s1 = f16_to_f32x16(super + kLanes);
      f32x16 m0{}, m1{};
      if constexpr (kMin) m0 = f16_to_f32x16(super + 32), m1 = f16_to_f32x16(super + 48);
      for (const int64_t end = g + shared; g < end; g++, code += kLine, to += 32) {
        __builtin_prefetch(code + groups * kLine);
        store_f16(to, to_f32(u8_to_i32(code) - kZero) * s0);
        store_f16(to + kLanes, to_f32(u8_to_i32(code + kLanes) - kZero) * s1);
        if constexpr (!kMin) continue;
        store_f16(to + groups * 32, to_f32(u8_to_i32(code + 32)) * m0);
        store_f16(to + groups * 32 + kLanes, to_f32(u8_to_i32(code + 48)) * m1);
      }
    }
  }

  // Of one output of a tile; `group`: counted over all tiles; kMinimum 1: its minimum.
  template <bool kMin, int kMinimum>
  float one(int64_t group, int64_t output) const {
    constexpr int kPlanes = kMin ? 2 : 1;
    const float super = f16_to_f32(supers[(group / shared * kPlanes + kMinimum) * 32 + output]);
    const int64_t at = (group * kPlanes + kMinimum) * 32 + output;
    const int stored = bits ? unit_code(int(bits), codes, at) : codes[at], zero = kMin ? 0 : 1 << (bits ? bits - 1 : 7);
    const int code = stored - zero;
    return f16_to_f32(f32_to_f16(float(code) * super));
  }
};

// x, rounded to float32 whatever is done with it next: a product that is not to be fused with a sum.
static inline f32x16 rounded(f32x16 x) {
#if defined(LLMCTL_AVX512)
  asm("" : "+v"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// Of a code book. codes u8 [tiles][groups][32], supers fp32 [][2], starts [tiles][32], map [256]. The scale of group g of
// an output is map[code] * super[0] + super[1], each rounded, of the super of number (start + g) / shared (measured, NF4,
// AMX, one core of a busy machine, in turns: a step of one row takes 0.95 of its time with fp32 scales where rows have
// 4096 columns, 1.01 to 1.04 with 2048, 1.06 to 1.09 with 576; of 8 and 32 rows 1.00 to 1.04).
struct MappedScales {
  const uint8_t* codes;
  const float* supers;
  const int32_t* starts;
  const float* map;
  int64_t shared;

  // A tile's scales [groups][32].
  void multiply_out(int64_t tile, int64_t groups, float* to) const {
    const uint8_t* const code = codes + tile * groups * 32;
    for (int64_t half = 0; half < 32; half += kLanes)
      for (int64_t g = 0; g < groups;) {
        // Up to the first output whose super ends.
        const i32x16 number = load<i32x16>(starts + tile * 32 + half) + int32_t(g), super = super_of(number);
        const f32x16 factor = gather(supers, super * 2), offset = gather(supers + 1, super * 2);
        const i32x16 left = (super + 1) * int32_t(shared) - number;
        const int32_t run = reduce(left, [](auto a, auto b) { return a < b ? a : b; });
        for (const int64_t end = std::min(groups, g + run); g < end; g++) {
          const int64_t at = g * 32 + half;
          if (!half) __builtin_prefetch(code + groups * 32 + at);
          store(to + at, rounded(gather(map, u8_to_i32(code + at)) * factor) + offset);
        }
      }
  }

 private:
  i32x16 super_of(i32x16 number) const { return shared == 256 ? number >> 8 : number / int32_t(shared); }
};

}  // namespace llmctl
