// Activations to int8 with a scale per row, the input of a w8a8 linear; one block a row, 8 elements a load.
//
//   quantize_s8    y = x                  x [rows, width]
//   <fn>_mul_s8    y = fn(gate) * up      x [rows, 2 * width], gate in the first half of a row, up in the second
//   scale = max|y| / 127 per row, q the nearest integer to y / scale
//
// x T, contiguous; q s8 [rows, width]; scales f32 [rows]. width % 8 == 0; x a multiple of 16 bytes, q of 8.
// (After a norm, norm.cu's …_s8 entries do this in the norm itself.) Grid: rows blocks of 256 threads.
// Bound: one read of T and one write of a byte per element; the second read of a row comes from L1.
// Numbers, sm_90: 32 to 55 registers, 4 to 8 blocks an SM. On an H200 at 4.3 TB/s, 4096 rows of 14336: 176 MB, 41 us; a
// row is read twice by one block, of which only 28 KB fit beside its neighbours' in L1: 45 to 55 us expected.
#include "activation.cuh"

namespace llmctl {
namespace quantize_rows {

constexpr int kThreads = 256;
constexpr int kVector = 8;

struct identity {};

// Elements column .. column + 7 of y.
template <typename T, typename Fn>
struct Source {
    const T* row;
    int width;

    LLMCTL_METHOD void operator()(int column, float (&y)[kVector]) const {
        const Vec16 gate = load16_const(row + column);
        const Vec16 up = load16_const(row + width + column);
#pragma unroll
        for (int j = 0; j < kVector; ++j) y[j] = Fn()(lane16<T>(gate, j)) * lane16<T>(up, j);
    }
    static constexpr int kParts = 2;
};

template <typename T>
struct Source<T, identity> {
    const T* row;
    int width;

    LLMCTL_METHOD void operator()(int column, float (&y)[kVector]) const {
        const Vec16 v = load16_const(row + column);
#pragma unroll
        for (int j = 0; j < kVector; ++j) y[j] = lane16<T>(v, j);
    }
    static constexpr int kParts = 1;
};

template <typename T, typename Fn>
LLMCTL_DEVICE void quantize(const T* x, s8* q, float* scales, int width, float* scratch) {
    const long long r = block_index();
    const Source<T, Fn> source{x + r * width * Source<T, Fn>::kParts, width};
    q += r * width;
    float most = 0.0f;
    for (int i = thread_index() * kVector; i < width; i += kThreads * kVector) {
        float y[kVector];
        source(i, y);
#pragma unroll
        for (int j = 0; j < kVector; ++j) most = fmaxf(most, fabsf(y[j]));
    }
    most = block_max<kThreads>(most, scratch);
    const float steps = most > 0.0f ? 127.0f / most : 0.0f;
    if (thread_index() == 0) scales[r] = most / 127.0f;
    for (int i = thread_index() * kVector; i < width; i += kThreads * kVector) {
        float y[kVector];
        source(i, y);
        Vec8 packed;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            packed.w[j] = pack_s8(y[4 * j] * steps, y[4 * j + 1] * steps, y[4 * j + 2] * steps, y[4 * j + 3] * steps);
        }
        store8(q + i, packed);
    }
}

}  // namespace quantize_rows
}  // namespace llmctl

#define LLMCTL_QUANTIZE(NAME, T, FN)                                                               \
    LLMCTL_KERNEL(llmctl::quantize_rows::kThreads, 4)                                              \
    NAME##_##T(const llmctl::T* x, s8* q, float* scales, int width) {                              \
        __shared__ float scratch[llmctl::quantize_rows::kThreads / llmctl::kWarp];                 \
        llmctl::quantize_rows::quantize<llmctl::T, llmctl::FN>(x, q, scales, width, scratch);      \
    }

#define LLMCTL_QUANTIZE_ALL(T)                                  \
    LLMCTL_QUANTIZE(quantize_s8, T, quantize_rows::identity)    \
    LLMCTL_QUANTIZE(silu_mul_s8, T, activation::silu)           \
    LLMCTL_QUANTIZE(gelu_mul_s8, T, activation::gelu)           \
    LLMCTL_QUANTIZE(gelu_tanh_mul_s8, T, activation::gelu_tanh) \
    LLMCTL_QUANTIZE(relu_mul_s8, T, activation::relu)

LLMCTL_QUANTIZE_ALL(f16)
LLMCTL_QUANTIZE_ALL(bf16)
