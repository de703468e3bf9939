// Exact integer products of the int8 KV cache. A line is 64 bytes, 16 lanes of 4; its quads meet 4 integers of a query
// (lines of K) or 4 softmax weights (lines of V). K is stored + 128, because vpdpbusd multiplies unsigned by signed.
#pragma once
#include "simd.h"

namespace llmctl {

constexpr int32_t kKeyOffset = 128;
constexpr float kMostWeight = 32767.0f;

#if defined(LLMCTL_AVX512)
// Codes of -127 .. 127.
struct QueryQuad {
  int8_t code[4];
};
// Weights of 0 .. 32767 as two planes of bytes; 4 quads lie as one vector's bytes are shuffled within its lanes.
struct WeightQuad {
  uint8_t high[4], low[4], unused[8];
};
#else
// Without vpdpbusd products are of 16 bits: a line's even bytes, then its odd ones.
struct QueryQuad {
  int16_t code[4];  // 0, 2, 1, 3
};
struct WeightQuad {
  int16_t code[4];  // 0, 2, 1, 3
};
typedef uint16_t u16x32 __attribute__((vector_size(64)));

static inline void store_words(i16x16 words, int16_t (*to)[4]) {
#if defined(__clang__)
  store(to, __builtin_shufflevector(words, words, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
#else
  store(to, __builtin_shuffle(words, i16x16{0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15}));
#endif
}
#endif

// x * inverse, rounded (|x * inverse| <= 127), as 4 quads.
static inline i32x16 store_query(f32x16 x, float inverse, QueryQuad* to) {
  const i32x16 codes = round_to_i32(x * inverse);
#if defined(LLMCTL_AVX512)
  store(to, i32_to_i8(codes));
#else
  store_words((i16x16)u32_to_u16((u32x16)codes & 0xffffu), &to->code);
#endif
  return codes;
}

#if defined(LLMCTL_AVX512)
// x * inverse, rounded (0 <= x * inverse <= 32767), in the low 16 bits: adding 2^23 leaves it in the low mantissa bits.
static inline __m512i weight_bits(f32x16 x, float inverse) {
  const f32x16 shifted = fused(x, inverse, splat(8388608.0f));
  return load<__m512i>(&shifted);
}
#endif

// x * inverse, rounded (0 <= x * inverse <= 32767), as 4 quads.
static inline void store_weights(f32x16 x, float inverse, WeightQuad* to) {
#if defined(LLMCTL_AVX512)
  const __m512i planes = _mm512_set4_epi32(-1, -1, 0x0c080400, 0x0d090501);
  store(to, (u8x64)_mm512_shuffle_epi8(weight_bits(x, inverse), planes));
#else
  store_words(f32_to_i16(x * inverse), &to->code);
#endif
}

// acc[lane] += (K of the lane's quad + 128) . x
static inline i32x16 dot_keys(i32x16 acc, const uint8_t* line, const QueryQuad* x) {
#if defined(LLMCTL_AVX512)
  return dot4<false>(acc, load<u8x64>(line), splat4<i8x64>(x->code));
#else
  const u16x32 both = load<u16x32>(line);
  acc = dot2_i16(acc, (i16x32)(both & uint16_t(0xff)), x->code);
  return dot2_i16(acc, (i16x32)(both >> 8), x->code + 2);
#endif
}

// A sum of V * weight.
struct ValueSum {
#if defined(LLMCTL_AVX512)
  i32x16 high, low;
  i32x16 total() const { return (high << 8) + low; }
#else
  i32x16 words;
  i32x16 total() const { return words; }
#endif
};

// acc[lane] += V of the lane's quad . x
static inline void dot_values(ValueSum& acc, const uint8_t* line, const WeightQuad* x) {
#if defined(LLMCTL_AVX512)
  const __m512i v = _mm512_loadu_si512(line);
  int32_t high, low;
  std::memcpy(&high, x->high, 4);
  std::memcpy(&low, x->low, 4);
  acc.high = (i32x16)_mm512_dpbusd_epi32((__m512i)acc.high, _mm512_set1_epi32(high), v);
  acc.low = (i32x16)_mm512_dpbusd_epi32((__m512i)acc.low, _mm512_set1_epi32(low), v);
#else
  const i16x32 both = load<i16x32>(line);
  acc.words = dot2_i16(acc.words, (i16x32)((u16x32)both << 8) >> 8, x->code);
  acc.words = dot2_i16(acc.words, both >> 8, x->code + 2);
#endif
}

}  // namespace llmctl
