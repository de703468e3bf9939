// Paged attention for sequences with one new token: split over the context (flash-decoding, Dao et al. 2023).
//
// A block takes 16 packed query heads of one KV head and one split: `split` consecutive positions, boundaries at
// multiples of `split` whatever the batch, so that a sequence has the same bits alone and in company. Its warps take
// the split's units of 16 positions in turn, each with a ring of its own in shared memory (two units of keys, two of
// values; a slot is refilled as soon as it was read), so that the loop has no block barrier. The warps' results are
// merged in order and left, not yet normalised, to attention_combine.
//
// Tensor cores for every group size, 1 included: the tile's empty rows cost nothing that is scarce (the numbers are in
// each .cu), and 16-bit elements need no conversion. Of 16 positions of 128 dims a warp issues some 250 instructions
// (450 from bytes) for 8 KB (4 KB), which at 4.3 TB/s take an SM of an H200 440 (220) cycles: under 15% (50%) of its
// issue slots. A split of 512 gives batch 1 at 8k 128 blocks and its sums 1.6% of the traffic of the cache; smaller
// splits fill more of the device at batch 1 and shorten the last wave.
//
// Grid: (splits or fewer, kv_heads * ceil(group / 16), sequences); splits beyond a sequence's length return at once, so
// the grid may be that of the longest sequence there can be, as a CUDA graph wants it. Threads: 32 kWarps. Dynamic
// shared memory: kSharedBytes (targets/cuda/attention.py gives it, and the grid).
//
// parts f32 [sequences, heads, max_splits, head dim], part_stats f32 [sequences, heads, max_splits, 2] (the reference
// the weights are relative to, and their sum); splits are counted from the first that the window leaves. Sequences
// that have other than one row in query_start (null: row i is sequence i) are left to the prefill kernel.
// split % 16 == 0, <= 512 kWarps; q_stride % 8 == 0; keys, values, q aligned to 16 bytes; block_size 16, 32 or 64.
#pragma once
#include "attention_tile.cuh"

namespace llmctl {
namespace attention {

template <typename S>
struct Decode {
    static constexpr int kWarps = S::kDim > 128 ? 2 : 4;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kRing = 4 * S::kUnitBytes;
    static constexpr int kMergeBytes = 16 * S::kDim * 4;  // of one warp
    static constexpr int kRingBytes = kRing > kMergeBytes ? kRing : kMergeBytes;
    static constexpr int kQueryBytes = 16 * S::kQueryRow;
    static constexpr int kScaleFloats = 2 * 2 * kUnit;  // of one warp: two units of key, then value scales
    static constexpr int kStatFloats = 2 * 16;
    static constexpr int kSharedBytes = kQueryBytes + kWarps * (kRingBytes + (kScaleFloats + kStatFloats) * 4);

    using Warp = Flash<S, 1, 1>;
};

template <typename S>
struct Ring {
    u8* slots;       // keys even, keys odd, values even, values odd
    float* scales;   // two units of 16 key and 16 value scales
    int blocks;      // lane i: cache block of this warp's unit i in the split
    int first, count;

    LLMCTL_METHOD int unit(int i) const { return first + i * Decode<S>::kWarps; }
    LLMCTL_METHOD u8* slot(int which, int i) const { return slots + (which * 2 + i % 2) * S::kUnitBytes; }

    // Starts the copy of keys (which = 0) or values (1) of this warp's unit i; always closes a group. Gives this lane's
    // share of both's scales when which is 0.
    LLMCTL_METHOD float start(const Cache<S>& cache, int which, int i) const {
        float scale = 0.0f;
        const int block = shuffle(blocks, i & (kWarp - 1));
        if (i < count) {
            const long long at = cache.slot(block, unit(i));
            cache.template copy<kWarp>(slot(which, i), which ? cache.values : cache.keys, at, unit(i), lane_index());
            if (S::Rule::kScaled && which == 0) {
                const int position = unit(i) * kUnit + lane_index() % kUnit;
                scale = cache.scale(lane_index() / kUnit, at, position);
            }
        }
        cp_async_commit();
        return scale;
    }
    LLMCTL_METHOD float* scales_of(int i) const { return scales + i % 2 * (2 * kUnit); }
};

// This warp's units of the split, into `flash`.
template <typename S>
LLMCTL_DEVICE void attend(typename Decode<S>::Warp& flash, const Ring<S>& ring, const Cache<S>& cache,
                          const u8* queries, const Scoring& scoring, int window) {
    const int lane = lane_index(), last = cache.length - 1;
    flash.clear();
    float arriving[2];  // scales of units i and i + 1, on their way from global to shared memory
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        arriving[i] = ring.start(cache, 0, i);
        ring.start(cache, 1, i);
    }
    for (int i = 0; i < ring.count; ++i) {
        float weights[1][2][4];
        float* scales = ring.scales_of(i);
        if (S::Rule::kScaled) scales[lane] = arriving[0];
        arriving[0] = arriving[1];
        cp_async_wait<3>();
        warp_sync();
        flash.multiply(weights, queries, ring.slot(0, i));
        warp_sync();
        arriving[1] = ring.start(cache, 0, i + 2);
        flash.score(weights, scoring, scales);
        const int position = ring.unit(i) * kUnit;
        if (position + kUnit > cache.length || (window > 0 && position <= last - window)) {
            flash.mask(weights, position, [last](int) { return last; }, window);
        }
        flash.soften(weights, scales + kUnit);
        cp_async_wait<3>();
        warp_sync();
        flash.accumulate(weights, ring.slot(1, i));
        warp_sync();
        ring.start(cache, 1, i + 2);
    }
}

// The warps' sums as one, to global memory. A warp's ring, which it has emptied, takes its sums.
template <typename S>
LLMCTL_DEVICE void merge(typename Decode<S>::Warp& flash, u8* rings, float* stats, float* parts, float* part_stats,
                         int rows, long long row_stride) {
    using D = Decode<S>;
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    float* own = reinterpret_cast<float*>(rings + warp_index() * D::kRingBytes);
    float* own_stats = stats + warp_index() * D::kStatFloats;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float total = flash.row_total(0, h);
        if (t == 0) own_stats[2 * (g + 8 * h)] = flash.most[0][h], own_stats[2 * (g + 8 * h) + 1] = total;
#pragma unroll
        for (int n = 0; n < S::kDim / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int dim = n / 2 * 16 + output_dim<S>(n % 2, 2 * t + e);
                own[(g + 8 * h) * S::kDim + dim] = flash.out[0][n][2 * h + e];
            }
        }
    }
    block_sync();
    for (int i = thread_index(); i < rows * S::kDim; i += D::kThreads) {
        const int row = i / S::kDim, dim = i % S::kDim;
        float most = kNever, total = 0.0f, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < D::kWarps; ++w) most = fmaxf(most, stats[w * D::kStatFloats + 2 * row]);
