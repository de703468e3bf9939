// RMSNorm and LayerNorm, with optional residual add and optional int8 output. One block a row, 8 elements a load.
//
//   sum = x + residual                                    (rounded to T; add_… only)
//   rms_norm    y = sum / sqrt(mean(sum^2) + eps) * (w, or 1 + w)
//   layer_norm  y = (sum - mean(sum)) / sqrt(var(sum) + eps) * w + b
//   …_s8        scale = max|y| / 127 per row, y stored as the nearest integer to y / scale
//
// Shapes: x, residual, sum, y [rows, hidden] contiguous, w, b [hidden], all T, b may be null; int8: q s8 [rows, hidden]
// in place of y, scales f32 [rows]. hidden % 8 == 0; every pointer a multiple of 16 bytes (q: of 8).
// Grid: rows blocks of 256 threads. `y` may alias `x`, and `sum` may alias `residual`: a thread touches only its own
// elements. Bound: 2 reads and 2 writes of T per element (1 and 1 without the add); a row is read again from L1 for
// every further pass (one for rms_norm, two for layer_norm, one more for int8).
// Numbers, sm_90: 32 to 40 registers (head_rms_norm: 32 to 50), 8 (10) blocks of 256 (128) threads an SM; 7 flops an
// element are nothing. On an H200 at 4.3 TB/s, 4096 rows of 4096, 1 to 2 us of ramp expected on top: rms_norm 67 MB,
// 15.6 us; add_rms_norm 134 MB, 31.2 us; add_rms_norm_s8 117 MB, 27.3 us. One row is a launch, 2 to 3 us.
//
// head_rms_norm: the same over each head of x [rows, heads * head_dim], one warp a head, in place or into y. Rows are
// x_stride and y_stride elements apart, so that q or k may lie inside a merged qkv row. head_dim and both strides % 8
// == 0. Grid: ceil(rows * heads / 4) blocks of 128 threads.
#include "device.cuh"

namespace llmctl {
namespace norm {

constexpr int kThreads = 256;
constexpr int kVector = 8;
constexpr int kHeadThreads = 128;

// y = (x - mean) * inverse * (offset + w) + b for eight elements.
template <typename T>
struct Normalise {
    const T* w;
    const T* b;
    float mean, inverse, offset;

    LLMCTL_METHOD void operator()(const Vec16& v, int column, float (&y)[kVector]) const {
        const Vec16 g = load16_const(w + column);
        Vec16 shift = {};
        if (b) shift = load16_const(b + column);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float scaled = (lane16<T>(v, j) - mean) * inverse * (offset + lane16<T>(g, j));
            y[j] = b ? scaled + lane16<T>(shift, j) : scaled;
        }
    }
};

// First column of this thread in a pass over a row, and the step to its next.
LLMCTL_DEVICE int first_column() { return thread_index() * kVector; }
constexpr int kStep = kThreads * kVector;

// x, or x + residual, which is also written to sum; returns the sum of squares, or of the elements, in this thread.
template <typename T, bool kAdd, bool kSquares>
LLMCTL_DEVICE float read_row(const T* x, const T* residual, T* sum, int hidden) {
    float total = 0.0f;
    for (int i = first_column(); i < hidden; i += kStep) {
        Vec16 v = load16(x + i);
        if (kAdd) {
            const Vec16 r = load16(residual + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                v.w[j] = pack16<T>(lane16<T>(v, 2 * j) + lane16<T>(r, 2 * j),
                                   lane16<T>(v, 2 * j + 1) + lane16<T>(r, 2 * j + 1));
            }
            store16(sum + i, v);
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float value = lane16<T>(v, j);
            total = kSquares ? fused_multiply_add(value, value, total) : total + value;
        }
    }
    return total;
}

template <typename T>
LLMCTL_DEVICE float squared_deviations(const T* row, float mean, int hidden) {
    float total = 0.0f;
    for (int i = first_column(); i < hidden; i += kStep) {
        const Vec16 v = load16(row + i);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float value = lane16<T>(v, j) - mean;
            total = fused_multiply_add(value, value, total);
        }
    }
    return total;
}

template <typename T>
LLMCTL_DEVICE void store_row(const T* row, T* y, const Normalise<T>& normalise, int hidden) {
    for (int i = first_column(); i < hidden; i += kStep) {
        float out[kVector];
        normalise(load16(row + i), i, out);
        Vec16 packed;
#pragma unroll
        for (int j = 0; j < 4; ++j) packed.w[j] = pack16<T>(out[2 * j], out[2 * j + 1]);
        store16(y + i, packed);
    }
}

