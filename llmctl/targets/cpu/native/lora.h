// LoRA for several adapters in one batch (Hu et al. 2021), grouped by adapter as in Punica (Chen et al. 2023):
//   shrink   h = x A^T, for every module that reads x, a partial sum for every kSplit columns
//   expand   y += (scale * h) B^T
// in fp32, over matrices of fp32 or bf16. Both are made of panels of 16 outputs, so that one loop serves them: a panel
// [len][16] by a row of len. It takes up to kLoraRows rows of one adapter at once, for which it is read from memory once;
// the order of additions depends on neither the rows at once nor their number, so that a row has the same bits in any
// batch. Rows without an adapter are not looked at; modules that an adapter leaves alone (scale 0) are not read.
#pragma once
#include <algorithm>
#include <vector>

#include "pool.h"
#include "program.h"
#include "simd.h"

namespace llmctl {

constexpr int kLoraRows = 4;
constexpr int64_t kSplit = 512;       // columns of x a partial sum: work for more threads than there are panels
constexpr int64_t kPanelsAtOnce = 4;  // of an expand: a piece of work

// Rows that have one adapter: indices [begin, begin + count) of AdapterRows::rows.
struct AdapterTile {
  int32_t slot, begin, count;
};

// The rows of a step that have adapters, grouped.
struct AdapterRows {
  std::vector<int32_t> rows;
  std::vector<AdapterTile> tiles;

  // slots: [count], -1 for none.
  void group(const int32_t* slots, int64_t count) {
    rows.clear();
    tiles.clear();
    for (int64_t row = 0; row < count; row++)
      if (slots[row] >= 0) rows.push_back(int32_t(row));
    std::stable_sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) { return slots[a] < slots[b]; });
    for (size_t i = 0; i < rows.size(); i++) {
      const int32_t slot = slots[rows[i]];
      if (tiles.empty() || tiles.back().slot != slot || tiles.back().count == kLoraRows)
        tiles.push_back({slot, int32_t(i), 0});
      tiles.back().count++;
    }
  }
};

static inline int64_t panels_of(const LoraModule& module) { return (module.rows + kLanes - 1) / kLanes; }
static inline int64_t pieces_of(const LoraModule& module) {
  return (panels_of(module) + kPanelsAtOnce - 1) / kPanelsAtOnce;
}

static inline f32x16 panel_line(const float* p) { return load<f32x16>(p); }
static inline f32x16 panel_line(const uint16_t* p) { return bf16_to_f32(load<u16x16>(p)); }

