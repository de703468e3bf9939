// LoRA for several adapters in one batch (Hu et al. 2021), grouped by adapter as in Punica (Chen et al. 2023), inside the
// phase of the linear that adapters act on:
//   shrink   h = x A^T, the first work of the phase, shared by the threads: a partial sum for every few columns of x
//   expand   y += (scale * h) B^T, part of the linear's epilogue: a tile's totals are still in registers
// No barrier lies between: a thread waits for the partial sums of the others when its first tile is done, which takes
// longer than they do.
//
// Behind a linear with an int8 operand matrices are of 8 bits, too (LLM.int8() has vectors' scales likewise, Dettmers et al.
// 2022): the shrink reads the linear's own operand, and h is rounded to int8 for the expand, a scale a row and module.
// Integer sums are exact. Elsewhere matrices are fp32 or bf16, operands and sums fp32: bf16 is widened in registers, which
// is as fast as vdpbf16ps for one row and faster for more (measured: 0.55 ns for that, 0.14 for a fused multiply-add of
// half as many products). Both products are made of panels of 16 outputs. A loop takes up to kLoraRows rows of one adapter
// at once, for which a panel is read and widened once. The order of additions depends on neither the rows at once nor
// their number, so that a row has the same bits in any batch. Rows without an adapter are not looked at; modules that an
// adapter leaves alone (scale 0) are not read, nor are ranks that it does not have.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "pool.h"
#include "program.h"
#include "simd.h"

namespace llmctl {

constexpr int kLoraRows = 4;
constexpr int64_t kWindow = 32;     // rows whose adapters are grouped: those that meet a tile of weights at once
constexpr int64_t kSplit = 128;     // columns of x a partial sum, at least; whole activation groups, or even
constexpr int64_t kMaxSplits = 16;  // partial sums: wider x has longer ones

// Rows that have one adapter: indices [begin, begin + count) of AdapterRows::rows.
struct AdapterTile {
  int32_t slot, begin, count;
};

// The rows of a step that have adapters, grouped.
struct AdapterRows {
  const int32_t* slots = nullptr;  // of every row of the step, -1 for none
  std::vector<int32_t> rows;
  std::vector<AdapterTile> tiles;
  std::vector<size_t> windows;  // the first tile of each window, and their end

