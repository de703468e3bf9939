// RMSNorm with an optional fused residual add. One block a row, 8 elements a load.
//
//   sum = x + residual          (rounded to T; add_rms_norm only)
//   y   = sum / sqrt(mean(sum^2) + eps) * (w, or 1 + w)
//
// Shapes: x, residual, sum, y [rows, hidden] contiguous, w [hidden], all T; hidden % 8 == 0; every pointer a multiple
// of 16 bytes. Grid: rows blocks of 256 threads. `y` may alias `x` and `sum` may alias `residual`: a thread touches
// only its own elements. Bound: 2 reads and 2 writes of T per element (1 and 1 without the add).
#include "device.cuh"

namespace llmctl {
namespace norm {

constexpr int kThreads = 256;
constexpr int kVector = 8;

template <typename T, bool kAdd>
LLMCTL_DEVICE void row(const T* x, const T* residual, const T* w, T* y, T* sum, int hidden, float eps, int plus_one,
                       float* scratch) {
    const long long base = static_cast<long long>(block_index()) * hidden;
    float squares = 0.0f;
    for (int i = thread_index() * kVector; i < hidden; i += kThreads * kVector) {
        Vec16 v = load16(x + base + i);
        if (kAdd) {
            const Vec16 r = load16(residual + base + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                v.w[j] = pack16<T>(lane16<T>(v, 2 * j) + lane16<T>(r, 2 * j),
                                   lane16<T>(v, 2 * j + 1) + lane16<T>(r, 2 * j + 1));
            }
            store16(sum + base + i, v);
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) squares = fused_multiply_add(lane16<T>(v, j), lane16<T>(v, j), squares);
    }
    const float mean = block_sum<kThreads>(squares, scratch) / static_cast<float>(hidden);
    const float inverse = reciprocal_sqrt(mean + eps);
    const float offset = plus_one ? 1.0f : 0.0f;
    const T* normed = kAdd ? sum : x;
    for (int i = thread_index() * kVector; i < hidden; i += kThreads * kVector) {
        const Vec16 v = load16(normed + base + i);
        const Vec16 g = load16_const(w + i);
        Vec16 out;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            out.w[j] = pack16<T>(lane16<T>(v, 2 * j) * inverse * (offset + lane16<T>(g, 2 * j)),
                                 lane16<T>(v, 2 * j + 1) * inverse * (offset + lane16<T>(g, 2 * j + 1)));
        }
        store16(y + base + i, out);
    }
}

}  // namespace norm
}  // namespace llmctl

#define LLMCTL_NORM(T)                                                                                                \
    LLMCTL_KERNEL(llmctl::norm::kThreads, 4)                                                                          \
    rms_norm_##T(const llmctl::T* x, const llmctl::T* w, llmctl::T* y, int hidden, float eps, int plus_one) {         \
        __shared__ float scratch[llmctl::norm::kThreads / llmctl::kWarp];                                             \
        llmctl::norm::row<llmctl::T, false>(x, nullptr, w, y, nullptr, hidden, eps, plus_one, scratch);               \
    }                                                                                                                 \
    LLMCTL_KERNEL(llmctl::norm::kThreads, 4)                                                                          \
    add_rms_norm_##T(const llmctl::T* x, const llmctl::T* residual, const llmctl::T* w, llmctl::T* y, llmctl::T* sum, \
                     int hidden, float eps, int plus_one) {                                                           \
        __shared__ float scratch[llmctl::norm::kThreads / llmctl::kWarp];                                             \
        llmctl::norm::row<llmctl::T, true>(x, residual, w, y, sum, hidden, eps, plus_one, scratch);                   \
    }

LLMCTL_NORM(f16)
LLMCTL_NORM(bf16)
