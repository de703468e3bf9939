// Portable 16-lane vectors on GCC/Clang vector extensions, with intrinsics where the ISA has an instruction that the
// extensions cannot express (dot products, packing, fp16) or that compilers do not find.
//
// The same sources are compiled once per variant; flags alone decide which branch is taken:
//   amx          avx512bf16 + -mamx-tile -mamx-int8 (Sapphire Rapids); see amx.h
//   avx512bf16   avx512vnni + -mavx512bf16 (Zen 4, Cooper Lake)          avx512vnni   -mavx512f/bw/vl/dq/vnni (Ice Lake)
//   avx2         -mavx2 -mfma -mf16c                                    portable     no flags (any architecture)
// LLMCTL_EMULATE_BF16 with avx512vnni's flags takes avx512bf16's branches without its instruction: for tests, slow.
// All integer dot products are exact in every variant; float results may differ between variants in rounding only.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LLMCTL_AVX512 1
#endif
#if defined(LLMCTL_AVX512) && (defined(__AVX512BF16__) || defined(LLMCTL_EMULATE_BF16))
#define LLMCTL_AVX512_BF16 1
#endif

namespace llmctl {

constexpr int kLanes = 16;
#if defined(LLMCTL_AVX512)
constexpr bool kManyRegisters = true;  // 32 of 16 lanes; elsewhere additional accumulators would only be spilled
#else
constexpr bool kManyRegisters = false;
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef int8_t i8x64 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef int16_t i16x32 __attribute__((vector_size(64)));

// Unaligned loads and stores.
template <class V>
static inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
static inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// To the first-level cache, or with kLocality 2 to the second. A function that does nothing else must be inlined always:
// GCC 12 takes it for one without effects, and leaves out the calls.
template <int kLocality = 3>
static inline __attribute__((always_inline)) void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, kLocality);
}

static inline void prefetch_to_write(void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((char*)p + i, 1);
}

static inline f32x16 splat(float x) { return x - f32x16{}; }

// a * b + c, rounded once where the machine can. Sums that must come out the same in every instance of a template are
// written with it: whether a compiler fuses acc += a * b may depend on the registers that the instance needs (GCC does not
// where its tuning sets avoid-fma-max-bits and acc stays in a register over the loop).
static inline f32x16 fused(f32x16 a, f32x16 b, f32x16 c) {
#if defined(LLMCTL_AVX512)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  const __m256 halves[2] = {_mm256_fmadd_ps(load<__m256>(&a), load<__m256>(&b), load<__m256>(&c)),
                            _mm256_fmadd_ps(load<__m256>((const char*)&a + 32), load<__m256>((const char*)&b + 32),
                                            load<__m256>((const char*)&c + 32))};
  return load<f32x16>(halves);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
static inline f32x16 fused(f32x16 a, float b, f32x16 c) { return fused(a, splat(b), c); }
static inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

static inline f32x16 to_f32(i32x16 v) { return __builtin_convertvector(v, f32x16); }

