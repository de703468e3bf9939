// Device side of the CUDA emulator: the names that device.cuh promises, for kernels compiled as plain C++.
//
// Declarations only; emulator.so does the work, so that none of it is instrumented. Every operation that can be misused
// takes the source line of its call, by which two threads are told to be at the same barrier.
#pragma once
#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __restrict__ __restrict
#define __forceinline__ inline
// Blocks run one after another, so a block's shared memory is a static variable; the harness finds it by its symbol.
#define __shared__ static __attribute__((aligned(16), used))
// Inlined without fail: the compiler does not instrument the store of a struct that a call returns.
#define LLMCTL_DEVICE [[maybe_unused, gnu::always_inline]] static inline
#define LLMCTL_METHOD [[gnu::always_inline]] inline
#define LLMCTL_SPECIALISATION [[gnu::always_inline]] inline
// The harness reads the launch bound and the entry's name and parameters from the preprocessed text.
#define LLMCTL_KERNEL(threads, blocks) extern "C" __attribute__((llmctl_entry(threads))) void
#define LLMCTL_DYNAMIC_SHARED(name) u8* const name = static_cast<u8*>(::llmctl::emulated_dynamic_shared())
#define LLMCTL_LINE int line = __builtin_LINE()

namespace llmctl {

int thread_index();
int block_index();
int block_index_y();
int block_index_z();
int block_size();
int grid_size();
int grid_size_y();
int grid_size_z();
void* emulated_dynamic_shared();

void block_sync(LLMCTL_LINE);
void warp_sync(LLMCTL_LINE);
void device_fence();

enum class Shuffle : int { kXor, kUp, kDown, kLane };
u32 emulated_shuffle(u32 v, int by, Shuffle kind, int line);
u32 vote_ballot(bool v, LLMCTL_LINE);
LLMCTL_DEVICE bool vote_any(bool v, LLMCTL_LINE) { return vote_ballot(v, line) != 0; }
LLMCTL_DEVICE bool vote_all(bool v, LLMCTL_LINE) { return vote_ballot(v, line) == 0xffffffffu; }

template <typename To, typename From>
LLMCTL_DEVICE To emulated_cast(From v) {
    static_assert(sizeof(To) == sizeof(From));
    return __builtin_bit_cast(To, v);
}

#define LLMCTL_EMULATE_SHUFFLE(T, name, kind)                                                                    \
    LLMCTL_DEVICE T name(T v, int by, LLMCTL_LINE) {                                            \
        return emulated_cast<T>(emulated_shuffle(emulated_cast<u32>(v), by, Shuffle::kind, line));               \
    }
LLMCTL_EMULATE_SHUFFLE(float, shuffle_xor, kXor)
LLMCTL_EMULATE_SHUFFLE(int, shuffle_xor, kXor)
LLMCTL_EMULATE_SHUFFLE(u32, shuffle_xor, kXor)
LLMCTL_EMULATE_SHUFFLE(float, shuffle_up, kUp)
LLMCTL_EMULATE_SHUFFLE(int, shuffle_up, kUp)
LLMCTL_EMULATE_SHUFFLE(u32, shuffle_up, kUp)
LLMCTL_EMULATE_SHUFFLE(float, shuffle_down, kDown)
LLMCTL_EMULATE_SHUFFLE(int, shuffle_down, kDown)
LLMCTL_EMULATE_SHUFFLE(float, shuffle, kLane)
LLMCTL_EMULATE_SHUFFLE(int, shuffle, kLane)
LLMCTL_EMULATE_SHUFFLE(u32, shuffle, kLane)
#undef LLMCTL_EMULATE_SHUFFLE

void emulated_load(void* to, const void* p, int bytes, bool read_only);
void emulated_store(void* p, const void* from, int bytes);
template <typename V>
LLMCTL_DEVICE V emulated_load(const void* p, bool read_only) {
    V v;
    emulated_load(&v, p, sizeof v, read_only);
    return v;
}
LLMCTL_DEVICE Vec16 load16_const(const void* p) { return emulated_load<Vec16>(p, true); }
LLMCTL_DEVICE Vec16 load16_stream(const void* p) { return emulated_load<Vec16>(p, true); }
LLMCTL_DEVICE Vec16 load16(const void* p) { return emulated_load<Vec16>(p, false); }
LLMCTL_DEVICE Vec8 load8(const void* p) { return emulated_load<Vec8>(p, false); }
LLMCTL_DEVICE void store16(void* p, const Vec16& v) { emulated_store(p, &v, 16); }
LLMCTL_DEVICE void store8(void* p, const Vec8& v) { emulated_store(p, &v, 8); }

u32 atomic_add(u32* p, u32 v);
int atomic_add(int* p, int v);
u64 atomic_add(u64* p, u64 v);
float atomic_add(float* p, float v);
u32 atomic_max(u32* p, u32 v);
u64 atomic_max(u64* p, u64 v);

void cp_async16(void* shared, const void* global);
void cp_async16_zero_fill(void* shared, const void* global, int bytes);
void cp_async_commit();
void emulated_cp_async_wait(int pending);
template <int kPending>
LLMCTL_DEVICE void cp_async_wait() {
    emulated_cp_async_wait(kPending);
}

void emulated_ldmatrix(u32* r, int matrices, bool transposed, const void* row, int line);
LLMCTL_DEVICE void ldmatrix_x1(u32 (&r)[1], const void* p, LLMCTL_LINE) { emulated_ldmatrix(r, 1, false, p, line); }
LLMCTL_DEVICE void ldmatrix_x2(u32 (&r)[2], const void* p, LLMCTL_LINE) { emulated_ldmatrix(r, 2, false, p, line); }
LLMCTL_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* p, LLMCTL_LINE) { emulated_ldmatrix(r, 4, false, p, line); }
LLMCTL_DEVICE void ldmatrix_x1_trans(u32 (&r)[1], const void* p, LLMCTL_LINE) {
    emulated_ldmatrix(r, 1, true, p, line);
}
LLMCTL_DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void* p, LLMCTL_LINE) {
    emulated_ldmatrix(r, 2, true, p, line);
}
LLMCTL_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* p, LLMCTL_LINE) {
    emulated_ldmatrix(r, 4, true, p, line);
}

