// What this machine can do, measured by loops with nothing else in them: the bounds that bench profile compares steps
// with. Compiled with an engine's flags, on the kernels' own threads and vectors.
#include <chrono>

#include "pool.h"
#include "simd.h"

using namespace llmctl;

namespace {

// Seconds that f(thread id) takes on all threads, which are awake when the clock starts.
template <class F>
double probe_seconds(int threads, F f) {
  Pool pool(threads);
  auto nothing = [](int) {};
  pool.run(nothing);
  const auto start = std::chrono::steady_clock::now();
  pool.run(f);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Reads `lines` 64-byte lines at p as S interleaved sequential streams.
template <int S>
void read_streams(const char* p, int64_t lines) {
  u8x64 seen[S] = {};
  const int64_t each = lines / S;
  for (int64_t i = 0; i < each; i++)
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) seen[s] |= load<u8x64>(p + (s * each + i) * 64);
  for (int64_t i = each * S; i < lines; i++) seen[0] |= load<u8x64>(p + i * 64);
  for (int s = 0; s < S; s++) asm volatile("" : : "r"(&seen[s]) : "memory");
}

// `rounds` times 16 independent int8 dot products of 64 multiply-adds, operands and accumulators in registers.
// The empty asm hides operands and accumulators from the optimiser, which would hoist the products, or find the sixteen
// sums to be equal and compute fewer.
void int8_rounds(int64_t rounds) {
#if defined(LLMCTL_AVX512)
  __m512i acc[16] = {}, a = _mm512_set1_epi8(3);
  const __m512i b = _mm512_set1_epi8(-5);
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++) asm volatile("" : "+v"(acc[j]));
  for (int64_t i = 0; i < rounds; i++) {
    asm volatile("" : "+v"(a));
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) acc[j] = _mm512_dpbusd_epi32(acc[j], a, b);
  }
#elif defined(__AVX2__)
  __m256i acc[8] = {}, a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(-5), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) asm volatile("" : "+x"(acc[j]));
  for (int64_t i = 0; i < 4 * rounds; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      asm volatile("" : "+x"(a));
      acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
  }
#else
  i32x16 acc[16] = {};
  u8x64 a = u8x64{} + 3;
  const i8x64 b = i8x64{} - 5;
  for (int64_t i = 0; i < rounds; i++) {
    asm volatile("" : : "r"(&a) : "memory");
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) acc[j] = dot4<true>(acc[j], a, b);
  }
#endif
  asm volatile("" : : "r"(&acc) : "memory");
}

}  // namespace

extern "C" {

// Bytes a second of one pass over `data`, each thread reading a contiguous share as 1, 2, 4 or 8 streams.
double probe_read(const void* data, int64_t bytes, int threads, int streams) {
  const int64_t lines = bytes / 64;
  const double seconds = probe_seconds(threads, [&](int id) {
    const int64_t begin = lines * id / threads, count = lines * (id + 1) / threads - begin;
    const char* p = (const char*)data + begin * 64;
    if (streams >= 8) read_streams<8>(p, count);
    else if (streams >= 4) read_streams<4>(p, count);
    else if (streams >= 2) read_streams<2>(p, count);
    else read_streams<1>(p, count);
  });
  return double(lines * 64) / seconds;
}

// Multiply-adds a second of int8 dot products on all threads together.
double probe_int8(int64_t rounds, int threads) {
  return double(rounds) * threads * 16 * 64 / probe_seconds(threads, [&](int) { int8_rounds(rounds); });
}
}