// total[r] = the panel [len][16] by x[r] [len]: even columns, then odd ones.
template <class T, int R>
static inline __attribute__((always_inline)) void panel_rows(const T* panel, int64_t len, const float* const* x,
                                                             f32x16 (&total)[R]) {
  f32x16 even[R], odd[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) even[r] = odd[r] = f32x16{};
  int64_t k = 0;
  for (; k + 2 <= len; k += 2, panel += 32) {
    const f32x16 first = panel_line(panel), second = panel_line(panel + 16);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      even[r] = fused(first, x[r][k], even[r]);
      odd[r] = fused(second, x[r][k + 1], odd[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    if (k < len) even[r] = fused(panel_line(panel), x[r][k], even[r]);
    total[r] = even[r] + odd[r];
  }
}

// The same for up to kLoraRows rows.
template <class T>
static inline void panel_product(const T* panel, int64_t len, const float* const* x, int count, f32x16* total) {
  switch (count) {
    case 4: return panel_rows<T, 4>(panel, len, x, *(f32x16(*)[4])total);
    case 3: return panel_rows<T, 3>(panel, len, x, *(f32x16(*)[3])total);
    case 2: return panel_rows<T, 2>(panel, len, x, *(f32x16(*)[2])total);
    default: return panel_rows<T, 1>(panel, len, x, *(f32x16(*)[1])total);
  }
}

// How the partial sums of a row lie in h: [modules][rank / 16][splits][16].
struct LoraShape {
  int64_t ranks, splits, modules;  // panels of 16 a rank
  explicit LoraShape(const OpDesc& op)
      : ranks(op.group / kLanes), splits((op.width + kSplit - 1) / kSplit), modules(op.num_lora) {}
  int64_t at(int64_t module, int64_t rank, int64_t split) const {
    return ((module * ranks + rank) * splits + split) * kLanes;
  }
};

template <class T>
static void shrink_op(const OpDesc& op, const AdapterRows& adapters, const Share& share) {
  const LoraShape shape(op);
  const int64_t tiles = int64_t(adapters.tiles.size());
  share.run(shape.modules * shape.ranks * shape.splits * tiles, 1, [&](int64_t item, int64_t) {
    const AdapterTile& tile = adapters.tiles[size_t(item % tiles)];
    const int64_t split = item / tiles % shape.splits, panel = item / tiles / shape.splits;
    const LoraModule& module = op.lora[panel / shape.ranks];
    if (module.scales[tile.slot] == 0.0f) return;
    const int64_t begin = split * kSplit, len = std::min(kSplit, op.width - begin), rank = panel % shape.ranks;
    const float* x[kLoraRows];
    for (int r = 0; r < tile.count; r++) x[r] = op.x.data + adapters.rows[size_t(tile.begin + r)] * op.x.ld + begin;
    f32x16 total[kLoraRows];
    const T* a = (const T*)module.a + ((tile.slot * shape.ranks + rank) * op.width + begin) * kLanes;
    panel_product(a, len, x, tile.count, total);
    for (int r = 0; r < tile.count; r++)
      store(op.y.data + adapters.rows[size_t(tile.begin + r)] * op.y.ld + shape.at(panel / shape.ranks, rank, split),
            total[r]);
  });
}

// scale * h of a row and module, all splits together: [ranks * 16].
static inline void scaled_row(const OpDesc& op, const LoraShape& shape, int64_t module, float scale, int64_t row,
                              float* out) {
  for (int64_t rank = 0; rank < shape.ranks; rank++) {
    const float* h = op.x.data + row * op.x.ld + shape.at(module, rank, 0);
    f32x16 sum = load<f32x16>(h);
    for (int64_t split = 1; split < shape.splits; split++) sum += load<f32x16>(h + split * kLanes);
    store(out + rank * kLanes, sum * scale);
  }
}

// y[0 .. n) += v
static inline void add_columns(float* y, int64_t n, f32x16 v) {
  if (n >= kLanes) return store(y, load<f32x16>(y) + v);
  for (int64_t i = 0; i < n; i++) y[i] += v[i];
}

// line: a thread's scratch.
template <class T>
static void expand_op(const OpDesc& op, const AdapterRows& adapters, const Share& share, std::vector<float>& line) {
  const LoraShape shape(op);
  const int64_t tiles = int64_t(adapters.tiles.size()), rank = op.group;
  if (int64_t(line.size()) < kLoraRows * rank) line.resize(size_t(kLoraRows * rank));
  int64_t pieces = 0;
  for (int64_t m = 0; m < shape.modules; m++) pieces += pieces_of(op.lora[m]);
  share.run(pieces * tiles, 1, [&](int64_t item, int64_t) {
    const AdapterTile& tile = adapters.tiles[size_t(item % tiles)];
    int64_t m = 0, piece = item / tiles;
    for (; piece >= pieces_of(op.lora[m]); m++) piece -= pieces_of(op.lora[m]);
    const LoraModule& module = op.lora[m];
    const float scale = module.scales[tile.slot];
    if (scale == 0.0f) return;
    const float* h[kLoraRows];
    for (int r = 0; r < tile.count; r++) {
      scaled_row(op, shape, m, scale, adapters.rows[size_t(tile.begin + r)], line.data() + r * rank);
      h[r] = line.data() + r * rank;
    }
    const int64_t last = std::min((piece + 1) * kPanelsAtOnce, panels_of(module));
    for (int64_t panel = piece * kPanelsAtOnce; panel < last; panel++) {
      f32x16 total[kLoraRows];
      panel_product((const T*)module.b + (tile.slot * panels_of(module) + panel) * rank * kLanes, rank, h, tile.count, total);
      for (int r = 0; r < tile.count; r++)
        add_columns(module.y.data + adapters.rows[size_t(tile.begin + r)] * module.y.ld + panel * module.stride,
                    module.rows - panel * kLanes, total[r]);
    }
  });
}

static inline void lora_op(const OpDesc& op, const AdapterRows& adapters, const Share& share, std::vector<float>& line) {
  const bool half = op.weight_dtype == kBf16;
  if (op.kind == kShrink) return half ? shrink_op<uint16_t>(op, adapters, share) : shrink_op<float>(op, adapters, share);
  return half ? expand_op<uint16_t>(op, adapters, share, line) : expand_op<float>(op, adapters, share, line);
}

}  // namespace llmctl
