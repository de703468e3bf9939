// A linear op over all its tiles: micro-kernel, bias, gated epilogue, store.
#pragma once
#include "gemm.h"
#include "pool.h"
#include "program.h"
#include "rowops.h"

namespace llmctl {

static inline void store_columns(float* y, int64_t column, int64_t n, f32x16 v) {
  if (column + kLanes <= n) return store(y + column, v);
  for (int64_t i = column; i < n; i++) y[i] = v[i - column];
}

template <int R>
static inline __attribute__((always_inline)) void finish_tile(const OpDesc& op, int64_t tile, int64_t row,
                                                              f32x16 (&total)[R][2]) {
  if (op.bias) {
    const f32x16 first = load<f32x16>(op.bias + tile * kTile), second = load<f32x16>(op.bias + tile * kTile + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) total[r][0] += first, total[r][1] += second;
  }
  for (int r = 0; r < R; r++) {
    float* y = op.y.data + (row + r) * op.y.ld;
    if (op.act) {
      store_columns(y, tile * kLanes, op.n, activate(total[r][0], Act(op.act)) * total[r][1]);
    } else {
      store_columns(y, tile * kTile, op.n, total[r][0]);
      store_columns(y, tile * kTile + kLanes, op.n, total[r][1]);
    }
  }
}

template <int kType, int R>
static inline void tile_rows(const OpDesc& op, const Weights& w, const IntActs& acts, int64_t tile, int64_t row) {
  f32x16 total[R][2];
  if constexpr (kType == kW4) int_tile<4, R>(w, acts, tile, row, total);
  else if constexpr (kType == kW8) int_tile<8, R>(w, acts, tile, row, total);
  else if constexpr (kType == kBf16) bf16_tile<R>(w, op.x16, w.k, tile, row, total);
  else f32_tile<R>(w, op.x.data, op.x.ld, tile, row, total);
  finish_tile<R>(op, tile, row, total);
}

template <int kType>
static void linear_tiles(const OpDesc& op, int64_t rows, int64_t begin, int64_t end) {
  const Weights w{op.w, op.w_scales, op.w_zeros, op.n_padded, op.k, op.group};
  const IntActs acts{op.q_codes, op.q_scales, op.q_sums, op.q_k, op.q_group};
  for (int64_t tile = begin; tile < end; tile++) {
    for (int64_t row = 0; row < rows;) {
      const int count = block_rows(row, rows);
      switch (count) {
        case 8: tile_rows<kType, 8>(op, w, acts, tile, row); break;
        case 4: tile_rows<kType, 4>(op, w, acts, tile, row); break;
        case 2: tile_rows<kType, 2>(op, w, acts, tile, row); break;
        default: tile_rows<kType, 1>(op, w, acts, tile, row);
      }
      row += count;
    }
  }
}

static inline void linear_op(const OpDesc& op, int64_t rows, int threads, WorkCounter& counter) {
  const int64_t tiles = op.n_padded / kTile;
  const int64_t chunk = tiles / (threads * 8) > 1 ? tiles / (threads * 8) : 1;
  share(counter, tiles, chunk, [&](int64_t begin, int64_t end) {
    switch (op.weight_dtype) {
      case kW4: return linear_tiles<kW4>(op, rows, begin, end);
      case kW8: return linear_tiles<kW8>(op, rows, begin, end);
      case kBf16: return linear_tiles<kBf16>(op, rows, begin, end);
      default: return linear_tiles<kF32>(op, rows, begin, end);
    }
  });
}

}  // namespace llmctl