// Changes of element width. GCC 12 turns __builtin_convertvector between integer widths into scalar code (measured: 60
// cycles for 16 bytes to words), hence the intrinsics; masked forms because GCC 12 warns of an undefined register.
static inline i32x16 u8_to_i32(const uint8_t* p) {
#if defined(LLMCTL_AVX512)
  return (i32x16)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  const __m256i halves[2] = {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                             _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
  return load<i32x16>(halves);
#else
  return __builtin_convertvector(load<u8x16>(p), i32x16);
#endif
}
static inline u32x16 u16_to_u32(u16x16 v) {
#if defined(LLMCTL_AVX512)
  return (u32x16)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__)
  const __m256i halves[2] = {_mm256_cvtepu16_epi32(_mm256_castsi256_si128((__m256i)v)),
                             _mm256_cvtepu16_epi32(_mm256_extracti128_si256((__m256i)v, 1))};
  return load<u32x16>(halves);
#else
  return __builtin_convertvector(v, u32x16);
#endif
}
// The low halves; on AVX2 the values must be below 2^16.
static inline u16x16 u32_to_u16(u32x16 v) {
#if defined(LLMCTL_AVX512)
  return (u16x16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#elif defined(__AVX2__)
  const __m256i low = load<__m256i>(&v), high = load<__m256i>((const char*)&v + 32);
  return (u16x16)_mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
#else
  return __builtin_convertvector(v, u16x16);
#endif
}
// Values in -128 .. 127.
static inline i8x16 i32_to_i8(i32x16 v) {
#if defined(LLMCTL_AVX512)
  return (i8x16)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
#elif defined(__AVX2__)
  const __m256i low = load<__m256i>(&v), high = load<__m256i>((const char*)&v + 32);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
  return (i8x16)_mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
  return __builtin_convertvector(v, i8x16);
#endif
}

#if defined(LLMCTL_AVX512)
// Four columns of four rows: bytes 16 * c + 4 * r + j are codes[r][4 * c + j], which are in -128 .. 127.
static inline i8x64 interleave_rows(const i32x16 (&codes)[4]) {
  const __m512i low = _mm512_packs_epi32((__m512i)codes[0], (__m512i)codes[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)codes[2], (__m512i)codes[3]);
  return (i8x64)_mm512_packs_epi16(low, high);
}
#endif

static inline float bf16_to_f32(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// Round to nearest even; NaN stays NaN.
static inline uint16_t f32_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
static inline f32x16 bf16_to_f32(u16x16 h) {
  u32x16 bits = u16_to_u32(h) << 16;
  return load<f32x16>(&bits);
}
static inline u16x16 f32_to_bf16(f32x16 x) {
  u32x16 bits = load<u32x16>(&x);
  bits = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return u32_to_u16(bits);
}

// Rounded to nearest even; |x| < 2^22. Adding 1.5 * 2^23 rounds and leaves the integer in the low mantissa bits.
static inline i32x16 round_to_i32(f32x16 x) {
  const f32x16 shifted = x + 12582912.0f;
  return load<i32x16>(&shifted) - 0x4b400000;
}
// Rounded to nearest even; |x| <= 32767.
static inline i16x16 f32_to_i16(f32x16 x) { return (i16x16)u32_to_u16((u32x16)round_to_i32(x) & 0xffffu); }

static inline float f16_to_f32(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 0x3ffu, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    float x = float(mantissa) * 5.9604644775390625e-08f;  // 2^-24
    return sign ? -x : x;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static inline f32x16 f16_to_f32x16(const uint16_t* p) {
#if defined(LLMCTL_AVX512)
  // The masked form: GCC 12 warns that the plain one reads an undefined register.
  return (f32x16)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  f32x16 r;
  __m256 lo = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  __m256 hi = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
  std::memcpy(&r, &lo, 32);
  std::memcpy((char*)&r + 32, &hi, 32);
  return r;
#else
  f32x16 r;
  for (int i = 0; i < 16; i++) r[i] = f16_to_f32(p[i]);
  return r;
#endif
}

// Sixteen float8_e4m3 values, none of them NaN. As fp16 bits a value is 2^8 times too small, denormals included; as fp32
// bits its denormals would be fp32's, which cost some machines a microcode assist each.
static inline f32x16 e4m3_to_f32x16(const uint8_t* p) {
#if defined(LLMCTL_AVX512)
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
  return (f32x16)_mm512_maskz_cvtph_ps(0xffff, _mm256_or_si256(sign, rest)) * 256.0f;
#else
  uint16_t half[16];
  for (int i = 0; i < 16; i++) half[i] = uint16_t((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7);
  return f16_to_f32x16(half) * 256.0f;
#endif
}

static inline u8x64 high_nibbles(u8x64 v) {
#if defined(LLMCTL_AVX512)
  return (u8x64)_mm512_and_si512(_mm512_srli_epi16((__m512i)v, 4), _mm512_set1_epi8(15));
#else
  return v >> 4;
#endif
}

// a[lane] * b for |a|, |b| < 2^15.
static inline i32x16 mul_small(i32x16 a, int32_t b) {
#if defined(LLMCTL_AVX512)
  return (i32x16)_mm512_madd_epi16((__m512i)(a & 0xffff), _mm512_set1_epi32(b));
#else
  return a * b;
#endif
}

// The four bytes at p in every lane.
template <class V>
static inline V splat4(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
#if defined(LLMCTL_AVX512)
  return (V)_mm512_set1_epi32(four);
#else
  const i32x16 lanes = four - i32x16{};
  return load<V>(&lanes);
#endif
}

// acc[lane] += sum over j < 4 of a[4*lane+j] * b[4*lane+j].
// kSmall: every |a * b| is below 2^14, so that 16-bit pair sums cannot saturate on AVX2.
template <bool kSmall>
static inline i32x16 dot4(i32x16 acc, u8x64 a, i8x64 b) {
#if defined(LLMCTL_AVX512)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  const __m256i ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; half++) {
    __m256i aa, bb, sum, cc;
    std::memcpy(&aa, (const char*)&a + 32 * half, 32);
    std::memcpy(&bb, (const char*)&b + 32 * half, 32);
    std::memcpy(&cc, (const char*)&acc + 32 * half, 32);
    if (kSmall) {
      sum = _mm256_madd_epi16(_mm256_maddubs_epi16(aa, bb), ones);
    } else {  // split a into its low 7 bits and its top bit: neither part can saturate
      const __m256i low = _mm256_and_si256(aa, _mm256_set1_epi8(0x7f));
      const __m256i top = _mm256_and_si256(_mm256_srli_epi16(aa, 7), _mm256_set1_epi8(1));
      const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(top, bb), _mm256_set1_epi16(128));
      sum = _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(low, bb), ones), high);
    }
    cc = _mm256_add_epi32(cc, sum);
    std::memcpy((char*)&acc + 32 * half, &cc, 32);
  }
  return acc;
#else
  for (int i = 0; i < 16; i++)
    acc[i] += a[4 * i] * b[4 * i] + a[4 * i + 1] * b[4 * i + 1] + a[4 * i + 2] * b[4 * i + 2] + a[4 * i + 3] * b[4 * i + 3];
  return acc;
#endif
}