  void group(const int32_t* of_rows, int64_t count) {
    slots = of_rows;
    rows.clear();
    tiles.clear();
    windows.clear();
    for (int64_t first = 0; first < count; first += kWindow) {
      const size_t begin = rows.size();
      windows.push_back(tiles.size());
      for (int64_t row = first; row < std::min(first + kWindow, count); row++)
        if (slots[row] >= 0) rows.push_back(int32_t(row));
      std::stable_sort(rows.begin() + int64_t(begin), rows.end(), [&](int32_t a, int32_t b) { return slots[a] < slots[b]; });
      for (size_t i = begin; i < rows.size(); i++) {
        const int32_t slot = slots[rows[i]];
        if (tiles.size() == windows.back() || tiles.back().slot != slot || tiles.back().count == kLoraRows)
          tiles.push_back({slot, int32_t(i), 0});
        tiles.back().count++;
      }
    }
    windows.push_back(tiles.size());
  }
};

// What a thread needs of a step to let adapters act on a linear. share: of the shrink; done: pieces of it that are.
struct Adapting {
  const AdapterRows& adapters;
  const Share share;
  std::atomic<int64_t>& done;
};

// Columns of an output that lie together.
template <class T>
constexpr int kLineStep = sizeof(T) == 2 ? 2 : 1;

// A line of a panel: its 16 outputs' columns, each as fp32.
static inline __attribute__((always_inline)) void widen(const uint16_t* line, f32x16 (&columns)[2]) {
  const u32x16 both = load<u32x16>(line);
  columns[0] = (f32x16)(both << 16), columns[1] = (f32x16)(both & 0xffff0000u);
}
static inline __attribute__((always_inline)) void widen(const float* line, f32x16 (&columns)[2]) {
  columns[0] = load<f32x16>(line), columns[1] = load<f32x16>(line + kLanes);
}

// The last column of an odd number; in bf16 a column of zeros lies beside it.
static inline f32x16 last_column(const uint16_t* line) { return (f32x16)(load<u32x16>(line) << 16); }
static inline f32x16 last_column(const float* line) { return load<f32x16>(line); }

// total[r] = the panel [len][16] by x[r] [len]: even columns, then odd ones; where kAhead, `ahead` is fetched meanwhile, as
// many bytes as are read.
template <class T, int R, bool kAhead>
static inline __attribute__((always_inline)) void panel_rows(const T* panel, int64_t len, const float* const* x,
                                                             const T* ahead, f32x16 (&total)[R]) {
  f32x16 even[R], odd[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) even[r] = odd[r] = f32x16{};
  int64_t k = 0;
  for (; k + 2 <= len; k += 2, panel += 2 * kLanes) {
    f32x16 columns[2];
    widen(panel, columns);
    if (kAhead) {
      __builtin_prefetch(ahead + k * kLanes);
      if (sizeof(T) == 4) __builtin_prefetch(ahead + (k + 1) * kLanes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      even[r] = fused(columns[0], x[r][k], even[r]);
      odd[r] = fused(columns[1], x[r][k + 1], odd[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    if (k < len) even[r] = fused(last_column(panel), x[r][k], even[r]);
    total[r] = even[r] + odd[r];
  }
}

// Calls f with the number of rows of a tile as a constant: loops over them are unrolled, and their sums stay in registers.
template <class F>
static inline __attribute__((always_inline)) void with_count(int count, F&& f) {
  static_assert(kLoraRows == 4, "");
  switch (count) {
    case 4: return f(std::integral_constant<int, 4>());
    case 3: return f(std::integral_constant<int, 3>());
    case 2: return f(std::integral_constant<int, 2>());
    default: return f(std::integral_constant<int, 1>());
  }
}

static inline bool of_codes(const OpDesc& op) { return op.lora_dtype == kW8; }

// total[r] = the panel [len / 4][16][4] of codes + 128 by activation groups [group, group_end) of x[r]; `ahead` is fetched
// meanwhile. kFlip: x holds codes + 128, too.
template <bool kFlip, int R>
static inline __attribute__((always_inline)) void panel_groups(const uint8_t* panel, const IntActs& acts, int64_t group,
                                                               int64_t group_end, const ActRow (&x)[R],
                                                               const uint8_t* ahead, f32x16 (&total)[R]) {
  const TileGroup tile(acts.group);
  const bool tiled = x[0].tiled;
  const int64_t parts = tiled ? tile.parts : 1, columns = tiled ? tile.columns : acts.group;
  int64_t step[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) total[r] = f32x16{}, step[r] = tiled ? 4 : 4 * x[r].in_block;
  for (int64_t g = group; g < group_end; g++) {
    i32x16 sum[R];
    const int8_t* codes[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      codes[r] = x[r].codes + g * (tiled ? tile.row_bytes() : acts.group) * x[r].in_block;
      sum[r] = 128 * x[r].negated_sums[g * x[r].in_block] - i32x16{};
    }
    for (int64_t part = 0; part < parts; part++) {
      for (int64_t left = std::min(columns, acts.group - part * columns); left > 0; left -= 4, panel += 64, ahead += 64) {
        const u8x64 line = load<u8x64>(panel);
        __builtin_prefetch(ahead);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          i8x64 four = splat4<i8x64>(codes[r]);
          if constexpr (kFlip) four ^= int8_t(0x80);
          sum[r] = dot4<false>(sum[r], line, four);
          codes[r] += step[r];
        }
      }
      // The next part is a tile of 16 rows further on.
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) codes[r] += tiled ? columns * (kTileRows - 1) : 0;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) total[r] = fused(to_f32(sum[r]), x[r].scales[g * x[r].in_block], total[r]);
  }
}

// How the partial sums of a row lie in op.low: [modules][rank / 16][splits][16].
struct LoraShape {
  int64_t ranks, width, columns, split, splits;  // ranks: panels of 16; columns: as they lie; split: of width, the last less
  explicit LoraShape(const OpDesc& op)
      : ranks(op.lora_rank / kLanes),
        width(of_codes(op) ? op.k : op.width),
        columns(op.lora_dtype == kBf16 ? (width + 1) / 2 * kLineStep<uint16_t> : width) {
    const int64_t unit = of_codes(op) ? op.x8.group : 2;
    split = (std::max(kSplit, (width + kMaxSplits - 1) / kMaxSplits) + unit - 1) / unit * unit;
    splits = (width + split - 1) / split;
  }
  int64_t at(int64_t module, int64_t rank, int64_t split) const {
    return ((module * ranks + rank) * splits + split) * kLanes;
  }
  int64_t pieces(const AdapterRows& adapters) const { return splits * int64_t(adapters.tiles.size()); }
};

template <class T>
constexpr int count_of = int(std::extent_v<std::remove_reference_t<T>>);

// The first work of an adapted linear's phase: pieces of one sum of one tile of rows. T: of a matrix's elements.
// make(panel, ahead, rows, begin, len, total) is the product of a panel and columns [begin, begin + len) of the rows.
template <class T, class F>
static inline void shrink(const OpDesc& op, const Adapting& adapting, F&& make) {
  const LoraShape shape(op);
  const AdapterRows& adapters = adapting.adapters;
  const int64_t pieces = shape.pieces(adapters);
  const auto panel = [&](int64_t item, int64_t m, int64_t rank) {
    const int64_t slot = adapters.tiles[size_t(item / shape.splits)].slot, begin = item % shape.splits * shape.split;
    return (const T*)op.lora[m].a + ((slot * shape.ranks + rank) * shape.columns + begin) * kLanes;
  };
  const int64_t first = adapting.share.begin(pieces, adapting.share.thread);
  if (first < pieces)
    for (int64_t m = 0; m < op.num_lora; m++) prefetch(panel(first, m, 0), shape.split * kLanes * int64_t(sizeof(T)));
  int64_t made = 0;
  adapting.share.run(pieces, 1, [&](int64_t item, int64_t) {
    const AdapterTile& tile = adapters.tiles[size_t(item / shape.splits)];
    const int64_t split = item % shape.splits, begin = split * shape.split, len = std::min(shape.split, shape.width - begin);
    const int32_t* rows = &adapters.rows[size_t(tile.begin)];
    with_count(tile.count, [&](auto known) {
      constexpr int R = decltype(known)::value;
      for (int64_t m = 0; m < op.num_lora; m++) {
        if (op.lora[m].scales[tile.slot] == 0.0f) continue;
        for (int64_t rank = 0; rank < op.lora[m].ranks[tile.slot] / kLanes; rank++) {
          f32x16 total[R];
          make(panel(item, m, rank), panel(std::min(item + 1, pieces - 1), m, rank), rows, begin, len, total);
#pragma GCC unroll 4
          for (int r = 0; r < R; r++)
            store(op.low.data + rows[r] * op.low.ld + shape.at(m, rank, split), total[r]);
        }
      }
    });
    made++;
  });
  adapting.done.fetch_add(made, std::memory_order_release);
}

template <class T>
static void shrink_floats(const OpDesc& op, const Adapting& adapting) {
  shrink<T>(op, adapting, [&](const T* panel, const T* ahead, const int32_t* rows, int64_t begin, int64_t len,
                              auto& total) {
    constexpr int R = count_of<decltype(total)>;
    const float* x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) x[r] = op.x.data + rows[r] * op.x.ld + begin;
    panel_rows<T, R, true>(panel, len, x, ahead, total);
  });
}

// count: rows of the step.
template <bool kFlip>
static void shrink_codes(const OpDesc& op, int64_t count, const Adapting& adapting) {
  shrink<uint8_t>(op, adapting, [&](const uint8_t* panel, const uint8_t* ahead, const int32_t* rows, int64_t begin,
                                    int64_t len, auto& total) {
    constexpr int R = count_of<decltype(total)>;
    ActRow x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) x[r] = act_row_of(op.x8, rows[r], count);
    panel_groups<kFlip, R>(panel, op.x8, begin / op.x8.group, (begin + len) / op.x8.group, x, ahead, total);
  });
}

// What a thread's share of a shrink reads, fetched while the linear before is made: a few lines at its every tile, so that
// they come in between those of the weights (measured, one sequence: waiting for them took 6 % of a step). Many rows have
// the time to wait, and more to fetch than is worth it.
constexpr int64_t kMostAheadRows = 8;
class LoraAhead {
 public:
  // op: the next linear; tiles: of the one at hand, between which the lines are shared out.
  // rows: of the step.
  void begin(const OpDesc& op, int64_t rows, const AdapterRows& adapters, const Share& share, int64_t tiles) {
    chunks_.clear();
    at_ = 0;
    if (!op.num_lora || rows > kMostAheadRows) return;
    const LoraShape shape(op);
    const int64_t pieces = shape.pieces(adapters), bytes = op.lora_dtype == kF32 ? 4 : op.lora_dtype == kBf16 ? 2 : 1;
    int32_t last = -1;
    for (const AdapterTile& tile : adapters.tiles) {
      if (tile.slot == last) continue;
      last = tile.slot;
      for (int64_t m = 0; m < op.num_lora; m++) {
        __builtin_prefetch(op.lora[m].scales + last);
        __builtin_prefetch(op.lora[m].ranks + last);
        if (of_codes(op)) prefetch(op.lora[m].a_scales + last * op.lora_rank, op.lora_rank * 4);
      }
    }
    last = -1;
    for (int64_t item = share.begin(pieces, share.thread); item < share.begin(pieces, share.thread + 1); item++) {
      const int64_t slot = adapters.tiles[size_t(item / shape.splits)].slot, split = item % shape.splits * shape.split;
      const int64_t size = std::min(shape.split, shape.columns - split) * kLanes * bytes;
      for (int64_t m = 0; m < op.num_lora; m++)
        for (int64_t rank = 0; rank < shape.ranks; rank++)
          chunks_.push_back({op.lora[m].a + ((slot * shape.ranks + rank) * shape.columns + split) * kLanes * bytes, size,
                             op.lora[m].scales + slot});
    }
    each_ = (int64_t(chunks_.size()) + tiles - 1) / std::max<int64_t>(tiles, 1);
  }
  void fetch() {
    for (int64_t i = 0; i < each_ && at_ < chunks_.size(); i++, at_++)
      if (*chunks_[at_].scale != 0.0f) prefetch(chunks_[at_].data, chunks_[at_].bytes);
  }

