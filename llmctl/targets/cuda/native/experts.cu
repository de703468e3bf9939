// What surrounds the products of a mixture of experts: which experts a token takes, slots by expert, the sum of parts.
//
//   route_<T>         logits T [rows, experts] -> chosen i32 [rows, top_k], shares T [rows, top_k]
//       scores = softmax or sigmoid of the logits in fp32; chosen: the top_k highest of score + bias (f32 [experts], may
//       be null), within the top_groups of `groups` whose two best add up to the most (DeepSeek-AI 2024, DeepSeek-V3,
//       section 2.1.2); of equal ones the first. shares = score, renormalised by their sum, * scale. A row of NaN chooses
//       experts that there are. Grid: rows blocks of 32 threads; dynamic shared memory 4 * (2 experts + groups) bytes.
//   group_slots_m<R>  chosen i32 [slots] -> order i32 [slots], blocks i32 [count][4], as grouped.cuh has them, up to R
//       slots a block, both in the order of slots. Grid: one block of 256 threads; dynamic shared memory 8 * experts bytes.
//   weighted_sum_<T>  y [rows, width] = sum over j of share[j] * x[j], in fp32; x T [rows, parts, width], shares T [rows,
//       parts], or their arguments to a sigmoid. width % 8 == 0. Grid: ceil(rows * width / 8 / 256) of 256 threads.
//
// All are launch-bound when tokens are decoded: 128 logits a row, 8 slots a token.
#include "device.cuh"

