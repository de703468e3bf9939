// The splits of attention_decode as one: out = sum_s 2^(m_s - M) part_s / sum_s 2^(m_s - M) total_s, M = max_s m_s.
//
// One warp per (sequence, head); splits are added in order of position, so a row has the same bits in any batch. Lanes
// hold dims lane, lane + 32, ...; loads of a split are 128-byte lines. Shapes as in attention_decode.cuh; out T rows of
// [tokens, heads * head_dim], out_stride elements apart. value_unit: what the sums are multiplied by (the scale of fp8
// values times 256; 1 otherwise). head_dim <= 256. Rows of sequences with no positions come out as zeros; sequences
// with other than one row in query_start are left alone.
//
// Grid: ceil(sequences * heads / 4) blocks of 128 threads. Llama-3-8B, batch 32 x 8k, splits of 512: reads 32 x 32 x
// 16 x 520 bytes = 8.5 MB, just written and so mostly in L2; 2 us at 4.3 TB/s, 4 us with the launch, beside 284 us of
// decode.
#include "device.cuh"

namespace llmctl {
namespace attention {

constexpr int kCombineThreads = 128;
constexpr int kCombineDims = 8;

template <typename T>
LLMCTL_DEVICE void combine(const float* parts, const float* part_stats, const int* seq_lens, const int* query_start,
                           T* out, int sequences, int heads, int head_dim, int out_stride, int window, int split,
                           int max_splits, float value_unit) {
    const int item = block_index() * (kCombineThreads / kWarp) + warp_index(), lane = lane_index();
    if (item >= sequences * heads) return;
    const int sequence = item / heads, head = item % heads, length = seq_lens[sequence];
    const long long token = query_start ? query_start[sequence] : sequence;
    if (query_start && query_start[sequence + 1] - token != 1) return;
    const int first = window > 0 && length > window ? (length - window) / split : 0;
    const int splits = (length + split - 1) / split - first;
    const long long at = static_cast<long long>(item) * max_splits;
    const float* stats = part_stats + at * 2;
    float most = -1e30f;
    for (int s = lane; s < splits; s += kWarp) most = fmaxf(most, stats[2 * s]);
    most = warp_max(most);
    float total = 0.0f, sum[kCombineDims] = {};
#pragma unroll 2
    for (int s = 0; s < splits; ++s) {
        const float by = fast_exp2(stats[2 * s] - most);
        const float* part = parts + (at + s) * head_dim;
        total += by * stats[2 * s + 1];
#pragma unroll
        for (int i = 0; i < kCombineDims; ++i) {
            const int dim = lane + i * kWarp;
            if (dim < head_dim) sum[i] += by * part[dim];
        }
    }
    const float factor = total > 0.0f ? value_unit / total : 0.0f;
    T* row = out + token * out_stride + head * head_dim;
#pragma unroll
    for (int i = 0; i < kCombineDims; ++i) {
        const int dim = lane + i * kWarp;
        if (dim < head_dim) row[dim] = from_float<T>(sum[i] * factor);
    }
}

}  // namespace attention
}  // namespace llmctl

#define LLMCTL_ATTENTION_COMBINE(T)                                                                                 \
    LLMCTL_KERNEL(llmctl::attention::kCombineThreads, 4)                                                            \
    attention_combine_##T(const float* parts, const float* part_stats, const int* seq_lens, const int* query_start, \
                          llmctl::T* out, int sequences, int heads, int head_dim, int out_stride, int window,       \
                          int split, int max_splits, float value_unit) {                                            \
        llmctl::attention::combine(parts, part_stats, seq_lens, query_start, out, sequences, heads, head_dim,       \
                                   out_stride, window, split, max_splits, value_unit);                              \
    }

LLMCTL_ATTENTION_COMBINE(f16)
LLMCTL_ATTENTION_COMBINE(bf16)
