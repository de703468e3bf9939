// Eight 4-bit codes in a word -> 16-bit floats in registers, without an integer-to-float conversion.
//
// The trick (Kim et al., "Who Says Elephants Can't Run", 2022; used by FasterTransformer and Marlin): a 4-bit code
// placed in the low mantissa bits of 1024 (f16) or 128 (bf16) is that float plus the code, exactly. lop3 masks and
// places two codes in one instruction, a packed subtraction takes the bias away.
//
// Order: word i of the result holds code i in bits 0..15 and code i + 4 in bits 16..31, where code j is bits 4j..4j+3.
#pragma once
#include "device.cuh"

namespace llmctl {

// (a & b) | c for lop3.
constexpr int kAndOr = (0xF0 & 0xCC) | 0xAA;

template <typename T>
LLMCTL_DEVICE void unpack4(u32 (&out)[4], u32 codes);

template <>
LLMCTL_SPECIALISATION void unpack4<f16>(u32 (&out)[4], u32 codes) {
    constexpr u32 kBias = 0x64006400u;  // 1024: the last mantissa bit counts 1
    // Codes 1 and 3 stay where they are, four bits up: 1024 + 16 q, brought back by q = x / 16 - 64.
    const u32 high = codes >> 8;
    out[0] = packed_sub<f16>(lop3<kAndOr>(codes, 0x000f000fu, kBias), kBias);
    out[1] = packed_fma<f16>(lop3<kAndOr>(codes, 0x00f000f0u, kBias), 0x2c002c00u, 0xd400d400u);
    out[2] = packed_sub<f16>(lop3<kAndOr>(high, 0x000f000fu, kBias), kBias);
    out[3] = packed_fma<f16>(lop3<kAndOr>(high, 0x00f000f0u, kBias), 0x2c002c00u, 0xd400d400u);
}

template <>
LLMCTL_SPECIALISATION void unpack4<bf16>(u32 (&out)[4], u32 codes) {
    constexpr u32 kBias = 0x43004300u;  // 128: seven mantissa bits, the last counts 1
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[i] = packed_sub<bf16>(lop3<kAndOr>(codes, 0x000f000fu, kBias), kBias);
        codes >>= 4;
    }
}

}  // namespace llmctl
