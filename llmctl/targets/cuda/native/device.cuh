// The one header through which kernels reach the device.
//
// A kernel file uses nothing of CUDA but what is declared here (and __global__, __shared__, __restrict__ and C's float
// functions: expf, erff, tanhf, fmaxf, …), so that the same file compiles for a GPU with NVRTC, and as plain C++
// against an emulation header (-DLLMCTL_EMULATE) that declares the same names and checks every use. No CUDA toolkit
// header is included: NVRTC alone is enough. What is built upon these primitives alone (sums, packing, fp8, Philox,
// unpacking of codes) is in collective.cuh, numeric.cuh and dequant.cuh, the same code on both sides.
//
// Contents: types; indices; synchronisation; warp shuffles and votes; loads, stores and atomics; cp.async; ldmatrix;
// mma.sync; conversions and packed 16-bit arithmetic; bit tricks.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using s8 = signed char;

namespace llmctl {

using ::s8;

constexpr int kWarp = 32;

// Floats as bits; arithmetic is done in fp32, or on packed pairs (packed_fma and its like).
struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};
// fp8: 1 sign, 4 exponent (bias 7), 3 mantissa bits; largest 448, no infinity, 0x7f and 0xff are NaN.
struct e4m3 {
    u8 bits;
};

// 16 bytes: the widest load a thread can issue. Addresses must be multiples of 16.
struct alignas(16) Vec16 {
    u32 w[4];
};
// 8 bytes. Addresses must be multiples of 8.
struct alignas(8) Vec8 {
    u32 w[2];
};

}  // namespace llmctl

#ifdef LLMCTL_EMULATE
#include "emulation.h"
#else

#define LLMCTL_DEVICE static __device__ __forceinline__
// In front of a member function.
#define LLMCTL_METHOD __device__ __forceinline__
// In front of the specialisation of a function template that is declared with LLMCTL_DEVICE.
#define LLMCTL_SPECIALISATION __device__ __forceinline__
// Threads a block, and blocks that should fit on an SM: bounds the registers ptxas may use.
#define LLMCTL_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// Declares `u8* name`: the shared memory whose size the launch gives, a multiple of 16.
#define LLMCTL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

