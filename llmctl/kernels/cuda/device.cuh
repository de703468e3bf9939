// The one header through which kernels reach the device: 16-bit floats, vector loads, thread indices, shuffles.
//
// A kernel file uses nothing of CUDA but what is declared here (and __global__, __shared__, __restrict__), so that the
// same file compiles for a GPU with NVRTC, and as plain C++ against an emulation header (-DLLMCTL_EMULATE) that
// declares the same names. No CUDA toolkit header is included: NVRTC alone is enough.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;

namespace llmctl {

constexpr int kWarp = 32;

// 16-bit floats as bits; all arithmetic is done in fp32.
struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

// 16 bytes: the widest load a thread can issue. Addresses must be multiples of 16.
struct alignas(16) Vec16 {
    u32 w[4];
};

}  // namespace llmctl

#ifdef LLMCTL_EMULATE
#include "emulation.h"
#else

#define LLMCTL_DEVICE static __device__ __forceinline__
// Threads a block, and blocks that should fit on an SM: bounds the registers ptxas may use.
#define LLMCTL_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

namespace llmctl {

LLMCTL_DEVICE int thread_index() { return threadIdx.x; }
LLMCTL_DEVICE int block_index() { return blockIdx.x; }
LLMCTL_DEVICE void block_sync() { __syncthreads(); }

// Value of `v` in the lane whose index differs by the bits of `mask`. All 32 lanes must take part.
LLMCTL_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

LLMCTL_DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
LLMCTL_DEVICE u32 float_to_bits(float v) { return __float_as_uint(v); }
LLMCTL_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LLMCTL_DEVICE float reciprocal_sqrt(float v) { return __frsqrt_rn(v); }

LLMCTL_DEVICE float to_float(f16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
    return r;
}

template <typename T>
LLMCTL_DEVICE T from_float(float v);

template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
    f16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}

// 16 bytes that no thread writes during the kernel.
LLMCTL_DEVICE Vec16 load16_const(const void* p) {
    Vec16 r;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
                 : "l"(p));
    return r;
}

// 16 bytes read once by one thread (weights): kept out of L1, so that activations stay there.
LLMCTL_DEVICE Vec16 load16_stream(const void* p) {
    Vec16 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
                 : "l"(p));
    return r;
}

LLMCTL_DEVICE Vec16 load16(const void* p) { return *static_cast<const Vec16*>(p); }
LLMCTL_DEVICE void store16(void* p, const Vec16& v) { *static_cast<Vec16*>(p) = v; }

}  // namespace llmctl

#endif

namespace llmctl {

LLMCTL_DEVICE float to_float(bf16 v) { return bits_to_float(static_cast<u32>(v.bits) << 16); }

// Element i (0..7) of eight 16-bit floats loaded as one Vec16.
template <typename T>
LLMCTL_DEVICE float lane16(const Vec16& v, int i) {
    return to_float(T{static_cast<u16>(v.w[i / 2] >> (16 * (i % 2)))});
}

// Two floats rounded to T, in one word: `low` in bits 0..15.
template <typename T>
LLMCTL_DEVICE u32 pack16(float low, float high) {
    return static_cast<u32>(from_float<T>(low).bits) | (static_cast<u32>(from_float<T>(high).bits) << 16);
}

// Sum over the 32 lanes of a warp, the same bits in every lane: a butterfly in fixed order.
LLMCTL_DEVICE float warp_sum(float v) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
}

// Sum over a block of kThreads threads, the same bits in every thread; `scratch` holds kThreads / 32 floats.
template <int kThreads>
LLMCTL_DEVICE float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = v;
    block_sync();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) total += scratch[warp];
    return total;
}

}  // namespace llmctl
