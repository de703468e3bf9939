// Paged attention for sequences with any number of new tokens behind any prefix (flash attention, Dao 2023): causal,
// read through the block table, lengths packed in one batch.
//
// A block takes kRows packed rows (token, query head) of one KV head; its four warps hold 16 or 32 rows each and share
// tiles of 32 positions, double-buffered in shared memory: one barrier a tile. 32 rows a warp (head sizes to 128) halve
// the fragment loads per mma; at 16 they, not the tensor cores, would bound the loop. Packing the group makes a key
// load serve all its query heads, and keeps tiles full when a chunk is short. Tiles above the diagonal or outside the
// window are skipped by block and by warp, and only tiles that the diagonal or the window's edge cuts are masked.
//
// For 32 rows x 32 positions x 128 dims a warp reads 24 KB of fragments (192 cycles of an SM's shared memory) and issues
// 128 mma (128 cycles at the dense rate, 205 at the 60% or so that mma.sync reaches on sm_90) and 32 exponentials a lane
// (64 cycles): balanced, bound by mma. wgmma and TMA would lift that bound, on sm_90 alone.
//
// Grid: (kv_heads, tiles); tiles >= sum over sequences of ceil(rows * group / kRows), for which the total rows * group
// / kRows + sequences will do. Blocks find their sequence by a scan of query_start; the last tiles, which attend to
// most, go first. Threads: 128. Dynamic shared memory: kSharedBytes.
//
// q and out rows as in query_start; sequences with fewer than min_rows rows are left alone (2 where decode serves
// them). seq_lens counts the new tokens too. q_stride, out_stride % 8 == 0; keys, values, q, out aligned to 16 bytes;
// block_size 16, 32 or 64. out may not alias q.
#pragma once
#include "attention_tile.cuh"

namespace llmctl {
namespace attention {

template <typename S>
struct Prefill {
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kTiles = S::kDim > 128 ? 1 : 2;
    static constexpr int kWarpRows = 16 * kTiles;
    static constexpr int kRows = kWarps * kWarpRows;
    static constexpr int kUnits = 2;
    static constexpr int kPositions = kUnits * kUnit;
    static constexpr int kStageBytes = kUnits * S::kUnitBytes;
    static constexpr int kQueryBytes = kRows * S::kQueryRow;
    static constexpr int kScaleFloats = S::Rule::kScaled ? 2 * kPositions : 0;  // of one stage: keys, then values
    static constexpr int kSharedBytes = kQueryBytes + 2 * (2 * kStageBytes + kScaleFloats * 4);

    using Warp = Flash<S, kTiles, kUnits>;
};

// Which rows of which sequence a block has.
struct Part {
    int sequence, tile, rows;  // rows: of the whole sequence, all query heads of the group
    long long token;           // first row of the sequence in q
};

// Part number `index`, counting tiles of kRows rows sequence by sequence; sequence -1 when there are fewer.
template <int kRows>
LLMCTL_DEVICE Part find_part(const int* query_start, int sequences, int group, int min_rows, int index) {
    const int lane = lane_index();
    for (int base = 0; base < sequences; base += kWarp) {
        const int sequence = base + lane;
        int count = 0;
        if (sequence < sequences) count = query_start[sequence + 1] - query_start[sequence];
        const int tiles = count < min_rows ? 0 : (count * group + kRows - 1) / kRows;
        int upto = tiles;
#pragma unroll
        for (int delta = 1; delta < kWarp; delta *= 2) {
            const int below = shuffle_up(upto, delta);
            if (lane >= delta) upto += below;
        }
        const u32 beyond = vote_ballot(upto > index);
        if (beyond != 0) {
            const int found = population_count(~beyond & (beyond - 1));  // its lowest bit
            const int before = shuffle(upto - tiles, found), rows = shuffle(count, found) * group;
            return Part{base + found, index - before, rows, query_start[base + found]};
        }
        index -= shuffle(upto, kWarp - 1);
    }
    return Part{-1, 0, 0, 0};
}

// Two stages of keys and values in shared memory, and the block table ahead of them.
template <typename S>
struct Stages {
    using P = Prefill<S>;
    Cache<S> cache;
    u8* memory;
    int blocks[P::kUnits];  // of the tile to be copied next

