// Activations, gated activations, sums, products, and rows by index. A thread makes 8 elements; computed in fp32.
//
//   act_<fn>   y = fn(x)                  x, y [rows, width]
//   <fn>_mul   y = fn(gate) * up          x [rows, 2 * width], gate in the first half of a row, up in the second
//   add, mul   z = x + y, x * y           [rows, width]
//   embed      y = w[ids] * scale         ids i64 [rows], w [table rows, width]; with scale 1 also gather_rows
//   pos_embed  z = x + w[positions + offset]
//
// fn: silu, gelu (erf), gelu_tanh, relu. All T and contiguous; width % 8 == 0; pointers multiples of 16 bytes; the
// output of act, add, mul and pos_embed may alias an input. Grid: ceil(rows * width / 8 / 256) blocks of 256 threads.
// Bound: the bytes read and written, each once.
//
// Numbers, sm_90: 24 to 48 registers, 5 to 8 blocks an SM, 16 or 32 bytes a lane on their way: 40 KB an SM and more.
// On an H200 at 4.3 TB/s: silu_mul, 4096 rows of 14336: 352 MB, 82 us, 84 expected; add, 4096 rows of 4096: 101 MB,
// 23.4 us. An exponential and a division an element are 0.06 G of each: 30 us of the SMs' special units, beneath the loads.
#include "activation.cuh"

namespace llmctl {
namespace elementwise {

constexpr int kThreads = 256;
constexpr int kVector = 8;

// Where this thread's elements are: `row` is -1 past the end.
struct Place {
    long long row;
    int column;
};

LLMCTL_DEVICE Place place(int rows, int width) {
    const long long item = static_cast<long long>(block_index()) * kThreads + thread_index();
    const int per_row = width / kVector;
    if (item >= static_cast<long long>(rows) * per_row) return Place{-1, 0};
    return Place{item / per_row, static_cast<int>(item % per_row) * kVector};
}

// z[j] = f(x[j], y[j]) for eight elements.
template <typename T, typename F>
LLMCTL_DEVICE Vec16 combine(const Vec16& x, const Vec16& y, F f) {
    Vec16 z;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        z.w[j] = pack16<T>(f(lane16<T>(x, 2 * j), lane16<T>(y, 2 * j)),
                           f(lane16<T>(x, 2 * j + 1), lane16<T>(y, 2 * j + 1)));
    }
    return z;
}

template <typename Fn>
struct FirstOnly {
    LLMCTL_METHOD float operator()(float a, float) const { return Fn()(a); }
};
template <typename Fn>
struct Gated {
    LLMCTL_METHOD float operator()(float a, float b) const { return Fn()(a) * b; }
};
struct Sum {
    LLMCTL_METHOD float operator()(float a, float b) const { return a + b; }
};
struct Product {
    LLMCTL_METHOD float operator()(float a, float b) const { return a * b; }
};
struct Scaled {
    float scale;
    LLMCTL_METHOD float operator()(float a, float) const { return a * scale; }
};

template <typename T, typename Fn>
LLMCTL_DEVICE void activate(const T* x, T* y, int rows, int width) {
    const Place p = place(rows, width);
    if (p.row < 0) return;
    const Vec16 v = load16(x + p.row * width + p.column);
    store16(y + p.row * width + p.column, combine<T>(v, v, FirstOnly<Fn>()));
}

template <typename T, typename Fn>
LLMCTL_DEVICE void gate(const T* x, T* y, int rows, int width) {
    const Place p = place(rows, width);
    if (p.row < 0) return;
    const T* from = x + p.row * 2 * width + p.column;
    store16(y + p.row * width + p.column, combine<T>(load16_const(from), load16_const(from + width), Gated<Fn>()));
}

template <typename T, typename F>
LLMCTL_DEVICE void zip(const T* x, const T* y, T* z, int rows, int width, F f) {
    const Place p = place(rows, width);
    if (p.row < 0) return;
    const long long at = p.row * width + p.column;
    store16(z + at, combine<T>(load16(x + at), load16(y + at), f));
}

template <typename T>
LLMCTL_DEVICE void embed(const long long* ids, const T* w, T* y, int rows, int width, float scale) {
    const Place p = place(rows, width);
    if (p.row < 0) return;
    const Vec16 v = load16_const(w + ids[p.row] * width + p.column);
    store16(y + p.row * width + p.column, combine<T>(v, v, Scaled{scale}));
}

template <typename T>
LLMCTL_DEVICE void add_position(const T* x, const long long* positions, const T* w, T* z, int rows, int width,
                                int offset) {
    const Place p = place(rows, width);
    if (p.row < 0) return;
    const Vec16 v = load16_const(w + (positions[p.row] + offset) * width + p.column);
    const long long at = p.row * width + p.column;
    store16(z + at, combine<T>(load16(x + at), v, Sum()));
}

}  // namespace elementwise
}  // namespace llmctl

#define LLMCTL_ELEMENTWISE LLMCTL_KERNEL(llmctl::elementwise::kThreads, 4)
#define LLMCTL_ACTIVATION(T, FN)                                                                       \
    LLMCTL_ELEMENTWISE act_##FN##_##T(const llmctl::T* x, llmctl::T* y, int rows, int width) {         \
        llmctl::elementwise::activate<llmctl::T, llmctl::activation::FN>(x, y, rows, width);          \
    }                                                                                                  \
    LLMCTL_ELEMENTWISE FN##_mul_##T(const llmctl::T* x, llmctl::T* y, int rows, int width) {           \
        llmctl::elementwise::gate<llmctl::T, llmctl::activation::FN>(x, y, rows, width);              \
    }

#define LLMCTL_ELEMENTWISE_ALL(T)                                                                                    \
    LLMCTL_ACTIVATION(T, silu)                                                                                       \
    LLMCTL_ACTIVATION(T, gelu)                                                                                       \
    LLMCTL_ACTIVATION(T, gelu_tanh)                                                                                  \
    LLMCTL_ACTIVATION(T, relu)                                                                                       \
    LLMCTL_ELEMENTWISE add_##T(const llmctl::T* x, const llmctl::T* y, llmctl::T* z, int rows, int width) {          \
        llmctl::elementwise::zip(x, y, z, rows, width, llmctl::elementwise::Sum());                                  \
    }                                                                                                                \
    LLMCTL_ELEMENTWISE mul_##T(const llmctl::T* x, const llmctl::T* y, llmctl::T* z, int rows, int width) {          \
        llmctl::elementwise::zip(x, y, z, rows, width, llmctl::elementwise::Product());                              \
    }                                                                                                                \
    LLMCTL_ELEMENTWISE embed_##T(const long long* ids, const llmctl::T* w, llmctl::T* y, int rows, int width,        \
                                 float scale) {                                                                      \
        llmctl::elementwise::embed(ids, w, y, rows, width, scale);                                                   \
    }                                                                                                                \
    LLMCTL_ELEMENTWISE pos_embed_##T(const llmctl::T* x, const long long* positions, const llmctl::T* w,             \
                                     llmctl::T* z, int rows, int width, int offset) {                                \
        llmctl::elementwise::add_position(x, positions, w, z, rows, width, offset);                                  \
    }

LLMCTL_ELEMENTWISE_ALL(f16)
LLMCTL_ELEMENTWISE_ALL(bf16)
