// The packed weight layout (targets/cuda/layout.py writes it) and its codes as mma operands, in registers.
//
// Tiles of 32 rows (outputs) by chunks of 32 columns; 4 chunks (128 columns) are a step, to which K is padded. Weights
// are the A operand of mma.sync (rows = outputs), tokens the B operand, so that M comes in eights. With g = lane / 4
// and t = lane % 4, lane (g, t) of a warp owns, of every chunk, rows g, g + 8, g + 16, g + 24 and columns 8t .. 8t + 7:
// the order of k within an mma is free as long as both operands agree, and in this order the B fragments of a chunk are
// 16 contiguous bytes of an activation row (8 bytes of int8): plain vector loads, no ldmatrix, no bank conflicts.
//
//   codes   [tile][chunk][vector][lane] 16 bytes: one vector of 4-bit codes, two of 8-bit codes. A fragment (r, s) is
//           rows 16 r + {g, g + 8}, columns 8t + 4 s + {0, 1, 2, 3} (r, s = 0, 1; s is the k-step of m16n8k16):
//             4 bits  word 2 r + s; nibble j: row 16 r + g + 8 (j & 1), column 8t + 4 s + 2 (j >> 1 & 1) + (j >> 2)
//             8 bits  vector r, words 2 s (row g) and 2 s + 1 (row g + 8); byte b is column 8t + 4 s + b. These four
//                     words are also the A fragment of the int8 m16n8k32.
//   scales  [tile][group][g][j] f16: row g + 8 j; a lane's four scales are one 8-byte load, a warp's 64 bytes.
//   zeros   [tile][group][g][j] u8; no plane when every zero is 2^(bits - 1).
//
// Weights of half-chunk groups (16 columns) and of minimums, GGUF's K types and Q4_1 and Q5_1 ("k4", "k8"), have the
// columns of every chunk in another order, so that a k-step's 16 are neighbours: position 8t + 4s + i is column
// 16 s + 4t + i, and the B fragments of a chunk are two pieces of 8 bytes. Their groups are of 16 or 32 columns.
//   minimums [tile][group][g][j] f16: code * scale + minimum is the weight, and codes have no zero; no plane: codes have
//            the zero 2^(bits - 1).
// A minimum is added as a product with the group's sum of x, which a further mma makes, of a matrix of ones.
//
// A gated weight (gate rows first, then up) is interleaved by eights: packed rows 16 i .. 16 i + 7 are gate rows
// 8 i .. 8 i + 7, the next eight the up rows that go with them: both lie in one lane's accumulators.
//
// Codes become 16-bit floats without an int-to-float conversion (the trick of Kim et al., "Who Says Elephants Can't
// Run", 2022, as in FasterTransformer and Marlin): a code in the low mantissa bits of 1024 (f16), 128 (bf16) or 2^23
// (float) is that number plus the code; one subtraction takes away bias and zero point. The result, code - zero, is an
// exact integer; the scale is applied to fp32 sums, once a group.
//
// Codes of a code book become its 16 values, rounded to T: two byte tables in eight registers, of low and of high bytes,
// looked up four codes at a time by byte permutes (a permute reaches eight entries, so that two and a choice are a
// lookup). A table of 16 in shared memory has no bank conflicts either, but costs a load for every code.
//
// Codes of float8 (e4m3) become their values times 2^-8, exact in T: their exponents and mantissas are shifted to where T's
// are (e4m3_bits), and of bf16 multiplied by 2^112. The scales plane has scales times 2^8.
#pragma once
#include "numeric.cuh"