 private:
  struct Chunk {
    const uint8_t* data;
    int64_t bytes;
    const float* scale;  // 0: it is not read; fetched itself, so that begin() need not wait
  };
  std::vector<Chunk> chunks_;
  size_t at_ = 0;
  int64_t each_ = 0;
};

// What a thread adds to the tiles of a linear, some rows at a time.
class LoraSums {
 public:
  // Makes the thread's share of the shrink.
  // next: the linear behind this one, of which the thread makes about so many tiles.
  void begin(const OpDesc& op, int64_t rows, const Adapting& adapting, const OpDesc& next, int64_t tiles) {
    op_ = &op, adapting_ = &adapting, first_ = end_ = 0, ready_ = false;
    ahead_.begin(next, rows, adapting.adapters, adapting.share, tiles);
    if (!of_codes(op)) return op.lora_dtype == kBf16 ? shrink_floats<uint16_t>(op, adapting) : shrink_floats<float>(op, adapting);
    if (layout_of(op.x8, rows) == Layout::kUnsigned) shrink_codes<true>(op, rows, adapting);
    else shrink_codes<false>(op, rows, adapting);
  }
  // Rows [row, row_end) are next.
  void turn_to(int64_t row, int64_t row_end) {
    if (row != first_ || row_end != end_) first_ = row, end_ = row_end, ready_ = false;
  }
  // A tile is next: finds which modules have outputs in it, and fetches what they need.
  void turn_to_tile(int64_t tile) {
    parts_.clear();
    ahead_.fetch();
    for (int64_t m = 0; m < op_->num_lora; m++) {
      const LoraModule& module = op_->lora[m];
      if (2 * tile + 1 < module.first || (2 * tile - module.first) >> (module.stride - 1) >= module.panels) continue;
      for (int half = 0; half < 2; half++) {
        const int64_t at = 2 * tile + half - module.first, panel = at >> (module.stride - 1);  // the stride is 1 or 2
        if (at >= 0 && (at & (module.stride - 1)) == 0 && panel < module.panels) parts_.push_back({m, panel, half});
      }
    }
    int32_t last = -1;
    for (const AdapterTile& of : adapting_->adapters.tiles) {
      if (of.slot != last)
        for (const Part& part : parts_) {
          const LoraModule& module = op_->lora[part.module];
          if (module.scales[of.slot] == 0.0f) continue;
          prefetch(panel(part, of.slot), module.ranks[of.slot] * kLanes * element_bytes());
          if (of_codes(*op_)) __builtin_prefetch(panel_scales(part, of.slot));
        }
      last = of.slot;
    }
  }

