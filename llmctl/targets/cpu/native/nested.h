// Scales and minimums that are stored as codes, multiplied out to the fp16 that kernels read: a tile at a time, into a
// thread's scratch (measured, w4 in groups of 32, one core, 90 MB that a cache holds: a step of one row takes 0.97 of what
// it takes with 97 MB of fp16 scales, of 8 rows 1.04 to 1.06, of 32 rows 1.01).
#pragma once
#include "simd.h"

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
__attribute__((target("avx512fp16"), noinline)) static void multiply_halves(const uint8_t* code, const uint16_t* super,
                                                                            int64_t groups, int64_t shared,
                                                                            uint16_t* to) {
  for (int64_t g = 0; g < groups; super += 64) {
    const __m512h scale = _mm512_loadu_ph(super), minimum = _mm512_loadu_ph(super + 32);
    for (const int64_t end = g + shared; g < end; g++, code += 64, to += 32) {
      __builtin_prefetch(code + groups * 64);
      const __m512i first = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)code));
      const __m512i second = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(code + 32)));
      _mm512_storeu_ph(to, _mm512_mul_ph(_mm512_cvtepu16_ph(first), scale));
      _mm512_storeu_ph(to + groups * 32, _mm512_mul_ph(_mm512_cvtepu16_ph(second), minimum));
    }
  }
}
#endif

// codes u8 [tiles][groups][2][32]: of scales, of minimums; supers fp16 [tiles][groups / shared][2][32]. A scale is its
// code times the super of its group.
struct NestedScales {
  const uint8_t* codes;
  const uint16_t* supers;
  int64_t shared;  // groups of a super; 0: scales are not nested

  // A tile's scales [groups][32], then its minimums.
  void multiply_out(int64_t tile, int64_t groups, uint16_t* to) const {
    const uint8_t* code = codes + tile * groups * 64;
    const uint16_t* super = supers + tile * (groups / shared) * 64;
#if defined(LLMCTL_FP16)
    static const bool on_halves = __builtin_cpu_supports("avx512fp16");
    if (on_halves) return multiply_halves(code, super, groups, shared, to);
#endif
    for (int64_t g = 0; g < groups; super += 64) {
      const f32x16 s0 = f16_to_f32x16(super), s1 = f16_to_f32x16(super + kLanes);
      const f32x16 m0 = f16_to_f32x16(super + 32), m1 = f16_to_f32x16(super + 48);
      for (const int64_t end = g + shared; g < end; g++, code += 64, to += 32) {
        __builtin_prefetch(code + groups * 64);
        store_f16(to, to_f32(u8_to_i32(code)) * s0);
        store_f16(to + kLanes, to_f32(u8_to_i32(code + kLanes)) * s1);
        store_f16(to + groups * 32, to_f32(u8_to_i32(code + 32)) * m0);
        store_f16(to + groups * 32 + kLanes, to_f32(u8_to_i32(code + 48)) * m1);
      }
    }
  }

  // Of one output of a tile; kMinimum 1: its minimum.
  template <int kMinimum>
  float one(int64_t tile, int64_t groups, int64_t group, int64_t output) const {
    const int64_t at = tile * groups + group;
    const float super = f16_to_f32(supers[at / shared * 64 + kMinimum * 32 + output]);
    return f16_to_f32(f32_to_f16(float(codes[at * 64 + kMinimum * 32 + output]) * super));
  }
};

}  // namespace llmctl
