// A linear op over all its tiles: micro-kernel, bias, gated epilogue, then fp32 or int8 output.
#pragma once
#include <algorithm>
#include <vector>

#include "gemm.h"
#include "pool.h"
#include "program.h"
#include "rowops.h"

namespace llmctl {

constexpr int64_t kRowsAThread = 64;  // rows a thread from which rows are shared instead of the weight
constexpr int64_t kPatchRows = 64;     // rows of such a share that meet a tile of weights while both are in cache
constexpr int64_t kMaxActGroup = 128;  // columns an activation scale, see act_group() in cpu_layout.py

// Outputs of a block of rows: n columns, row stride ld.
struct Outputs {
  float* data;
  int64_t ld, n;
};

static inline void store_columns(float* y, int64_t column, int64_t n, f32x16 v) {
  if (column + kLanes <= n) return store(y + column, v);
  for (int64_t i = column; i < n; i++) y[i] = v[i - column];
}

// Bias and gate of tile `tile`, stored as tile number `at` of y.
template <int R>
static inline __attribute__((always_inline)) void finish_tile(const OpDesc& op, int64_t tile, const Outputs& y,
                                                              int64_t at, f32x16 (&total)[R][2]) {
  if (op.bias) {
    const f32x16 first = load<f32x16>(op.bias + tile * kTile), second = load<f32x16>(op.bias + tile * kTile + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) total[r][0] += first, total[r][1] += second;
  }
  for (int r = 0; r < R; r++) {
    float* line = y.data + r * y.ld;
    if (op.act) {
      store_columns(line, at * kLanes, y.n, activate(total[r][0], Act(op.act)) * total[r][1]);
    } else {
      store_columns(line, at * kTile, y.n, total[r][0]);
      store_columns(line, at * kTile + kLanes, y.n, total[r][1]);
    }
  }
}

// How a linear's tiles are handed out: an activation group of int8 outputs is made by one thread.
struct Units {
  int64_t tiles, tiles_per, count;
  explicit Units(const OpDesc& op)
      : tiles(op.n_padded / kTile),
        tiles_per(op.y8.codes ? op.y8.group / (op.act ? kLanes : kTile) : 1),
        count(tiles / tiles_per) {}
};

// A thread's scratch: a tile of w4 unpacked to bytes, and the fp32 outputs of kPatchRows rows on their way to int8.
class LinearScratch {
 public:
  uint8_t* unpacked(int64_t bytes) {
    if (int64_t(lines_.size()) * 64 < bytes) lines_.resize(size_t(bytes + 63) / 64);
    return lines_.data()->bytes;
  }
  float* columns() { return columns_.data(); }