namespace llmctl {
namespace experts {

constexpr int kThreads = 256;

LLMCTL_DEVICE float minus_infinity() { return bits_to_float(0xff800000u); }

// Larger for larger floats, and never 0, which is for what is out; NaN is the least.
LLMCTL_DEVICE u32 rank(float v) {
    const u32 bits = float_to_bits(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 1;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The index of the highest of `count` ranks in shared memory, the first of equal ones; the same in every lane. A lane
// reads the ranks that it wrote itself, if it goes through them as this does.
LLMCTL_DEVICE int highest(const u32* ranks, int count) {
    u64 best = 0;
    for (int i = lane_index(); i < count; i += kWarp) {
        const u64 key = static_cast<u64>(ranks[i]) << 32 | (0xffffffffu - static_cast<u32>(i));
        best = key > best ? key : best;
    }
    return static_cast<int>(0xffffffffu - static_cast<u32>(warp_max(best)));
}

// Ranks of experts outside the best groups become 1: behind all but NaN.
LLMCTL_DEVICE void keep_groups(u32* ranks, const float* wanted, u32* group_ranks, int count, int groups, int top) {
    const int size = count / groups;
    for (int group = lane_index(); group < groups; group += kWarp) {
        float first = wanted[group * size], second = minus_infinity();
        for (int i = 1; i < size; ++i) {
            const float v = wanted[group * size + i];
            second = v > first ? first : fmaxf(second, v);
            first = fmaxf(first, v);
        }
        group_ranks[group] = rank(first + second);
    }
    for (int i = 0; i < top; ++i) {
        const int best = highest(group_ranks, groups);
        warp_sync();
        if (lane_index() == 0) group_ranks[best] = 0;
        warp_sync();
    }
    for (int i = lane_index(); i < count; i += kWarp) {
        if (group_ranks[i / size] != 0) ranks[i] = 1;
    }
}

template <typename T>
LLMCTL_DEVICE float score(const T* logits, int i, bool softmax, float most) {
    const float v = to_float(logits[i]);
    return softmax ? expf(v - most) : 1.0f / (1.0f + expf(-v));
}

template <typename T>
LLMCTL_DEVICE void route(const T* all_logits, const float* bias, int* chosen, T* shares, int count, int top_k, bool softmax,
                         bool renormalise, int groups, int top_groups, float scale, u8* shared) {
    const long long row = block_index();
    const T* const logits = all_logits + row * count;
    u32* const ranks = reinterpret_cast<u32*>(shared);
    float* const wanted = reinterpret_cast<float*>(shared) + count;
    u32* const group_ranks = ranks + 2 * count;
    float most = minus_infinity(), sum = 0.0f;
    if (softmax) {
        for (int i = lane_index(); i < count; i += kWarp) most = fmaxf(most, to_float(logits[i]));
        most = warp_max(most);
        for (int i = lane_index(); i < count; i += kWarp) sum += score(logits, i, true, most);
        sum = warp_sum(sum);
    }
    for (int i = lane_index(); i < count; i += kWarp) {
        const float found = score(logits, i, softmax, most) / (softmax ? sum : 1.0f);
        wanted[i] = bias ? found + bias[i] : found;
        ranks[i] = rank(wanted[i]);
    }
    warp_sync();
    if (groups > top_groups) keep_groups(ranks, wanted, group_ranks, count, groups, top_groups);
    float total = 0.0f;
    for (int j = 0; j < top_k; ++j) {
        const int expert = highest(ranks, count);
        warp_sync();
        if (lane_index() == 0) {
            ranks[expert] = 0;
            chosen[row * top_k + j] = expert;
        }
        warp_sync();
        total += score(logits, expert, softmax, most) / (softmax ? sum : 1.0f);
    }
    for (int j = lane_index(); j < top_k; j += kWarp) {
        float share = score(logits, chosen[row * top_k + j], softmax, most) / (softmax ? sum : 1.0f);
        if (renormalise) share = share / (total + 1e-20f);
        shares[row * top_k + j] = from_float<T>(share * scale);
    }
}

// Slots to their places, 32 at a time and in order; `next`: of each expert. One warp.
LLMCTL_DEVICE void place_slots(const int* chosen, int* order, int* next, int slots) {
    warp_sync();
    for (int from = 0; from < slots; from += kWarp) {
        const int slot = from + lane_index(), expert = slot < slots ? chosen[slot] : -1;
        int before = 0, after = 0;
#pragma unroll
        for (int lane = 0; lane < kWarp; ++lane) {
            const bool same = shuffle(expert, lane) == expert;
            before += same && lane < lane_index();
            after += same && lane > lane_index();
        }
        const int place = expert < 0 ? 0 : next[expert] + before;
        warp_sync();
        if (expert >= 0) {
            order[place] = slot;
            if (after == 0) next[expert] = place + 1;
        }
        warp_sync();
    }
}

// Experts in order: each one's slots, and the blocks that they make, counted together in one word.
template <int kRows>
LLMCTL_DEVICE void group_slots(const int* chosen, int* order, int* blocks, int slots, int count, int block_count,
                               u8* shared) {
    int* const counts = reinterpret_cast<int*>(shared);  // then the place of an expert's next slot
    int* const firsts = counts + count;
    for (int i = thread_index(); i < count; i += kThreads) counts[i] = 0;
    block_sync();
    for (int i = thread_index(); i < slots; i += kThreads) atomic_add(&counts[chosen[i]], 1);
    block_sync();
    if (warp_index() == 0) {
        const int share = (count + kWarp - 1) / kWarp, begin = lane_index() * share;
        const int end = begin + share < count ? begin + share : count;
        u64 own = 0;
        for (int i = begin; i < end; ++i) own += static_cast<u64>((counts[i] + kRows - 1) / kRows) << 32 | counts[i];
        u64 before = warp_running_sum(own) - own;
        const int all_blocks = shuffle(static_cast<int>((before + own) >> 32), kWarp - 1);
        for (int i = begin; i < end; ++i) {
            const int slot = static_cast<int>(before & 0xffffffffu), number = counts[i];
            int block = static_cast<int>(before >> 32);
            before += static_cast<u64>((number + kRows - 1) / kRows) << 32 | number;
            for (int at = 0; at < number; at += kRows, ++block) {
                const int here = number - at < kRows ? number - at : kRows;
                store16(blocks + 4 * block, Vec16{{static_cast<u32>(i), static_cast<u32>(slot + at),
                                                   static_cast<u32>(here), 0}});
            }
            firsts[i] = slot;
        }
        for (int i = all_blocks + lane_index(); i < block_count; i += kWarp) {
            store16(blocks + 4 * i, Vec16{{0, 0, 0, 0}});
        }
    }
    if (warp_index() == 0) place_slots(chosen, order, firsts, slots);
}

template <typename T>
LLMCTL_DEVICE void weighted_sum(const T* x, const T* shares, T* y, int rows, int parts, int width, bool sigmoid) {
    const long long item = static_cast<long long>(block_index()) * kThreads + thread_index();
    const int per_row = width / 8;
    if (item >= static_cast<long long>(rows) * per_row) return;
    const long long row = item / per_row;
    const int column = static_cast<int>(item % per_row) * 8;
    float sum[8] = {};
    for (int j = 0; j < parts; ++j) {
        float share = to_float(shares[row * parts + j]);
        if (sigmoid) share = 1.0f / (1.0f + expf(-share));
        const Vec16 v = load16(x + (row * parts + j) * width + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = fused_multiply_add(share, lane16<T>(v, i), sum[i]);
    }
    Vec16 made;
#pragma unroll
    for (int i = 0; i < 4; ++i) made.w[i] = pack16<T>(sum[2 * i], sum[2 * i + 1]);
    store16(y + row * width + column, made);
}

}  // namespace experts
}  // namespace llmctl

#define LLMCTL_EXPERTS(T)                                                                                             \
    LLMCTL_KERNEL(llmctl::kWarp, 16)                                                                                  \
    route_##T(const llmctl::T* logits, const float* bias, int* chosen, llmctl::T* shares, int experts, int top_k, \
              int softmax, int renormalise, int groups, int top_groups, float scale) {                                \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                \
        llmctl::experts::route<llmctl::T>(logits, bias, chosen, shares, experts, top_k, softmax != 0,                 \
                                          renormalise != 0, groups, top_groups, scale, shared);                       \
    }                                                                                                                 \
    LLMCTL_KERNEL(llmctl::experts::kThreads, 4)                                                                       \
    weighted_sum_##T(const llmctl::T* x, const llmctl::T* shares, llmctl::T* y, int rows, int parts, int width,       \
                     int sigmoid) {                                                                                   \
        llmctl::experts::weighted_sum<llmctl::T>(x, shares, y, rows, parts, width, sigmoid != 0);                     \
    }
#define LLMCTL_GROUP_SLOTS(ROWS)                                                                                      \
    LLMCTL_KERNEL(llmctl::experts::kThreads, 1)                                                                       \
    group_slots_m##ROWS(const int* chosen, int* order, int* blocks, int slots, int experts, int block_count) {        \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                                \
        llmctl::experts::group_slots<ROWS>(chosen, order, blocks, slots, experts, block_count, shared);               \
    }

LLMCTL_EXPERTS(f16)
LLMCTL_EXPERTS(bf16)
LLMCTL_GROUP_SLOTS(8)
LLMCTL_GROUP_SLOTS(16)