    LLMCTL_METHOD u8* keys(int stage) const { return memory + stage * 2 * P::kStageBytes; }
    LLMCTL_METHOD u8* values(int stage) const { return keys(stage) + P::kStageBytes; }
    LLMCTL_METHOD float* scales(int stage) const {
        return reinterpret_cast<float*>(memory + 4 * P::kStageBytes) + stage * P::kScaleFloats;
    }
    LLMCTL_METHOD void look_up(int position) {
#pragma unroll
        for (int u = 0; u < P::kUnits; ++u) {
            const int at = position + u * kUnit;
            blocks[u] = at < cache.length ? cache.block_of(at / kUnit) : 0;
        }
    }
    // Starts the copy of the tile at `position`, which was looked up; gives this thread's share of its scales.
    LLMCTL_METHOD float start(int stage, int position) const {
        float scale = 0.0f;
#pragma unroll
        for (int u = 0; u < P::kUnits; ++u) {
            const int unit = position / kUnit + u;
            const long long slot = cache.slot(blocks[u], unit);
            cache.template copy<P::kThreads>(keys(stage) + u * S::kUnitBytes, cache.keys, slot, unit, thread_index());
            cache.template copy<P::kThreads>(values(stage) + u * S::kUnitBytes, cache.values, slot, unit,
                                             thread_index());
            const int own = thread_index() % P::kPositions;
            if (S::Rule::kScaled && thread_index() < 2 * P::kPositions && own / kUnit == u) {
                scale = cache.scale(thread_index() / P::kPositions, slot, position + own);
            }
        }
        cp_async_commit();
        return scale;
    }
    LLMCTL_METHOD void keep_scale(int stage, float scale) const {
        if (S::Rule::kScaled && thread_index() < 2 * P::kPositions) scales(stage)[thread_index()] = scale;
    }
};

// Where a warp's rows stand.
template <typename S>
struct Rows {
    int first, lowest, highest;  // first packed row; first and last position of its tokens; lowest > highest if none
    int context, group;

    LLMCTL_METHOD Rows(const Part& part, int group_size, int length) {
        group = group_size;
        context = length - part.rows / group;
        first = part.tile * Prefill<S>::kRows + warp_index() * Prefill<S>::kWarpRows;
        const int end = first + Prefill<S>::kWarpRows < part.rows ? first + Prefill<S>::kWarpRows : part.rows;
        lowest = context + first / group;
        highest = end > first ? context + (end - 1) / group : -1;
    }
    // The position up to which a row of the warp sees.
    LLMCTL_METHOD int operator()(int row) const { return context + (first + row) / group; }
    LLMCTL_METHOD bool sees(int position, int window) const {
        return position <= highest && (window == 0 || position + Prefill<S>::kPositions > lowest - window + 1);
    }
    LLMCTL_METHOD bool cuts(int position, int window) const {
        return position + Prefill<S>::kPositions - 1 > lowest || (window > 0 && position <= highest - window);
    }
};

// The warp's rows, normalised, to global memory.
template <typename S>
LLMCTL_DEVICE void store_rows(const typename Prefill<S>::Warp& flash, typename S::T* out, int out_stride,
                              const Part& part, int first_row, int head0, int group, float value_unit) {
    using T = typename S::T;
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int m = 0; m < Prefill<S>::kTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float total = flash.row_total(m, h);
            const float by = total > 0.0f ? value_unit / total : 0.0f;
            const int row = first_row + 16 * m + 8 * h + g;
            if (row >= part.rows) continue;
            T* to = out + (part.token + row / group) * out_stride + (head0 + row % group) * S::kDim;
#pragma unroll
            for (int j = 0; j < S::kDim / 16; ++j) {
                const float even[2] = {flash.out[m][2 * j][2 * h] * by, flash.out[m][2 * j][2 * h + 1] * by};
                const float odd[2] = {flash.out[m][2 * j + 1][2 * h] * by, flash.out[m][2 * j + 1][2 * h + 1] * by};
                if constexpr (S::kBytes) {
                    store8(to + 16 * j + 4 * t, Vec8{{packed_from_floats<T>(even[0], odd[0]),
                                                      packed_from_floats<T>(even[1], odd[1])}});
                } else {
                    *reinterpret_cast<u32*>(to + 16 * j + 2 * t) = packed_from_floats<T>(even[0], even[1]);
                    *reinterpret_cast<u32*>(to + 16 * j + 8 + 2 * t) = packed_from_floats<T>(odd[0], odd[1]);
                }
            }
        }
    }
}

