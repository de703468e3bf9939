// Sums and maxima over warps and blocks, built on device.cuh's primitives; the same code on a GPU and emulated.
#pragma once
#include "device.cuh"

namespace llmctl {

LLMCTL_DEVICE int lane_index() { return thread_index() % kWarp; }
LLMCTL_DEVICE int warp_index() { return thread_index() / kWarp; }

LLMCTL_DEVICE u64 shuffle64_xor(u64 v, int mask) {
    const u32 high = shuffle_xor(static_cast<u32>(v >> 32), mask);
    return static_cast<u64>(high) << 32 | shuffle_xor(static_cast<u32>(v), mask);
}
LLMCTL_DEVICE u64 shuffle64_up(u64 v, int delta) {
    const u32 high = shuffle_up(static_cast<u32>(v >> 32), delta);
    return static_cast<u64>(high) << 32 | shuffle_up(static_cast<u32>(v), delta);
}

// Sum over this lane and those below it; integers, so exact in any order.
LLMCTL_DEVICE u64 warp_running_sum(u64 v) {
#pragma unroll
    for (int delta = 1; delta < kWarp; delta *= 2) {
        const u64 below = shuffle64_up(v, delta);
        if (lane_index() >= delta) v += below;
    }
    return v;
}

LLMCTL_DEVICE u64 warp_sum(u64 v) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) v += shuffle64_xor(v, mask);
    return v;
}

LLMCTL_DEVICE u64 warp_max(u64 v) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const u64 other = shuffle64_xor(v, mask);
        v = v > other ? v : other;
    }
    return v;
}

// Sum over the 32 lanes of a warp, the same bits in every lane: a butterfly in fixed order.
LLMCTL_DEVICE float warp_sum(float v) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
}

LLMCTL_DEVICE float warp_max(float v) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
    return v;
}

// Sum over a block of kThreads threads, the same bits in every thread; `scratch` holds kThreads / 32 floats and may be
// used again only after a block_sync.
template <int kThreads>
LLMCTL_DEVICE float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    if (lane_index() == 0) scratch[warp_index()] = v;
    block_sync();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) total += scratch[warp];
    return total;
}

// Maximum over a block; `scratch` as for block_sum.
template <int kThreads>
LLMCTL_DEVICE float block_max(float v, float* scratch) {
    v = warp_max(v);
    if (lane_index() == 0) scratch[warp_index()] = v;
    block_sync();
    float most = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / kWarp; ++warp) most = fmaxf(most, scratch[warp]);
    return most;
}

}  // namespace llmctl
