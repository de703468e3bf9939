// Micro-kernels of the GEMMs y[m][n] = sum_k x[m][k] * w[n][k]: int8 activations with 4- or 8-bit weights, bf16, fp32.
//
// Weights are packed for the target when the engine is built (llmctl/kernels/cpu_layout.py), in tiles of 32 outputs:
//   w4     per 4 columns one 64-byte line; byte 4*lane+j holds column k+j of outputs `lane` (low nibble), 16+lane (high)
//   w8     per 4 columns two lines of whole bytes: outputs 0..15, then 16..31
//   bf16   per 2 columns two lines of 16 outputs x 2 columns
//   fp32   per column two lines of 16 outputs
// w4 and w8 come with scales fp16 [tiles][groups][32] and zeros u8 [tiles][groups][32]: w = (code - zero) * scale.
//
// Reduction order: integer dot products are exact; groups (or columns) are added in fp32 in ascending order. It depends
// neither on M, nor on the row's place in the batch, nor on the number of threads: a row's result is the same in any batch.
#pragma once
#include "acts.h"

namespace llmctl {

constexpr int kTile = 32;

struct Weights {
  const uint8_t* data;
  const uint16_t* scales;
  const uint8_t* zeros;
  int64_t n, k, group;  // n padded to kTile; k padded to the group (integer) or to 2 (bf16)
};

// total[r][half]: outputs 16*half .. 16*half+15 of the tile for the R rows of the block starting at `row`.
template <int kBits, int R>
static inline __attribute__((always_inline)) void int_tile(const Weights& w, const IntActs& x, int64_t tile,
                                                           int64_t row, f32x16 (&total)[R][2]) {
  const int64_t groups = w.k / w.group, ratio = w.group / x.group;  // activation groups never span weight groups
  const uint8_t* codes = w.data + tile * (w.k * kTile * kBits / 8);
  const uint16_t* scales = w.scales + tile * groups * kTile;
  const uint8_t* zeros = w.zeros + tile * groups * kTile;
  const int8_t* xp = x.codes + row * x.k;
  const float* xs = x.scales + row * x.groups();
  const float* xz = x.scaled_sums + row * x.groups();
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) total[r][0] = total[r][1] = f32x16{};
  for (int64_t g = 0; g < groups; g++, scales += kTile, zeros += kTile) {
    for (int64_t part = 0; part < ratio; part++, xs += R, xz += R) {
      i32x16 acc[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = i32x16{};
      for (const int8_t* end = xp + x.group * R; xp != end; xp += 4 * R) {
        u8x64 first = load<u8x64>(codes), second;
        if (kBits == 4) {
          second = high_nibbles(first);
          first = first & 15;
          codes += 64;
        } else {
          second = load<u8x64>(codes + 64);
          codes += 128;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          acc[r][0] = dot4<kBits == 4>(acc[r][0], first, xp + 4 * r);
          acc[r][1] = dot4<kBits == 4>(acc[r][1], second, xp + 4 * r);
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const f32x16 scale = f16_to_f32x16(scales + half * kLanes);
        const f32x16 offset = u8_to_f32(zeros + half * kLanes) * scale;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          total[r][half] += to_f32(acc[r][half]) * (scale * xs[r]);
          total[r][half] -= offset * xz[r];
        }
      }
    }
  }
}

// x: bf16 row-major, row stride ldx (a multiple of 2, zero-padded to w.k).
template <int R>
static inline __attribute__((always_inline)) void bf16_tile(const Weights& w, const uint16_t* x, int64_t ldx,
                                                            int64_t tile, int64_t row, f32x16 (&total)[R][2]) {
  const uint16_t* line = (const uint16_t*)w.data + tile * w.k * kTile;
  const uint16_t* xp = x + row * ldx;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) total[r][0] = total[r][1] = f32x16{};
  for (int64_t k = 0; k < w.k; k += 2, line += 64) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      total[r][0] = dot2_bf16(total[r][0], line, xp + r * ldx + k);
      total[r][1] = dot2_bf16(total[r][1], line + 32, xp + r * ldx + k);
    }
  }
}

// x: fp32 row-major, row stride ldx.
template <int R>
static inline __attribute__((always_inline)) void f32_tile(const Weights& w, const float* x, int64_t ldx, int64_t tile,
                                                           int64_t row, f32x16 (&total)[R][2]) {
  const float* line = (const float*)w.data + tile * w.k * kTile;
  const float* xp = x + row * ldx;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) total[r][0] = total[r][1] = f32x16{};
  for (int64_t k = 0; k < w.k; k++, line += 32) {
    const f32x16 first = load<f32x16>(line), second = load<f32x16>(line + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float value = xp[r * ldx + k];
      total[r][0] += first * value;
      total[r][1] += second * value;
    }
  }
}

}  // namespace llmctl