namespace llmctl {
namespace gemm {

constexpr int kTileRows = 32;
constexpr int kChunkColumns = 32;
constexpr int kStepChunks = 4;
constexpr int kStepColumns = kChunkColumns * kStepChunks;

template <typename T>
constexpr bool kIsF16 = false;
template <>
constexpr bool kIsF16<f16> = true;

// (a & b) | c for lop3.
constexpr int kMaskOr = (0xF0 & 0xCC) | 0xAA;

// One lane's codes of a chunk.
template <int kBits>
struct Codes {
    static constexpr int kVectors = kBits / 4;
    static constexpr int kBytes = kVectors * 16 * kWarp;  // of the whole chunk
    Vec16 vector[kVectors];
};

// Codes are integers: nothing to look up.
struct NoBook {};

// Codes are float8's bits.
struct Float8 {};

// Codes are integers in groups of half chunks or whole ones, with minimums or, where `plane` is null, the middle zero.
struct Minimums {
    const f16* plane;
};

template <typename Values>
constexpr bool kHasMinimums = false;
template <>
constexpr bool kHasMinimums<Minimums> = true;

// The values of a code book of 16 as T: bytes 4 i .. 4 i + 3 are in word i.
template <typename T>
struct Book {
    u32 low[4], high[4];
};

template <typename Values>
constexpr bool kHasBook = false;
template <typename T>
constexpr bool kHasBook<Book<T>> = true;

// From f32 [16]; every thread has its own.
template <typename T>
LLMCTL_DEVICE Book<T> read_book(const float* values) {
    Book<T> book;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 first = pack16<T>(values[4 * i], values[4 * i + 1]);
        const u32 second = pack16<T>(values[4 * i + 2], values[4 * i + 3]);
        book.low[i] = byte_permute(first, second, 0x6420u);
        book.high[i] = byte_permute(first, second, 0x7531u);
    }
    return book;
}

// Bytes of a table for the four codes in the lower half of a word. `codes`: less their bits 3; `halves`: nibble i is i,
// plus 4 where code i has bit 3.
LLMCTL_DEVICE u32 look_up(const u32 (&table)[4], u32 codes, u32 halves) {
    return byte_permute(byte_permute(table[0], table[1], codes), byte_permute(table[2], table[3], codes), halves);
}

// What is subtracted from the codes of rows g (low) and g + 8 (high) of a fragment.
struct ZeroPair {
    u32 low, high;
};

// Four zero points (bytes: rows g + 8 j) when a weight has no zeros plane.
template <int kBits>
constexpr u32 kSymmetricZeros = kBits == 4 ? 0x08080808u : 0x80808080u;

template <typename T, int kBits>
LLMCTL_DEVICE ZeroPair zero_pair(u32 zeros, int r) {
    const u32 low = 2 * r, high = 2 * r + 1;
    if constexpr (kBits == 8 && !kIsF16<T>) {
        return {byte_permute(zeros, 0x4B000000u, 0x7550u | low), byte_permute(zeros, 0x4B000000u, 0x7550u | high)};
    } else if constexpr (kBits == 4 && kIsF16<T>) {
        // Rows g + 8 are found four bits up: x / 16 - (64 + zero); 64 + zero < 128 has 1/16 as its last bit.
        const u32 both = byte_permute(zeros, 0u, 0x4040u | high | high << 8);
        return {byte_permute(zeros, 0x64646464u, 0x4040u | low | low << 8), 0xD400D400u | both << 4};
    } else {
        constexpr u32 kBias = kIsF16<T> ? 0x64646464u : 0x43434343u;
        return {byte_permute(zeros, kBias, 0x4040u | low | low << 8),
                byte_permute(zeros, kBias, 0x4040u | high | high << 8)};
    }
}

// Bytes `first` and `first + 1` of a word of codes, minus their zero.
template <typename T>
LLMCTL_DEVICE u32 pair8(u32 word, int first, u32 zero) {
    if constexpr (kIsF16<T>) {
        return packed_sub<f16>(byte_permute(word, 0x64646464u, 0x4140u | first | first << 8), zero);
    } else {
        const float z = bits_to_float(zero);
        const float low = bits_to_float(byte_permute(word, 0x4B000000u, 0x7550u | first)) - z;
        const float high = bits_to_float(byte_permute(word, 0x4B000000u, 0x7550u | (first + 1))) - z;
        return byte_permute(float_to_bits(low), float_to_bits(high), 0x7632u);  // exact: 8 significant bits
    }
}

// The A operand (r, s) of a chunk: code - zero, as T.
template <typename T, int kBits>
LLMCTL_DEVICE void fragment(u32 (&a)[4], const Codes<kBits>& codes, int r, int s, const ZeroPair& zero, NoBook) {
    if constexpr (kBits == 8) {
        const u32 low = codes.vector[r].w[2 * s], high = codes.vector[r].w[2 * s + 1];
        a[0] = pair8<T>(low, 0, zero.low);
        a[1] = pair8<T>(high, 0, zero.high);
        a[2] = pair8<T>(low, 2, zero.low);
        a[3] = pair8<T>(high, 2, zero.high);
    } else if constexpr (kIsF16<T>) {
        constexpr u32 kBias = 0x64006400u;
        const u32 word = codes.vector[0].w[2 * r + s], upper = word >> 8;
        a[0] = packed_sub<f16>(lop3<kMaskOr>(word, 0x000f000fu, kBias), zero.low);
        a[1] = packed_fma<f16>(lop3<kMaskOr>(word, 0x00f000f0u, kBias), 0x2c002c00u, zero.high);
        a[2] = packed_sub<f16>(lop3<kMaskOr>(upper, 0x000f000fu, kBias), zero.low);
        a[3] = packed_fma<f16>(lop3<kMaskOr>(upper, 0x00f000f0u, kBias), 0x2c002c00u, zero.high);
    } else {
        const u32 word = codes.vector[0].w[2 * r + s];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 biased = lop3<kMaskOr>(word >> (4 * i), 0x000f000fu, 0x43004300u);
            a[i] = packed_sub<bf16>(biased, i % 2 ? zero.high : zero.low);
        }
    }
}

// A lane's four scales of a group: rows g + 8 j.
LLMCTL_DEVICE void unpack_scales(float (&scale)[4], const Vec8& packed) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scale[j] = to_float(f16{static_cast<u16>(packed.w[j / 2] >> (16 * (j % 2)))});
}

