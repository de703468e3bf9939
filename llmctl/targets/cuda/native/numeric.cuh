// Conversions and packing built on device.cuh's primitives; the same code on a GPU and emulated.
#pragma once
#include "device.cuh"

namespace llmctl {

// Two e4m3 bytes, each the upper one of its half of `pair`, as the bits of T: their values times 2^-8 (f16), 2^-120 (bf16).
template <typename T>
LLMCTL_DEVICE u32 e4m3_bits(u32 pair);

template <>
LLMCTL_SPECIALISATION u32 e4m3_bits<f16>(u32 pair) {
    return (pair & 0x80008000u) | ((pair & 0x7f007f00u) >> 1);
}
template <>
LLMCTL_SPECIALISATION u32 e4m3_bits<bf16>(u32 pair) {
    return (pair & 0x80008000u) | ((pair & 0x7f007f00u) >> 4);
}

LLMCTL_DEVICE float to_float(float v) { return v; }
LLMCTL_DEVICE float to_float(bf16 v) { return bits_to_float(static_cast<u32>(v.bits) << 16); }

// Exact: the seven magnitude bits are an f16's, but for an exponent bias that is 8 less.
LLMCTL_DEVICE float to_float(e4m3 v) {
    const u32 magnitude = v.bits & 0x7fu;
    if (magnitude == 0x7fu) return bits_to_float(0x7fc00000u);
    const f16 scaled{static_cast<u16>(((v.bits & 0x80u) << 8) | (magnitude << 7))};
    return to_float(scaled) * 256.0f;
}

template <>
LLMCTL_SPECIALISATION float from_float<float>(float v) {
    return v;
}

// Rounds to nearest even; saturates to +-448; NaN stays NaN. Has its own instruction only from sm_89 on.
template <>
LLMCTL_SPECIALISATION e4m3 from_float<e4m3>(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(v));
    return e4m3{static_cast<u8>(pair & 0xffu)};
#else
    const u32 bits = float_to_bits(v);
    const u32 sign = (bits >> 24) & 0x80u;
    u32 magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return e4m3{0x7f};
    if (magnitude > 0x43e00000u) magnitude = 0x43e00000u;  // 448
    if (magnitude < 0x3c800000u) {
        // Below 2^-6 the step is 2^-9, which is the last bit of a float near 2^14.
        const u32 steps = float_to_bits(bits_to_float(magnitude) + 16384.0f) & 0xffu;
        return e4m3{static_cast<u8>(sign | steps)};
    }
    magnitude += 0x7ffffu + ((magnitude >> 20) & 1u);
    return e4m3{static_cast<u8>(sign | ((magnitude >> 20) - (120u << 3)))};
#endif
}

// The nearest integer in -128..127; NaN gives 0.
LLMCTL_DEVICE s8 to_s8(float v) {
    const int i = round_to_int(v);
    return static_cast<s8>(i < -128 ? -128 : i > 127 ? 127 : i);
}

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

// Four floats as signed bytes in one word, the first in bits 0..7.
LLMCTL_DEVICE u32 pack_s8(float a, float b, float c, float d) {
    return (static_cast<u32>(to_s8(a)) & 0xffu) | ((static_cast<u32>(to_s8(b)) & 0xffu) << 8) |
           ((static_cast<u32>(to_s8(c)) & 0xffu) << 16) | ((static_cast<u32>(to_s8(d)) & 0xffu) << 24);
}

}  // namespace llmctl