  // totals [rows][2]: outputs 0..15 and 16..31 of the tile, of rows [row, row + rows), at most kWindow of them.
  __attribute__((noinline)) void add(int64_t row, int64_t rows, f32x16 (*totals)[2]) {
    const AdapterRows& adapters = adapting_->adapters;
    const size_t first = adapters.windows[size_t(row / kWindow)];
    const size_t last = adapters.windows[size_t((row + rows - 1) / kWindow) + 1];
    for (size_t i = first; i < last; i++) {
      const AdapterTile& tile = adapters.tiles[i];
      const int32_t* of_tile = &adapters.rows[size_t(tile.begin)];  // ascending
      int begin = 0, end = tile.count;
      while (begin < end && of_tile[begin] < row) begin++;
      while (end > begin && of_tile[end - 1] >= row + rows) end--;
      if (begin == end) continue;
      if (!ready_) scale_sums();
      with_count(end - begin, [&](auto known) {
        constexpr int R = decltype(known)::value;
        if (of_codes(*op_)) add_codes<R>(tile.slot, row, of_tile + begin, totals);
        else if (op_->lora_dtype == kBf16) add_panels<uint16_t, R>(tile.slot, row, of_tile + begin, totals);
        else add_panels<float, R>(tile.slot, row, of_tile + begin, totals);
      });
    }
  }

