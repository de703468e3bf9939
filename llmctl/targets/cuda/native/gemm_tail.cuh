// What follows the main loop of every GEMM: the fixed-order sum over split K, then bias, activation and residual.
//
// A block leaves fp32 sums of a tile in shared memory, as one or several parts (warps that shared K), to be added in
// order. With split K every block writes its tile to the workspace, f32 [split][tile][token][row]; the block that comes
// last (an atomic count a tile, put back to 0 for the next launch) adds the splits in order 0, 1, ...: the same bits
// whichever block is last.
//
//   plain  y = sum * token_scale + bias + residual                                      y [m, n]
//   gated  y = fn(gate + bias) * (up + bias) + residual, rows interleaved by eights     y [m, n / 2]
// residual: graphs use it for parallel residuals (passes.fuse_linear_add), where it saves a launch and two passes over
// the rows. A residual in front of a norm is the norm's to add: here it would save one pass of five, 1.5 MB or 0.4 us
// for the 192 rows that this kernel serves at most, and nothing at more, which are cuBLAS's.
#pragma once
#include "activation.cuh"

namespace llmctl {
namespace gemm {

enum Activation : int { kPlain = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4 };

LLMCTL_DEVICE float activate(int which, float v) {
    if (which == kSilu) return activation::silu()(v);
    if (which == kGelu) return activation::gelu()(v);
    if (which == kGeluTanh) return activation::gelu_tanh()(v);
    return activation::relu()(v);
}

// `n` counts the weight's rows, gate and up together. bias [n], residual (y's shape), token_scales [m]: may be null.
template <typename T>
struct Tail {
    const T* bias;
    const T* residual;
    const float* token_scales;
    T* y;
    float* workspace;
    u32* counters;
    int m, n, activation;
};

// One block's tile: kRows packed rows from row0, `tokens` tokens from token0; tile `index` of `count`, part `split` of
// `splits` of K.
struct TilePlace {
    int row0, token0, tokens, index, count, split, splits;
};

// Which row of x and y a token is: itself.
struct InOrder {
    LLMCTL_METHOD long long x(int token) const { return token; }
    LLMCTL_METHOD long long y(int token) const { return token; }
};

template <typename T, int kRows, typename Sum, typename Rows>
LLMCTL_DEVICE void write_outputs(const Tail<T>& tail, const TilePlace& place, Sum sum, const Rows& rows) {
    const bool gated = tail.activation != kPlain;
    const int width = gated ? kRows / 2 : kRows;  // a power of two
    const int shift = population_count(static_cast<u32>(width - 1));
    const int outputs = gated ? tail.n / 2 : tail.n;
    const int first = gated ? place.row0 / 2 : place.row0;
    for (int i = thread_index(); i < place.tokens << shift; i += block_size()) {
        const int token = i >> shift;
        const int column = i & (width - 1);
        const int n = first + column;
        if (n >= outputs) continue;
        const int row = gated ? column / 8 * 16 + column % 8 : column;
        const float scale = tail.token_scales ? tail.token_scales[place.token0 + token] : 1.0f;
        float v = sum(token, row) * scale;
        if (tail.bias) v += to_float(tail.bias[n]);
        if (gated) {
            float up = sum(token, row + 8) * scale;
            if (tail.bias) up += to_float(tail.bias[n + outputs]);
            v = activate(tail.activation, v) * up;
        }
        const long long at = rows.y(place.token0 + token) * outputs + n;
        if (tail.residual) v += to_float(tail.residual[at]);
        tail.y[at] = from_float<T>(v);
    }
}

// From the parts in shared memory, f32 [kTokens][kStride] every part_stride floats, to y. All threads of the block come
// here, the parts written and a block_sync behind them.
template <typename T, int kRows, int kTokens, int kStride, typename Rows = InOrder>
LLMCTL_DEVICE void finish(const Tail<T>& tail, const TilePlace& place, float* parts, int count, int part_stride,
                          const Rows& rows = Rows()) {
    const auto local = [&](int token, int row) {
        float v = parts[token * kStride + row];
        for (int part = 1; part < count; ++part) v += parts[part * part_stride + token * kStride + row];
        return v;
    };
    if (place.splits == 1) {
        write_outputs<T, kRows>(tail, place, local, rows);
        return;
    }
    constexpr int kTile = kRows * kTokens;
    float* const mine = tail.workspace + (static_cast<long long>(place.split) * place.count + place.index) * kTile;
    for (int i = thread_index(); i < place.tokens * kRows; i += block_size()) mine[i] = local(i / kRows, i % kRows);
    device_fence();
    block_sync();
    if (thread_index() == 0) {
        device_fence();
        const u32 before = atomic_add(&tail.counters[place.index], 1u);
        parts[0] = before == static_cast<u32>(place.splits - 1) ? 1.0f : 0.0f;
    }
    block_sync();
    if (parts[0] == 0.0f) return;
    device_fence();
    if (thread_index() == 0) tail.counters[place.index] = 0;
    const float* const all = tail.workspace + static_cast<long long>(place.index) * kTile;
    const long long stride = static_cast<long long>(place.count) * kTile;
    write_outputs<T, kRows>(tail, place, [&](int token, int row) {
        float v = 0.0f;
        for (int split = 0; split < place.splits; ++split) v += all[split * stride + token * kRows + row];
        return v;
    }, rows);
}

}  // namespace gemm
}  // namespace llmctl
