// Packed codes -> dense 16-bit weights in scratch, for a product of many rows with cuBLAS; and the gather of x's
// columns that an act-order weight (columns sorted by group) needs in front of every kernel.
//
// dequantize_w<bits>_<T>   w[n, k] = (code - zero) * scale, rounded once; w [N, K] in logical rows (gate, then up) and
//                          packed column order. Grid (tiles, steps), 128 threads: a warp a chunk of 32 x 32.
//                          k % 8 == 0; w a multiple of 16 bytes.
// dequantize_book4_<T>     the same of w[n, k] = book[code] * scale; book f32 [16].
// dequantize_fp8_<T>       the same of w[n, k] = float8(code) * scale; no zeros.
// dequantize_k<bits>_<T>   the same of w[n, k] = code * scale + minimum, in groups of 16 or 32; see Minimums.
// permute_columns_<T>      y[m, k] = x[m, permutation[k]]. Grid ceil(m k / 256), 256 threads.
//
// A lane holds eight neighbouring columns of four rows: 16-byte stores, 64 bytes a row and warp, 256 a row and block.
// Bound: 2.5 bytes a 4-bit weight, 2 of them writes. Llama-3-8B gate/up (28672 x 4096) on an H200 at 4.3 TB/s: 294 MB,
// 68 us, against 2 * 28672 * 4096 * m / 780e12 = 0.3 us a row for the product: 22% of it at m = 1024.
#include "dequant.cuh"

namespace llmctl {
namespace gemm {

constexpr int kDequantThreads = kStepChunks * kWarp;
constexpr int kPermuteThreads = 256;

// book: f32 [16], where codes are of one; else null. Values: NoBook, Float8, or Book<T>.
template <typename T, int kBits, typename Values>
LLMCTL_DEVICE void dequantize(const u8* codes, const f16* scales, const u8* zeros, const float* book, T* w, int n,
                              int k, int group_size, int gated) {
    constexpr bool kBook = kHasBook<Values>;
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    const int chunks = (k + kStepColumns - 1) / kStepColumns * kStepChunks;
    const int groups = (chunks * kChunkColumns + group_size - 1) / group_size;
    const int chunk = block_index_y() * kStepChunks + warp_index();
    const long long tile = block_index();
    const int column = chunk * kChunkColumns + t * 8;
    if (column >= k) return;
    Codes<kBits> mine;
#pragma unroll
    for (int v = 0; v < Codes<kBits>::kVectors; ++v) {
        mine.vector[v] = load16_stream(codes + (tile * chunks + chunk) * Codes<kBits>::kBytes +
                                       (v * kWarp + lane) * 16);
    }
    const long long at = (tile * groups + chunk * kChunkColumns / group_size) * kTileRows + g * 4;
    const u32 zero_word = zeros ? *reinterpret_cast<const u32*>(zeros + at) : kSymmetricZeros<kBits>;
    float scale[4];
    unpack_scales(scale, load8(scales + at));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        u32 a[2][4] = {};
        if constexpr (!kBook) {
            const ZeroPair zero = zero_pair<T, kBits>(zero_word, r);
#pragma unroll
            for (int s = 0; s < 2; ++s) fragment<T, kBits>(a[s], mine, r, s, zero, Values{});
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Vec16 exact{{a[0][h], a[0][h + 2], a[1][h], a[1][h + 2]}};
            const auto value = [&](int i) {
                if constexpr (kBook) {
                    return book[code_at(mine, r, h, i)];  // not the tables of the products, which round to T
                } else {
                    return lane16<T>(exact, i);
                }
            };
            Vec16 out;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                out.w[i] = pack16<T>(value(2 * i) * scale[2 * r + h], value(2 * i + 1) * scale[2 * r + h]);
            }
            const int half = block_index() * (kTileRows / 2) + 8 * r + g;
            const int row = gated ? half + h * (n / 2) : block_index() * kTileRows + 16 * r + 8 * h + g;
            if (gated ? half < n / 2 : row < n) store16(w + static_cast<long long>(row) * k + column, out);
        }
    }
}

// A lane holds four neighbouring columns of either half of a chunk, of four rows: 8-byte stores.
template <typename T, int kBits>
LLMCTL_DEVICE void dequantize_minimums(const u8* codes, const f16* scales, const Minimums& minimums, T* w, int n,
                                       int k, int group_size, int gated) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    const int chunks = (k + kStepColumns - 1) / kStepColumns * kStepChunks;
    const int groups = (chunks * kChunkColumns + group_size - 1) / group_size;
    const int chunk = block_index_y() * kStepChunks + warp_index();
    const long long tile = block_index();
    Codes<kBits> mine;