#if defined(LLMCTL_AVX512_BF16)
// vdpbf16ps: acc[lane] += a[lane][1] * b[lane][1], then += a[lane][0] * b[lane][0], in bf16 pairs.
#if defined(LLMCTL_EMULATE_BF16)
// As Intel's manual describes the instruction (SDM vol. 2, VDPBF16PS): two fused steps, the odd elements first, each
// rounded to nearest even, denormal inputs taken and denormal results written as 0, MXCSR as it was. The mode is set in
// the same asm because a compiler may move arithmetic over a change of MXCSR. Which payload a NaN gets is not followed.
static inline f32x16 dot_bf16_pairs(f32x16 acc, __m512i a, __m512i b) {
  static const uint32_t kFlushMaskNearest = 0x9fc0;  // FTZ, all exceptions masked, DAZ
  const __m512i odd = _mm512_set1_epi32(int32_t(0xffff0000));
  uint32_t before;
  __asm__("vstmxcsr %[before]\n\tvldmxcsr %[mode]\n\t"
          "vfmadd231ps %[a1], %[b1], %[acc]\n\tvfmadd231ps %[a0], %[b0], %[acc]\n\t"
          "vldmxcsr %[before]"
          : [acc] "+&v"(acc), [before] "=&m"(before)
          : [mode] "m"(kFlushMaskNearest), [a1] "v"(_mm512_and_si512(a, odd)), [b1] "v"(_mm512_and_si512(b, odd)),
            [a0] "v"(_mm512_maskz_slli_epi32(0xffff, a, 16)), [b0] "v"(_mm512_maskz_slli_epi32(0xffff, b, 16)));
  return acc;
}
#else
static inline f32x16 dot_bf16_pairs(f32x16 acc, __m512i a, __m512i b) {
  return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#endif
#endif

// acc[lane] += w[lane][0]*x[0] + w[lane][1]*x[1] in bf16 pairs (w: 32 bf16, x: 2 bf16), fp32 accumulation.
static inline f32x16 dot2_bf16(f32x16 acc, const uint16_t* w, const uint16_t* x) {
#if defined(LLMCTL_AVX512_BF16)
  int32_t pair;
  std::memcpy(&pair, x, 4);
  return dot_bf16_pairs(acc, _mm512_loadu_si512(w), _mm512_set1_epi32(pair));
#else
  u32x16 both = load<u32x16>(w);
  u32x16 even = both << 16, odd = both & 0xffff0000u;
  return fused(load<f32x16>(&odd), bf16_to_f32(x[1]), fused(load<f32x16>(&even), bf16_to_f32(x[0]), acc));
#endif
}

static inline f32x16 vmax(f32x16 a, f32x16 b) { return a > b ? a : b; }
static inline f32x16 vmin(f32x16 a, f32x16 b) { return a < b ? a : b; }

// Lane i of the result is lane lanes[i] of v.
template <class V>
static inline V pick(V v, i32x16 lanes) {
#if defined(__clang__)
  V r;
  for (int i = 0; i < 16; i++) r[i] = v[lanes[i]];
  return r;
#else
  return __builtin_shuffle(v, lanes);
#endif
}
constexpr i32x16 kDown8 = {8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr i32x16 kDown4 = {4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7};
constexpr i32x16 kDown2 = {2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3};
constexpr i32x16 kDown1 = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// acc[lane] += w[2*lane]*x[0] + w[2*lane+1]*x[1], exact while below 2^31.
static inline i32x16 dot2_i16(i32x16 acc, i16x32 w, const int16_t* x) {
  int32_t pair;
  std::memcpy(&pair, x, 4);
#if defined(__AVX2__)
  const __m256i xx = _mm256_set1_epi32(pair);
  const __m256i sums[2] = {_mm256_madd_epi16(load<__m256i>(&w), xx), _mm256_madd_epi16(load<__m256i>((const char*)&w + 32), xx)};
  return acc + load<i32x16>(sums);
#else
  for (int i = 0; i < 16; i++) acc[i] += w[2 * i] * x[0] + w[2 * i + 1] * x[1];
  return acc;
#endif
}

// Fixed pairwise order: the same sum in every variant.
template <class V, class Op>
static inline auto reduce(V v, Op&& op) {
  v = op(v, pick(v, kDown8));
  v = op(v, pick(v, kDown4));
  v = op(v, pick(v, kDown2));
  return op(v, pick(v, kDown1))[0];
}
template <class V>
static inline auto reduce_add(V v) {
  return reduce(v, [](V a, V b) { return a + b; });
}
static inline float reduce_max(f32x16 v) {
  return reduce(v, [](f32x16 a, f32x16 b) { return vmax(a, b); });
}
#if defined(LLMCTL_AVX512)
// Lanes of a (0 .. 15) and b (16 .. 31).
template <int... kLanesOf, class V>
static inline V merge_lanes(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kLanesOf...);
#else
  return __builtin_shuffle(a, b, i32x16{kLanesOf...});
#endif
}
// Eight reductions at once, in the order of reduce(): lane i < 8 of the result is that of v[i].
template <class V, class Op>
static inline V reduce_eight(const V (&v)[8], Op&& op) {
  V two[4], four[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    two[i] = op(merge_lanes<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(v[2 * i], v[2 * i + 1]),
                merge_lanes<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    four[i] = op(merge_lanes<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(two[2 * i], two[2 * i + 1]),
                 merge_lanes<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(two[2 * i], two[2 * i + 1]));
  const V eight = op(merge_lanes<0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29>(four[0], four[1]),
                     merge_lanes<2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31>(four[0], four[1]));
  return op(merge_lanes<0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14>(eight, eight),
            merge_lanes<1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15>(eight, eight));
}
#endif
// most / largest, and 0 for what is too small to have a finite one: its codes are then all 0.
static inline float inverse_scale(float largest, float most) { return largest > 1e-30f ? most / largest : 0.0f; }
static inline float max_abs(const float* x, int64_t n) {
  f32x16 top{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 v = load<f32x16>(x + i);
    top = vmax(top, vmax(v, -v));
  }
  float largest = reduce_max(top);
  for (; i < n; i++) largest = std::fmax(largest, std::fabs(x[i]));
  return largest;
}

// exp(x), relative error below 2e-7 on [-87, 88]; 0 below. Cephes expf, range reduction by ln 2.
static inline f32x16 vexp(f32x16 x) {
#if defined(LLMCTL_AVX512)
  const f32x16 clamped = vmin(x, splat(88.3f));
  const f32x16 n = (f32x16)_mm512_maskz_roundscale_ps(0xffff, (__m512)(clamped * 1.44269504088896341f), 8);
#else
  const f32x16 clamped = vmin(vmax(x, splat(-87.3f)), splat(88.3f));
  // Round to nearest even by adding and subtracting 1.5 * 2^23.
  const f32x16 n = (clamped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
#endif
  const f32x16 r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(LLMCTL_AVX512)
  const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_GE_OQ);
  return (f32x16)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)n);
#else
  const i32x16 bits = (__builtin_convertvector(n, i32x16) + 127) << 23;
  p = p * load<f32x16>(&bits);
  return x < -87.3f ? f32x16{} : p;
#endif
}

// 2^x, relative error below 2e-7 on [-126, 127]; 0 below and for NaN, exactly 1 at 0. A polynomial on [0, 1) (minimax,
// 8.3e-8): two instructions do the range reduction, rounding to the nearest would take three.
static inline f32x16 vexp2(f32x16 x) {
#if defined(LLMCTL_AVX512)
  const f32x16 r = (f32x16)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 9);  // x - floor(x)
#else
  const f32x16 near = (vmax(x, splat(-126.0f)) + 12582912.0f) - 12582912.0f;
  const f32x16 n = near > x ? near - 1.0f : near, r = x - n;
#endif
  f32x16 p = splat(1.867001496154882e-3f);
  p = p * r + 9.017299716185617e-3f;
  p = p * r + 5.5799724825690136e-2f;
  p = p * r + 2.401644994384219e-1f;
  p = p * r + 6.931513081429028e-1f;
  p = p * r + 1.0f;
#if defined(LLMCTL_AVX512)
  const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
  return (f32x16)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)x);  // p * 2^floor(x)
#else
  const i32x16 bits = (__builtin_convertvector(n, i32x16) + 127) << 23;
  p = p * load<f32x16>(&bits);
  return x >= -126.0f ? p : f32x16{};
#endif
}

// x / y to within 2 units in the last place (a division costs 16 cycles with AVX-512); y normal, finite and not 0.
static inline f32x16 divide(f32x16 x, f32x16 y) {
#if defined(LLMCTL_AVX512)
  const f32x16 guess = (f32x16)_mm512_maskz_rcp14_ps(0xffff, (__m512)y);
  return x * (guess * (2.0f - y * guess));
#else
  return x / y;
#endif
}

}  // namespace llmctl