namespace llmctl {

// ---- indices -------------------------------------------------------------------------------------------------------

LLMCTL_DEVICE int thread_index() { return threadIdx.x; }
LLMCTL_DEVICE int block_index() { return blockIdx.x; }
LLMCTL_DEVICE int block_index_y() { return blockIdx.y; }
LLMCTL_DEVICE int block_index_z() { return blockIdx.z; }
LLMCTL_DEVICE int block_size() { return blockDim.x; }
LLMCTL_DEVICE int grid_size() { return gridDim.x; }
LLMCTL_DEVICE int grid_size_y() { return gridDim.y; }
LLMCTL_DEVICE int grid_size_z() { return gridDim.z; }

// ---- synchronisation -----------------------------------------------------------------------------------------------

// Every thread of the block must come here; none may have returned. Orders shared and global memory in the block.
LLMCTL_DEVICE void block_sync() { __syncthreads(); }
// Every lane of the warp must come here. Orders memory among the lanes, which shuffles and votes do not.
LLMCTL_DEVICE void warp_sync() { __syncwarp(); }
// Makes this thread's writes visible to other blocks before any later write or atomic of its own.
LLMCTL_DEVICE void device_fence() { __threadfence(); }

// ---- warp shuffles and votes: all 32 lanes must take part -----------------------------------------------------------

// Value of `v` in lane (own ^ mask), own - delta, own + delta, or `lane`; own value where there is no such lane.
LLMCTL_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
LLMCTL_DEVICE int shuffle_xor(int v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
LLMCTL_DEVICE u32 shuffle_xor(u32 v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
LLMCTL_DEVICE float shuffle_up(float v, int delta) { return __shfl_up_sync(0xffffffffu, v, delta); }
LLMCTL_DEVICE int shuffle_up(int v, int delta) { return __shfl_up_sync(0xffffffffu, v, delta); }
LLMCTL_DEVICE u32 shuffle_up(u32 v, int delta) { return __shfl_up_sync(0xffffffffu, v, delta); }
LLMCTL_DEVICE float shuffle_down(float v, int delta) { return __shfl_down_sync(0xffffffffu, v, delta); }
LLMCTL_DEVICE int shuffle_down(int v, int delta) { return __shfl_down_sync(0xffffffffu, v, delta); }
LLMCTL_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
LLMCTL_DEVICE int shuffle(int v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
LLMCTL_DEVICE u32 shuffle(u32 v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

LLMCTL_DEVICE u32 vote_ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
LLMCTL_DEVICE bool vote_any(bool v) { return __any_sync(0xffffffffu, v); }
LLMCTL_DEVICE bool vote_all(bool v) { return __all_sync(0xffffffffu, v); }

// ---- loads, stores, atomics ----------------------------------------------------------------------------------------

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

// 16 or 8 bytes of global or shared memory.
LLMCTL_DEVICE Vec16 load16(const void* p) { return *static_cast<const Vec16*>(p); }
LLMCTL_DEVICE void store16(void* p, const Vec16& v) { *static_cast<Vec16*>(p) = v; }
LLMCTL_DEVICE Vec8 load8(const void* p) { return *static_cast<const Vec8*>(p); }
LLMCTL_DEVICE void store8(void* p, const Vec8& v) { *static_cast<Vec8*>(p) = v; }

// Atomic read-modify-write of global or shared memory; the old value is returned. A float sum depends on the order.
LLMCTL_DEVICE u32 atomic_add(u32* p, u32 v) { return atomicAdd(p, v); }
LLMCTL_DEVICE int atomic_add(int* p, int v) { return atomicAdd(p, v); }
LLMCTL_DEVICE u64 atomic_add(u64* p, u64 v) { return atomicAdd(p, v); }
LLMCTL_DEVICE float atomic_add(float* p, float v) { return atomicAdd(p, v); }
LLMCTL_DEVICE u32 atomic_max(u32* p, u32 v) { return atomicMax(p, v); }
LLMCTL_DEVICE u64 atomic_max(u64* p, u64 v) { return atomicMax(p, v); }

// ---- cp.async: global -> shared behind the thread's back -----------------------------------------------------------
//
// A copy belongs to the thread's open group; commit closes the group. wait<N> returns when at most the N youngest
// groups of THIS thread are unfinished; another thread sees the bytes only after a barrier that follows the wait.

LLMCTL_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes; both addresses multiples of 16. The line goes past L1.
LLMCTL_DEVICE void cp_async16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// Copies the first `bytes` (0..16) and fills the rest of the 16 with zeros; with 0 bytes `global` is not read.
LLMCTL_DEVICE void cp_async16_zero_fill(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

LLMCTL_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
LLMCTL_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements, shared -> registers ------------------------------------------------
//
// Lane 8i + j gives the address of row j (8 elements, 16 bytes, a multiple of 16) of matrix i; the lanes beyond 8 x
// matrices are not looked at. Register i of lane l then holds, of matrix i:
//   plain       row l / 4,  columns 2 (l % 4) and 2 (l % 4) + 1    (the lower column in bits 0..15)
//   transposed  column l / 4,  rows 2 (l % 4) and 2 (l % 4) + 1

LLMCTL_DEVICE void ldmatrix_x1(u32 (&r)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(shared_address(row))
                 : "memory");
}
LLMCTL_DEVICE void ldmatrix_x2(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
LLMCTL_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
LLMCTL_DEVICE void ldmatrix_x1_trans(u32 (&r)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(shared_address(row))
                 : "memory");
}
LLMCTL_DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
LLMCTL_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// ---- mma.sync: d += a @ b on tensor cores, the 32 lanes of a warp together -----------------------------------------
//
// With g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "… mma.m16n8k32"):
//
// mma16816<f16 or bf16>: a [16 x 16], b [16 x 8], d [16 x 8] fp32; two elements a register, the lower index in bits
// 0..15
//   a[0]  row g      columns 2t, 2t + 1            b[0]  rows 2t, 2t + 1          column g
//   a[1]  row g + 8  columns 2t, 2t + 1            b[1]  rows 2t + 8, 2t + 9      column g
//   a[2]  row g      columns 2t + 8, 2t + 9
//   a[3]  row g + 8  columns 2t + 8, 2t + 9
//
// mma16832_s8: a [16 x 32], b [32 x 8] int8, d [16 x 8] int32; four elements a register, the lowest index in bits 0..7
//   a[0]  row g      columns 4t .. 4t + 3          b[0]  rows 4t .. 4t + 3        column g
//   a[1]  row g + 8  columns 4t .. 4t + 3          b[1]  rows 4t + 16 .. 4t + 19  column g
//   a[2]  row g      columns 4t + 16 .. 4t + 19
//   a[3]  row g + 8  columns 4t + 16 .. 4t + 19
//
// both:  d[0], d[1]  row g, columns 2t, 2t + 1      d[2], d[3]  row g + 8, columns 2t, 2t + 1
//
// So ldmatrix_x4 on the four 8x8 corners of a row-major a (order: top left, bottom left, top right, bottom right) gives
// a[0..3]; ldmatrix_x2 on b stored by columns ([n][k]), or ldmatrix_x2_trans on b stored by rows ([k][n]), gives
// b[0..1].

template <typename T>
LLMCTL_DEVICE void mma16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

template <>
LLMCTL_SPECIALISATION void mma16816<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
LLMCTL_SPECIALISATION void mma16816<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

LLMCTL_DEVICE void mma16832_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- conversions (round to nearest even) and arithmetic ------------------------------------------------------------

LLMCTL_DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
LLMCTL_DEVICE u32 float_to_bits(float v) { return __float_as_uint(v); }
LLMCTL_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LLMCTL_DEVICE float reciprocal_sqrt(float v) { return __frsqrt_rn(v); }

// 2^v within 2 units in the last place.
LLMCTL_DEVICE float fast_exp2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// 1 / v within 1 unit in the last place; 0 for an infinite v.
LLMCTL_DEVICE float fast_reciprocal(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// The nearest integer, saturated to the range of the type; NaN gives 0.
LLMCTL_DEVICE int round_to_int(float v) { return __float2int_rn(v); }

LLMCTL_DEVICE float to_float(f16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
    return r;
}

// float -> f16, bf16; and (numeric.cuh) e4m3, float itself.
template <typename T>
LLMCTL_DEVICE T from_float(float v);

template <>
LLMCTL_SPECIALISATION f16 from_float<f16>(float v) {
    f16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}

template <>
LLMCTL_SPECIALISATION bf16 from_float<bf16>(float v) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}

// Two floats rounded to T in one word, `low` in bits 0..15, in one instruction.
template <typename T>
LLMCTL_DEVICE u32 packed_from_floats(float low, float high);

template <>
LLMCTL_SPECIALISATION u32 packed_from_floats<f16>(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <>
LLMCTL_SPECIALISATION u32 packed_from_floats<bf16>(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// a * b + c, and a - b, on two 16-bit floats in a word, each half rounded once.
template <typename T>
LLMCTL_DEVICE u32 packed_fma(u32 a, u32 b, u32 c);
template <typename T>
LLMCTL_DEVICE u32 packed_sub(u32 a, u32 b);

template <>
LLMCTL_SPECIALISATION u32 packed_fma<f16>(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
template <>
LLMCTL_SPECIALISATION u32 packed_fma<bf16>(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
template <>
LLMCTL_SPECIALISATION u32 packed_sub<f16>(u32 a, u32 b) {
    u32 r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
// a - b as -1 * b + a: bf16 subtraction is an instruction of its own only from sm_90 on; this rounds the same.
template <>
LLMCTL_SPECIALISATION u32 packed_sub<bf16>(u32 a, u32 b) {
    return packed_fma<bf16>(b, 0xBF80BF80u, a);
}

// ---- bit tricks ----------------------------------------------------------------------------------------------------

// Any function of three bits, on 32 in parallel: kTable is the same expression of 0xF0 (a), 0xCC (b) and 0xAA (c).
template <int kTable>
LLMCTL_DEVICE u32 lop3(u32 a, u32 b, u32 c) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(kTable));
    return r;
}

// Byte i of the result is byte (selector >> 4i) & 7 of the eight in a (0..3) and b (4..7).
LLMCTL_DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
LLMCTL_DEVICE int population_count(u32 v) { return __popc(v); }
// Upper 64 bits of the 128-bit product.
LLMCTL_DEVICE u64 multiply_high(u64 a, u64 b) { return __umul64hi(a, b); }
// c + the dot product of four signed bytes of a and of b.
LLMCTL_DEVICE int dot4_s8(u32 a, u32 b, int c) {
    int r;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

}  // namespace llmctl

#endif

#include "collective.cuh"
#include "numeric.cuh"