 private:
  struct alignas(64) Line {  // the micro-kernel loads whole cache lines
    uint8_t bytes[64];
  };
  std::vector<Line> lines_;
  std::vector<float> columns_ = std::vector<float>(size_t(kPatchRows * kMaxActGroup));
};

template <int kType, bool kUnpacked, int R>
static inline void block_tile(const OpDesc& op, const Weights& w, const uint8_t* unpacked, int64_t tile, int64_t row,
                              const Ahead& ahead, const Outputs& y, int64_t at) {
  f32x16 total[R][2];
  if constexpr (kUnpacked) int_tile<8, true, R>(w, unpacked, op.x8, tile, row, ahead, total);
  else if constexpr (kType == kW4) int_tile<4, false, R>(w, w.data + tile * w.k * kTile / 2, op.x8, tile, row, ahead, total);
  else if constexpr (kType == kW8) int_tile<8, false, R>(w, w.data + tile * w.k * kTile, op.x8, tile, row, ahead, total);
  else if constexpr (kType == kBf16) bf16_tile<R>(w, op.x16, w.k, tile, row, total);
  else f32_tile<R>(w, op.x.data, op.x.ld, tile, row, total);
  finish_tile<R>(op, tile, y, at, total);
}

// A rectangle of a linear's work: rows [row, row_end) of the step's `rows`, at most kPatchRows; units [unit, unit_end).
struct Patch {
  int64_t rows, row, row_end, unit, unit_end;
};

// One tile for the rows of a patch; y: outputs of the patch's first row, at: the tile's place in them.
template <int kType, bool kUnpacked>
static void tile_rows(const OpDesc& op, const Weights& w, const Patch& patch, int64_t tile, const Outputs& y, int64_t at,
                      LinearScratch& scratch) {
  uint8_t* const unpacked = kUnpacked ? scratch.unpacked(w.k * kTile) : nullptr;
  const int64_t tile_bytes = w.k * kTile / 2, blocks = (patch.row_end - patch.row + 7) / 8;
  Ahead ahead{w.data + (tile + 1) * tile_bytes, tile_bytes / blocks};
  if (kUnpacked) unpack_tile(w.data + tile * tile_bytes, w.k, unpacked);
  for (int64_t row = patch.row; row < patch.row_end; ahead.next += ahead.bytes) {
    const Outputs here{y.data + (row - patch.row) * y.ld, y.ld, y.n};
    const int count = block_rows(row, patch.rows);
    switch (count) {
      case 8: block_tile<kType, kUnpacked, 8>(op, w, unpacked, tile, row, ahead, here, at); break;
      case 4: block_tile<kType, kUnpacked, 4>(op, w, unpacked, tile, row, ahead, here, at); break;
      case 2: block_tile<kType, kUnpacked, 2>(op, w, unpacked, tile, row, ahead, here, at); break;
      default: block_tile<kType, kUnpacked, 1>(op, w, unpacked, tile, row, ahead, here, at);
    }
    row += count;
  }
}

template <int kType, bool kUnpacked>
static void linear_patch(const OpDesc& op, const Units& units, const Patch& patch, LinearScratch& scratch) {
  const Weights w{op.w, op.w_scales, op.w_zeros, op.n_padded, op.k, op.group};
  const int64_t group = op.y8.group;
  const Outputs y = op.y8.codes ? Outputs{scratch.columns(), kMaxActGroup, group}
                                : Outputs{op.y.data + patch.row * op.y.ld, op.y.ld, op.n};
  for (int64_t unit = patch.unit; unit < patch.unit_end; unit++) {
    for (int64_t i = 0; i < units.tiles_per; i++) {
      const int64_t tile = unit * units.tiles_per + i;
      tile_rows<kType, kUnpacked>(op, w, patch, tile, y, op.y8.codes ? i : tile, scratch);
    }
    if (!op.y8.codes) continue;
    for (int64_t row = patch.row; row < patch.row_end; row++)
      quantize_group(y.data + (row - patch.row) * y.ld, group, group, unit * group, act_row_of(op.y8, row, patch.rows));
  }
}

static inline void linear_patch(const OpDesc& op, const Units& units, const Patch& patch, LinearScratch& scratch) {
  switch (op.weight_dtype) {
    case kW4:
      if (patch.row_end - patch.row >= kUnpackRows) return linear_patch<kW4, true>(op, units, patch, scratch);
      return linear_patch<kW4, false>(op, units, patch, scratch);
    case kW8: return linear_patch<kW8, false>(op, units, patch, scratch);
    case kBf16: return linear_patch<kBf16, false>(op, units, patch, scratch);
    default: return linear_patch<kF32, false>(op, units, patch, scratch);
  }
}

// Few rows: threads share the weight. Many: they share the rows, as they do in every other op, so that activations stay
// in the cache of the core that made them (measured, 512 rows on 2 cores: linears 136 ms for 148).
static inline void linear_op(const OpDesc& op, int64_t rows, const Share& share, LinearScratch& scratch) {
  const Units units(op);
  if (rows >= kRowsAThread * share.threads) {
    const int64_t blocks = (rows + 7) / 8;
    const int64_t most = (blocks + share.threads - 1) / share.threads, parts = (most * 8 + kPatchRows - 1) / kPatchRows;
    return share.run(blocks, (most + parts - 1) / parts, [&](int64_t begin, int64_t end) {
      linear_patch(op, units, {rows, begin * 8, std::min(end * 8, rows), 0, units.count}, scratch);
    });
  }
  const int64_t chunk = std::max<int64_t>(1, units.count / (share.threads * 8));
  share.run(units.count, chunk, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < rows; row += kPatchRows)
      linear_patch(op, units, {rows, row, std::min(row + kPatchRows, rows), begin, end}, scratch);
  });
}

}  // namespace llmctl