#pragma unroll
    for (int v = 0; v < Codes<kBits>::kVectors; ++v) {
        mine.vector[v] = load16_stream(codes + (tile * chunks + chunk) * Codes<kBits>::kBytes +
                                       (v * kWarp + lane) * 16);
    }
    const ZeroPair zero = zero_pair<T, kBits>(zeros_beside<kBits>(minimums), 0);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const int column = chunk * kChunkColumns + 16 * s + 4 * t;
        if (column >= k) continue;
        const long long at = (tile * groups + column / group_size) * kTileRows + g * 4;
        float scale[4], minimum[4] = {};
        unpack_scales(scale, load8(scales + at));
        if (minimums.plane) unpack_scales(minimum, load8(minimums.plane + at));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 a[4];
            fragment<T, kBits>(a, mine, r, s, zero, minimums);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const Vec16 exact{{a[h], a[h + 2], 0, 0}};
                const float by = scale[2 * r + h], more = minimum[2 * r + h];
                Vec8 out;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    out.w[i] = pack16<T>(fused_multiply_add(lane16<T>(exact, 2 * i), by, more),
                                         fused_multiply_add(lane16<T>(exact, 2 * i + 1), by, more));
                }
                const int half = block_index() * (kTileRows / 2) + 8 * r + g;
                const int row = gated ? half + h * (n / 2) : block_index() * kTileRows + 16 * r + 8 * h + g;
                if (gated ? half < n / 2 : row < n) store8(w + static_cast<long long>(row) * k + column, out);
            }
        }
    }
}

template <typename T>
LLMCTL_DEVICE void permute_columns(const T* x, const int* permutation, T* y, int m, int k) {
    const long long item = static_cast<long long>(block_index()) * kPermuteThreads + thread_index();
    if (item >= static_cast<long long>(m) * k) return;
    const long long row = item / k;
    y[item] = x[row * k + permutation[item - row * k]];
}

}  // namespace gemm
}  // namespace llmctl

#define LLMCTL_DEQUANTIZE(T, BITS)                                                                                    \
    LLMCTL_KERNEL(llmctl::gemm::kDequantThreads, 8)                                                                   \
    dequantize_w##BITS##_##T(const u8* codes, const llmctl::f16* scales, const u8* zeros, llmctl::T* w, int n, int k, \
                             int group_size, int gated) {                                                             \
        llmctl::gemm::dequantize<llmctl::T, BITS, llmctl::gemm::NoBook>(codes, scales, zeros, nullptr, w, n, k,       \
                                                                        group_size, gated);                           \
    }

#define LLMCTL_DEQUANTIZE_FLOAT8(T)                                                                                   \
    LLMCTL_KERNEL(llmctl::gemm::kDequantThreads, 8)                                                                   \
    dequantize_fp8_##T(const u8* codes, const llmctl::f16* scales, const u8* zeros, llmctl::T* w, int n, int k,       \
                       int group_size, int gated) {                                                                   \
        llmctl::gemm::dequantize<llmctl::T, 8, llmctl::gemm::Float8>(codes, scales, zeros, nullptr, w, n, k,          \
                                                                     group_size, gated);                              \
    }

#define LLMCTL_DEQUANTIZE_MINIMUMS(T, BITS)                                                                           \
    LLMCTL_KERNEL(llmctl::gemm::kDequantThreads, 8)                                                                   \
    dequantize_k##BITS##_##T(const u8* codes, const llmctl::f16* scales, const llmctl::f16* minimums, llmctl::T* w,   \
                             int n, int k, int group_size, int gated) {                                               \
        llmctl::gemm::dequantize_minimums<llmctl::T, BITS>(codes, scales, llmctl::gemm::Minimums{minimums}, w, n, k,  \
                                                           group_size, gated);                                        \
    }

#define LLMCTL_DEQUANTIZE_BOOK(T)                                                                                     \
    LLMCTL_KERNEL(llmctl::gemm::kDequantThreads, 8)                                                                   \
    dequantize_book4_##T(const u8* codes, const llmctl::f16* scales, const float* book, llmctl::T* w, int n, int k,   \
                         int group_size, int gated) {                                                                 \
        llmctl::gemm::dequantize<llmctl::T, 4, llmctl::gemm::Book<llmctl::T>>(codes, scales, nullptr, book, w, n, k,  \
                                                                              group_size, gated);                     \
    }

#define LLMCTL_PERMUTE(T)                                                                                             \
    LLMCTL_KERNEL(llmctl::gemm::kPermuteThreads, 8)                                                                   \
    permute_columns_##T(const llmctl::T* x, const int* permutation, llmctl::T* y, int m, int k) {                     \
        llmctl::gemm::permute_columns<llmctl::T>(x, permutation, y, m, k);                                            \
    }

LLMCTL_DEQUANTIZE(f16, 4)
LLMCTL_DEQUANTIZE(f16, 8)
LLMCTL_DEQUANTIZE(bf16, 4)
LLMCTL_DEQUANTIZE(bf16, 8)
LLMCTL_DEQUANTIZE_FLOAT8(f16)
LLMCTL_DEQUANTIZE_FLOAT8(bf16)
LLMCTL_DEQUANTIZE_MINIMUMS(f16, 4)
LLMCTL_DEQUANTIZE_MINIMUMS(f16, 8)
LLMCTL_DEQUANTIZE_MINIMUMS(bf16, 4)
LLMCTL_DEQUANTIZE_MINIMUMS(bf16, 8)
LLMCTL_DEQUANTIZE_BOOK(f16)
LLMCTL_DEQUANTIZE_BOOK(bf16)
LLMCTL_PERMUTE(f16)
LLMCTL_PERMUTE(bf16)