#pragma unroll
        for (int w = 0; w < D::kWarps; ++w) {
            const float by = fast_exp2(stats[w * D::kStatFloats + 2 * row] - most);
            total += by * stats[w * D::kStatFloats + 2 * row + 1];
            sum += by * reinterpret_cast<const float*>(rings + w * D::kRingBytes)[row * S::kDim + dim];
        }
        parts[row * row_stride * S::kDim + dim] = sum;
        if (dim == 0) part_stats[row * row_stride * 2] = most, part_stats[row * row_stride * 2 + 1] = total;
    }
    block_sync();
}

template <typename S>
LLMCTL_DEVICE void decode(u8* shared, const Call<typename S::T, typename S::KV>& c, float* parts, float* part_stats,
                          int split, int max_splits) {
    using D = Decode<S>;
    const int sequence = block_index_z(), group = c.heads / c.kv_heads, tiles = (group + 15) / 16;
    const int kv_head = block_index_y() / tiles, first_row = block_index_y() % tiles * 16;
    const long long token = c.query_start ? c.query_start[sequence] : sequence;
    if (c.query_start && c.query_start[sequence + 1] - token != 1) return;
    const Cache<S> cache = cache_of<S>(c, sequence, kv_head);
    const int start = c.window > 0 && cache.length > c.window ? cache.length - c.window : 0;
    const int first_split = start / split, splits = (cache.length + split - 1) / split - first_split;
    if (block_index() >= splits) return;

    u8* rings = shared + D::kQueryBytes;
    float* scales = reinterpret_cast<float*>(rings + D::kWarps * D::kRingBytes);
    float* stats = scales + D::kWarps * D::kScaleFloats;
    load_queries<S, 16, D::kThreads>(shared, c, token, kv_head, first_row, group);
    block_sync();
    const int rows = group - first_row < 16 ? group - first_row : 16;
    const long long head = static_cast<long long>(sequence) * c.heads + kv_head * group + first_row;
    for (int s = block_index(); s < splits; s += grid_size()) {
        const int from = (first_split + s) * split, to = from + split;
        const int first = (from > start ? from : start) / kUnit + warp_index();
        const int end = ((to < cache.length ? to : cache.length) + kUnit - 1) / kUnit;
        Ring<S> ring{rings + warp_index() * D::kRingBytes, scales + warp_index() * D::kScaleFloats, 0, first, 0};
        ring.count = end > first ? (end - first + D::kWarps - 1) / D::kWarps : 0;
        if (lane_index() < ring.count) ring.blocks = cache.block_of(ring.unit(lane_index()));
        typename D::Warp flash;
        attend<S>(flash, ring, cache, shared, scoring_of<S>(c), c.window);
        const long long at = head * max_splits + s;
        merge<S>(flash, rings, stats, parts + at * S::kDim, part_stats + at * 2, rows, max_splits);
    }
}

}  // namespace attention
}  // namespace llmctl

#define LLMCTL_ATTENTION_DECODE(T, KV, DIM)                                                                   \
    LLMCTL_KERNEL((DIM > 128 ? 64 : 128), 3)                                                                  \
    attention_decode_##T##_##KV##_d##DIM(LLMCTL_ATTENTION_POINTERS(T, KV), float* parts, float* part_stats,   \
                                         LLMCTL_ATTENTION_SIZES, int split, int max_splits,                   \
                                         LLMCTL_ATTENTION_FACTORS) {                                          \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                        \
        llmctl::attention::decode<llmctl::attention::Shape<llmctl::T, llmctl::KV, DIM>>(                      \
            shared, LLMCTL_ATTENTION_CALL, parts, part_stats, split, max_splits);                             \
    }