template <typename T>
void mma16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], LLMCTL_LINE);
template <>
void mma16816<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], int line);
template <>
void mma16816<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], int line);
void mma16832_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], LLMCTL_LINE);

LLMCTL_DEVICE float bits_to_float(u32 bits) { return emulated_cast<float>(bits); }
LLMCTL_DEVICE u32 float_to_bits(float v) { return emulated_cast<u32>(v); }
LLMCTL_DEVICE float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
LLMCTL_DEVICE float reciprocal_sqrt(float v) {
    return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(v)));
}
float fast_exp2(float v);
LLMCTL_DEVICE float fast_reciprocal(float v) { return 1.0f / v; }
int round_to_int(float v);

float emulated_from_f16(u16 bits);
u16 emulated_to_f16(float v);
u16 emulated_to_bf16(float v);
LLMCTL_DEVICE float to_float(f16 v) { return emulated_from_f16(v.bits); }
template <typename T>
LLMCTL_DEVICE T from_float(float v);
template <>
LLMCTL_SPECIALISATION f16 from_float<f16>(float v) {
    return f16{emulated_to_f16(v)};
}
template <>
LLMCTL_SPECIALISATION bf16 from_float<bf16>(float v) {
    return bf16{emulated_to_bf16(v)};
}

template <typename T>
LLMCTL_DEVICE u32 packed_from_floats(float low, float high) {
    return static_cast<u32>(from_float<T>(low).bits) | static_cast<u32>(from_float<T>(high).bits) << 16;
}

template <typename T>
u32 packed_fma(u32 a, u32 b, u32 c);
template <typename T>
u32 packed_sub(u32 a, u32 b);
template <>
u32 packed_fma<f16>(u32 a, u32 b, u32 c);
template <>
u32 packed_fma<bf16>(u32 a, u32 b, u32 c);
template <>
u32 packed_sub<f16>(u32 a, u32 b);
template <>
u32 packed_sub<bf16>(u32 a, u32 b);

template <int kTable>
LLMCTL_DEVICE u32 lop3(u32 a, u32 b, u32 c) {
    u32 r = 0;
    for (int bits = 0; bits < 8; ++bits) {
        if (kTable >> bits & 1) r |= (bits & 4 ? a : ~a) & (bits & 2 ? b : ~b) & (bits & 1 ? c : ~c);
    }
    return r;
}

LLMCTL_DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) {
    const u64 both = static_cast<u64>(b) << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; ++i) r |= static_cast<u32>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return r;
}

LLMCTL_DEVICE int population_count(u32 v) { return __builtin_popcount(v); }

LLMCTL_DEVICE u64 multiply_high(u64 a, u64 b) {
    return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64);
}

LLMCTL_DEVICE int dot4_s8(u32 a, u32 b, int c) {
    for (int i = 0; i < 4; ++i) c += static_cast<s8>(a >> (8 * i)) * static_cast<s8>(b >> (8 * i));
    return c;
}

}  // namespace llmctl

#undef LLMCTL_LINE