template <typename T>
LLMCTL_DEVICE void store_row_s8(const T* row, s8* q, float* scale, const Normalise<T>& normalise, int hidden,
                                float* scratch) {
    float most = 0.0f;
    for (int i = first_column(); i < hidden; i += kStep) {
        float out[kVector];
        normalise(load16(row + i), i, out);
#pragma unroll
        for (int j = 0; j < kVector; ++j) most = fmaxf(most, fabsf(out[j]));
    }
    most = block_max<kThreads>(most, scratch);
    const float steps = most > 0.0f ? 127.0f / most : 0.0f;
    if (thread_index() == 0) *scale = most / 127.0f;
    for (int i = first_column(); i < hidden; i += kStep) {
        float out[kVector];
        normalise(load16(row + i), i, out);
        Vec8 packed;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            packed.w[j] = pack_s8(out[4 * j] * steps, out[4 * j + 1] * steps, out[4 * j + 2] * steps,
                                  out[4 * j + 3] * steps);
        }
        store8(q + i, packed);
    }
}

// What all entries take; absent pointers are null.
template <typename T>
struct Row {
    const T *x, *residual, *w, *b;
    T *y, *sum;
    s8* q;
    float* scales;
    int hidden;
    float eps;
    float offset;
};

constexpr int kScratch = 3 * (kThreads / kWarp);

template <typename T, bool kAdd, bool kCentre, bool kInt8>
LLMCTL_DEVICE void normalise_row(const Row<T>& p, float* scratch) {
    const long long base = static_cast<long long>(block_index()) * p.hidden;
    const T* row = kAdd ? p.sum + base : p.x + base;
    const float width = static_cast<float>(p.hidden);
    float total = read_row<T, kAdd, !kCentre>(p.x + base, kAdd ? p.residual + base : nullptr,
                                              kAdd ? p.sum + base : nullptr, p.hidden);
    total = block_sum<kThreads>(total, scratch);
    float mean = 0.0f;
    if (kCentre) {
        mean = total / width;
        total = block_sum<kThreads>(squared_deviations(row, mean, p.hidden), scratch + kThreads / kWarp);
    }
    const Normalise<T> normalise{p.w, p.b, mean, reciprocal_sqrt(total / width + p.eps), p.offset};
    if (kInt8) {
        store_row_s8(row, p.q + base, p.scales + block_index(), normalise, p.hidden, scratch + 2 * (kThreads / kWarp));
    } else {
        store_row(row, p.y + base, normalise, p.hidden);
    }
}

template <typename T>
LLMCTL_DEVICE void normalise_head(const T* x, const T* w, T* y, int rows, int heads, int head_dim, int x_stride,
                                  int y_stride, float eps, float offset) {
    const int item = block_index() * (kHeadThreads / kWarp) + warp_index();
    if (item >= rows * heads) return;
    const long long row = item / heads;
    const int column = item % heads * head_dim;
    x += row * x_stride + column;
    y += row * y_stride + column;
    float squares = 0.0f;
    for (int i = lane_index() * kVector; i < head_dim; i += kWarp * kVector) {
        const Vec16 v = load16(x + i);
#pragma unroll
        for (int j = 0; j < kVector; ++j) squares = fused_multiply_add(lane16<T>(v, j), lane16<T>(v, j), squares);
    }
    const float mean = warp_sum(squares) / static_cast<float>(head_dim);
    const Normalise<T> normalise{w, nullptr, 0.0f, reciprocal_sqrt(mean + eps), offset};
    for (int i = lane_index() * kVector; i < head_dim; i += kWarp * kVector) {
        float out[kVector];
        normalise(load16(x + i), i, out);
        Vec16 packed;
#pragma unroll
        for (int j = 0; j < 4; ++j) packed.w[j] = pack16<T>(out[2 * j], out[2 * j + 1]);
        store16(y + i, packed);
    }
}

LLMCTL_DEVICE float offset_of(int plus_one) { return plus_one ? 1.0f : 0.0f; }

}  // namespace norm
}  // namespace llmctl

#define LLMCTL_NORM_BODY(T, ADD, CENTRE, INT8, ...)                                  \
    {                                                                                \
        __shared__ float scratch[llmctl::norm::kScratch];                            \
        const llmctl::norm::Row<llmctl::T> row{__VA_ARGS__};                         \
        llmctl::norm::normalise_row<llmctl::T, ADD, CENTRE, INT8>(row, scratch);     \
    }