 private:
  int64_t element_bytes() const { return of_codes(*op_) ? 1 : op_->lora_dtype == kBf16 ? 2 : 4; }

  // Outputs of a module in half a tile.
  struct Part {
    int64_t module, panel;
    int half;
  };
  const uint8_t* panel(const Part& part, int32_t slot) const {
    const LoraModule& module = op_->lora[part.module];
    return module.b + (slot * module.panels + part.panel) * op_->lora_rank * kLanes * element_bytes();
  }
  const uint16_t* panel_scales(const Part& part, int32_t slot) const {
    const LoraModule& module = op_->lora[part.module];
    return module.b_scales + (slot * module.panels + part.panel) * kLanes;
  }

  template <int R>
  void add_codes(int32_t slot, int64_t row, const int32_t* rows, f32x16 (*totals)[2]) const {
    for (const Part& part : parts_) {
      const LoraModule& module = op_->lora[part.module];
      if (module.scales[slot] == 0.0f) continue;
      const int8_t* h[R];
      const LowScale* of[R];
      i32x16 sum[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const int64_t at = (rows[r] - first_) * op_->num_lora + part.module;
        h[r] = codes_.data() + at * op_->lora_rank, of[r] = &scales_[size_t(at)];
        sum[r] = of[r]->offset - i32x16{};
      }
      const uint8_t* line = panel(part, slot);
      for (int64_t k = 0; k < module.ranks[slot]; k += 4, line += 64) {
        const u8x64 four = load<u8x64>(line);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[r] = dot4<false>(sum[r], four, splat4<i8x64>(h[r] + k));
      }
      const f32x16 scale = bf16_to_f32(load<u16x16>(panel_scales(part, slot)));
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        f32x16& total = totals[rows[r] - row][part.half];
        total = fused(to_f32(sum[r]), scale * of[r]->scale, total);
      }
    }
  }

