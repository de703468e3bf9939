// Look-ups in tables of floats.
#pragma once
#include "simd.h"

namespace llmctl {

// Sixteen entries of a table of sixteen, by the lowest four bits of each code.
static inline f32x16 look_up(f32x16 table, i32x16 codes) {
#if defined(LLMCTL_AVX512)
  return (f32x16)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)codes, (__m512)table);
#elif defined(__AVX2__)
  const __m256 low = load<__m256>(&table), high = load<__m256>((const char*)&table + 32);
  __m256 halves[2];
  for (int half = 0; half < 2; half++) {
    const __m256i index = load<__m256i>((const char*)&codes + 32 * half);
    halves[half] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 where the sign is
  }
  return load<f32x16>(halves);
#else
  f32x16 r;
  for (int i = 0; i < 16; i++) r[i] = table[codes[i] & 15];
  return r;
#endif
}

// table[at[i]].
static inline f32x16 gather(const float* table, i32x16 at) {
#if defined(LLMCTL_AVX512)
  return (f32x16)_mm512_mask_i32gather_ps(__m512{}, 0xffff, (__m512i)at, table, 4);
#else
  f32x16 r;
  for (int i = 0; i < 16; i++) r[i] = table[at[i]];
  return r;
#endif
}

}  // namespace llmctl