template <typename S>
LLMCTL_DEVICE void prefill(u8* shared, const Call<typename S::T, typename S::KV>& c, typename S::T* out, int out_stride,
                           int sequences, int min_rows) {
    using P = Prefill<S>;
    const int kv_head = block_index(), group = c.heads / c.kv_heads;
    const Part part =
        find_part<P::kRows>(c.query_start, sequences, group, min_rows, grid_size_y() - 1 - block_index_y());
    if (part.sequence < 0) return;
    Stages<S> stages{cache_of<S>(c, part.sequence, kv_head), shared + P::kQueryBytes, {}};
    const int first_row = part.tile * P::kRows, context = stages.cache.length - part.rows / group;
    load_queries<S, P::kRows, P::kThreads>(shared, c, part.token, kv_head, first_row, part.rows);

    const int end_row = first_row + P::kRows < part.rows ? first_row + P::kRows : part.rows;
    const int end = context + (end_row - 1) / group + 1;
    const int start = context + first_row / group - c.window + 1;
    int position = c.window > 0 && start > 0 ? start / kUnit * kUnit : 0;
    const Rows<S> rows(part, group, stages.cache.length);
    const Scoring scoring = scoring_of<S>(c);
    const u8* queries = shared + warp_index() * P::kWarpRows * S::kQueryRow;
    typename P::Warp flash;
    flash.clear();
    stages.look_up(position);
    stages.keep_scale(0, stages.start(0, position));
    stages.look_up(position + P::kPositions);
    for (int stage = 0; position < end; position += P::kPositions, stage ^= 1) {
        cp_async_wait<0>();
        block_sync();
        const int next = position + P::kPositions;
        float arriving = 0.0f;
        if (next < end) {
            arriving = stages.start(stage ^ 1, next);
            stages.look_up(next + P::kPositions);
        }
        if (rows.sees(position, c.window)) {
            float weights[P::kTiles][2 * P::kUnits][4];
            flash.multiply(weights, queries, stages.keys(stage));
            flash.score(weights, scoring, stages.scales(stage));
            if (rows.cuts(position, c.window)) flash.mask(weights, position, rows, c.window);
            flash.soften(weights, stages.scales(stage) + P::kPositions);
            flash.accumulate(weights, stages.values(stage));
        }
        if (next < end) stages.keep_scale(stage ^ 1, arriving);
    }
    const float value_unit = S::kBytes && !S::Rule::kScaled ? c.value_scale * S::Rule::kValueUnit : 1.0f;
    store_rows<S>(flash, out, out_stride, part, rows.first, kv_head * group, group, value_unit);
}

}  // namespace attention
}  // namespace llmctl

#define LLMCTL_ATTENTION_PREFILL(T, KV, DIM)                                                                \
    LLMCTL_KERNEL(128, 2)                                                                                   \
    attention_prefill_##T##_##KV##_d##DIM(LLMCTL_ATTENTION_POINTERS(T, KV), llmctl::T* out,                 \
                                          LLMCTL_ATTENTION_SIZES, int out_stride, int sequences,            \
                                          int min_rows, LLMCTL_ATTENTION_FACTORS) {                         \
        LLMCTL_DYNAMIC_SHARED(shared);                                                                      \
        llmctl::attention::prefill<llmctl::attention::Shape<llmctl::T, llmctl::KV, DIM>>(                   \
            shared, LLMCTL_ATTENTION_CALL, out, out_stride, sequences, min_rows);                           \
    }