  template <class T, int R>
  void add_panels(int32_t slot, int64_t row, const int32_t* rows, f32x16 (*totals)[2]) const {
    const int64_t rank = op_->lora_rank;
    for (const Part& part : parts_) {
      const LoraModule& module = op_->lora[part.module];
      if (module.scales[slot] == 0.0f) continue;
      const float* h[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) h[r] = sums_.data() + ((rows[r] - first_) * op_->num_lora + part.module) * rank;
      f32x16 sum[R];
      panel_rows<T, R, false>((const T*)panel(part, slot), module.ranks[slot], h, nullptr, sum);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) totals[rows[r] - row][part.half] += sum[r];
    }
  }

  // scale * h of the rows at hand, all splits together: [row][module][rank], as floats or as codes.
  void scale_sums() {
    const LoraShape shape(*op_);
    const AdapterRows& adapters = adapting_->adapters;
    wait_until(adapting_->done, shape.pieces(adapters));
    const int64_t row_sums = op_->num_lora * op_->lora_rank;
    const bool codes = of_codes(*op_);
    const size_t count = size_t((end_ - first_) * row_sums);
    if (sums_.size() < count) sums_.resize(count);
    if (codes && codes_.size() < count) codes_.resize(count), scales_.resize(count);
    for (int64_t row = first_; row < end_; row++) {
      if (adapters.slots[row] < 0) continue;
      for (int64_t m = 0; m < op_->num_lora; m++) {
        const LoraModule& module = op_->lora[m];
        const int64_t slot = adapters.slots[row], at = (row - first_) * op_->num_lora + m;
        if (module.scales[slot] == 0.0f) continue;
        float* const h = sums_.data() + at * op_->lora_rank;
        for (int64_t rank = 0; rank < module.ranks[slot] / kLanes; rank++) {
          const float* low = op_->low.data + row * op_->low.ld + shape.at(m, rank, 0);
          f32x16 sum = load<f32x16>(low);
          for (int64_t split = 1; split < shape.splits; split++) sum += load<f32x16>(low + split * kLanes);
          if (codes) sum *= load<f32x16>(module.a_scales + slot * op_->lora_rank + rank * kLanes);
          store(h + rank * kLanes, sum * module.scales[slot]);
        }
        if (codes) scales_[size_t(at)] = to_codes(h, module.ranks[slot], codes_.data() + at * op_->lora_rank);
      }
    }
    ready_ = true;
  }

  // h as codes of a common scale. offset: -128 times their sum, for the 128 that codes of a panel have too much.
  struct LowScale {
    float scale;
    int32_t offset;
  };
  static LowScale to_codes(const float* h, int64_t rank, int8_t* codes) {
    const float largest = max_abs(h, rank), inverse = inverse_scale(largest, 127.0f);
    i32x16 total{};
    for (int64_t k = 0; k < rank; k += kLanes) {
      const i32x16 code = round_to_i32(load<f32x16>(h + k) * inverse);
      total += code;
      store(codes + k, i32_to_i8(code));
    }
    return {largest / 127.0f, -128 * reduce_add(total)};
  }

  const OpDesc* op_ = nullptr;
  const Adapting* adapting_ = nullptr;
  int64_t first_ = 0, end_ = 0;
  bool ready_ = false;
  std::vector<Part> parts_;
  LoraAhead ahead_;
  std::vector<float> sums_;
  std::vector<int8_t> codes_;
  std::vector<LowScale> scales_;
};

}  // namespace llmctl
