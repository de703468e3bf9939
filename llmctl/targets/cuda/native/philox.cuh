// Philox4x32-10 (Salmon et al., 2011), bit for bit that of targets/reference/philox.py: the key is the seed, the counter the
// position of the token in its sequence, so that a seed gives the same draws in any batch.
#pragma once
#include "device.cuh"

namespace llmctl {

// 53 random bits in the upper bits of the word, the lower 11 zero: the uniform in [0, 1) is this over 2^64.
LLMCTL_DEVICE u64 philox_bits(u64 seed, u64 position) {
    u32 c0 = static_cast<u32>(position), c1 = static_cast<u32>(position >> 32), c2 = 0, c3 = 0;
    u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 p0 = static_cast<u64>(0xD2511F53u) * c0, p1 = static_cast<u64>(0xCD9E8D57u) * c2;
        c0 = static_cast<u32>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<u32>(p1);
        c2 = static_cast<u32>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<u32>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (static_cast<u64>(c1) << 32 | c0) & ~static_cast<u64>(0x7ff);
}

}  // namespace llmctl