#define LLMCTL_NORM_KERNEL LLMCTL_KERNEL(llmctl::norm::kThreads, 4)

#define LLMCTL_NORMS(T)                                                                                               \
    LLMCTL_NORM_KERNEL rms_norm_##T(const llmctl::T* x, const llmctl::T* w, llmctl::T* y, int hidden, float eps,      \
                                    int plus_one)                                                                     \
    LLMCTL_NORM_BODY(T, false, false, false, x, nullptr, w, nullptr, y, nullptr, nullptr, nullptr, hidden, eps,       \
                     llmctl::norm::offset_of(plus_one))                                                               \
    LLMCTL_NORM_KERNEL rms_norm_s8_##T(const llmctl::T* x, const llmctl::T* w, s8* q, float* scales, int hidden,      \
                                       float eps, int plus_one)                                                       \
    LLMCTL_NORM_BODY(T, false, false, true, x, nullptr, w, nullptr, nullptr, nullptr, q, scales, hidden, eps,         \
                     llmctl::norm::offset_of(plus_one))                                                               \
    LLMCTL_NORM_KERNEL add_rms_norm_##T(const llmctl::T* x, const llmctl::T* residual, const llmctl::T* w,            \
                                        llmctl::T* y, llmctl::T* sum, int hidden, float eps, int plus_one)            \
    LLMCTL_NORM_BODY(T, true, false, false, x, residual, w, nullptr, y, sum, nullptr, nullptr, hidden, eps,           \
                     llmctl::norm::offset_of(plus_one))                                                               \
    LLMCTL_NORM_KERNEL add_rms_norm_s8_##T(const llmctl::T* x, const llmctl::T* residual, const llmctl::T* w, s8* q,  \
                                           float* scales, llmctl::T* sum, int hidden, float eps, int plus_one)        \
    LLMCTL_NORM_BODY(T, true, false, true, x, residual, w, nullptr, nullptr, sum, q, scales, hidden, eps,             \
                     llmctl::norm::offset_of(plus_one))                                                               \
    LLMCTL_NORM_KERNEL layer_norm_##T(const llmctl::T* x, const llmctl::T* w, const llmctl::T* b, llmctl::T* y,       \
                                      int hidden, float eps)                                                          \
    LLMCTL_NORM_BODY(T, false, true, false, x, nullptr, w, b, y, nullptr, nullptr, nullptr, hidden, eps, 0.0f)        \
    LLMCTL_NORM_KERNEL layer_norm_s8_##T(const llmctl::T* x, const llmctl::T* w, const llmctl::T* b, s8* q,           \
                                         float* scales, int hidden, float eps)                                        \
    LLMCTL_NORM_BODY(T, false, true, true, x, nullptr, w, b, nullptr, nullptr, q, scales, hidden, eps, 0.0f)          \
    LLMCTL_NORM_KERNEL add_layer_norm_##T(const llmctl::T* x, const llmctl::T* residual, const llmctl::T* w,          \
                                          const llmctl::T* b, llmctl::T* y, llmctl::T* sum, int hidden, float eps)    \
    LLMCTL_NORM_BODY(T, true, true, false, x, residual, w, b, y, sum, nullptr, nullptr, hidden, eps, 0.0f)            \
    LLMCTL_NORM_KERNEL add_layer_norm_s8_##T(const llmctl::T* x, const llmctl::T* residual, const llmctl::T* w,       \
                                             const llmctl::T* b, s8* q, float* scales, llmctl::T* sum, int hidden,    \
                                             float eps)                                                               \
    LLMCTL_NORM_BODY(T, true, true, true, x, residual, w, b, nullptr, sum, q, scales, hidden, eps, 0.0f)              \
    LLMCTL_KERNEL(llmctl::norm::kHeadThreads, 8)                                                                      \
    head_rms_norm_##T(const llmctl::T* x, const llmctl::T* w, llmctl::T* y, int rows, int heads, int head_dim,        \
                      int x_stride, int y_stride, float eps, int plus_one) {                                          \
        llmctl::norm::normalise_head<llmctl::T>(x, w, y, rows, heads, head_dim, x_stride, y_stride, eps,              \
                                                llmctl::norm::offset_of(plus_one));                                   \
    }

LLMCTL_NORMS(f16)
LLMCTL_NORMS(bf16)