template <typename T, int kBits>
LLMCTL_DEVICE void fragment(u32 (&a)[4], const Codes<kBits>& codes, int r, int s, const ZeroPair& zero, Minimums) {
    fragment<T, kBits>(a, codes, r, s, zero, NoBook{});
}

// The tile's minimums, where weights have some.
template <typename Values>
LLMCTL_DEVICE const f16* minimums_at(const Values& values, long long at) {
    if constexpr (kHasMinimums<Values>) return values.plane ? values.plane + at : nullptr;
    else return nullptr;
}

// Four zero points of codes that may have minimums.
template <int kBits>
LLMCTL_DEVICE u32 zeros_beside(const Minimums& minimums) {
    return minimums.plane ? 0u : kSymmetricZeros<kBits>;
}

// The A operand of ones: every row of the product is the sum of B's columns.
template <typename T>
LLMCTL_DEVICE void ones(u32 (&a)[4]) {
    const u32 one = kIsF16<T> ? 0x3C003C00u : 0x3F803F80u;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = one;
}

// A group of a tile: total += scale * sum + minimum * the group's sum of x; both sums are zeroed.
// of_x: see ones; a lane's tokens are those of its sums. minimums: where there are none, anything.
template <int kTokenTiles>
LLMCTL_DEVICE void scale_group(float (&total)[kTokenTiles][2][4], float (&sum)[kTokenTiles][2][4],
                               float (&of_x)[kTokenTiles][4], const Vec8& scales, const Vec8& minimums,
                               bool has_minimums) {
    float scale[4], minimum[4];
    unpack_scales(scale, scales);
    unpack_scales(minimum, minimums);
#pragma unroll
    for (int i = 0; i < 8 * kTokenTiles; ++i) {
        const int j = i / 8, row = i / 2 % 4;
        float& to = total[j][i / 4 % 2][i % 4];
        float& from = sum[j][i / 4 % 2][i % 4];
        to = fused_multiply_add(scale[row], from, to);
        if (has_minimums) to = fused_multiply_add(minimum[row], of_x[j][i % 2], to);
        from = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4 * kTokenTiles; ++i) of_x[i / 4][i % 4] = 0.0f;
}

// The float8 bytes `first` and `first + 1` of a word, times 2^-8.
template <typename T>
LLMCTL_DEVICE u32 float8_pair(u32 word, int first) {
    const u32 bits = e4m3_bits<T>(byte_permute(word, 0u, 0x1404u | first << 4 | first << 12));
    if constexpr (kIsF16<T>) return bits;
    else return packed_fma<bf16>(bits, 0x77807780u, 0u);
}

// The A operand (r, s) of a chunk of float8 codes: their values, times 2^-8.
template <typename T, int kBits>
LLMCTL_DEVICE void fragment(u32 (&a)[4], const Codes<kBits>& codes, int r, int s, const ZeroPair&, Float8) {
    static_assert(kBits == 8, "float8 has 8 bits");
    const u32 low = codes.vector[r].w[2 * s], high = codes.vector[r].w[2 * s + 1];
    a[0] = float8_pair<T>(low, 0);
    a[1] = float8_pair<T>(high, 0);
    a[2] = float8_pair<T>(low, 2);
    a[3] = float8_pair<T>(high, 2);
}

// The A operand (r, s) of a chunk of 4-bit codes: the book's values.
template <typename T, int kBits>
LLMCTL_DEVICE void fragment(u32 (&a)[4], const Codes<kBits>& codes, int r, int s, const ZeroPair&,
                            const Book<T>& book) {
    static_assert(kBits == 4, "a book has 16 values");
    const u32 word = codes.vector[0].w[2 * r + s];
    const u32 index = word & 0x77777777u, halves = (word >> 1 & 0x44444444u) | 0x32103210u;
    // Nibbles 0 .. 3 are the lower halves of a[0 .. 3], 4 .. 7 the upper ones.
    u32 low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        low[i] = look_up(book.low, index >> (16 * i), halves >> (16 * i));
        high[i] = look_up(book.high, index >> (16 * i), halves >> (16 * i));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 pairs = i ? 0x7362u : 0x5140u;  // the values of nibbles 2 i and 2 i + 1
        const u32 lower = byte_permute(low[0], high[0], pairs), upper = byte_permute(low[1], high[1], pairs);
        a[2 * i] = byte_permute(lower, upper, 0x5410u);
        a[2 * i + 1] = byte_permute(lower, upper, 0x7632u);
    }
}

// The 4-bit code of row 16 r + 8 h + g, column 8t + c.
LLMCTL_DEVICE u32 code_at(const Codes<4>& codes, int r, int h, int c) {
    const int nibble = h + 2 * (c / 2 % 2) + 4 * (c % 2);
    return codes.vector[0].w[2 * r + c / 4] >> (4 * nibble) & 15u;
}

}  // namespace gemm
}  // namespace llmctl
