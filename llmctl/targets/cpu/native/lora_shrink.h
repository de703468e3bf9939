// The first work of an adapted linear's phase: x by the adapters' first matrices, as partial sums.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "lora_panels.h"
#include "pool.h"

namespace llmctl {

constexpr int64_t kSplit = 128;     // columns of x a partial sum, at least; whole activation groups, or even
constexpr int64_t kShrinkChunks = 8;  // pieces of a shrink are handed out in about so many chunks a thread
constexpr int64_t kMaxSplits = 16;  // partial sums: wider x has longer ones

// What a thread needs of a step to let adapters act on a linear. share: of the shrink; done: pieces of it that are.
struct Adapting {
  const AdapterRows& adapters;
  const Share share;
  std::atomic<int64_t>& done;
};

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
// row_of(row) is what is to be known of a row; make(panel, ahead, rows, begin, len, total) is the product of a panel and
// columns [begin, begin + len) of what is known of the rows.
template <class T, class RowOf, class F>
static inline void shrink(const OpDesc& op, const Adapting& adapting, RowOf&& row_of, F&& make) {
  const LoraShape shape(op);
  const AdapterRows& adapters = adapting.adapters;
  const int64_t pieces = shape.pieces(adapters), chunk = std::max<int64_t>(1, pieces / (adapting.share.threads * kShrinkChunks));
  const auto panel = [&](int64_t m, int64_t slot, int64_t rank, int64_t begin) {
    return (const T*)op.lora[m].a + ((slot * shape.ranks + rank) * shape.columns + begin) * kLanes;
  };
  const int64_t first = adapting.share.begin(pieces, adapting.share.thread);
  if (first < pieces) {
    const int64_t index = first / shape.splits, slot = adapters.tiles[size_t(index)].slot;
    for (int64_t m = 0; m < op.num_lora; m++)
      prefetch(panel(m, slot, 0, (first - index * shape.splits) * shape.split), shape.split * kLanes * int64_t(sizeof(T)));
  }
  int64_t made = 0, known_index = -1;
  decltype(row_of(0)) known[kLoraRows];
  adapting.share.run(pieces, chunk, [&](int64_t item, int64_t end) {
    int64_t index = item / shape.splits, split = item - index * shape.splits;
    for (made += end - item; item < end; item++) {
      const AdapterTile& tile = adapters.tiles[size_t(index)];
      const int32_t* const rows = &adapters.rows[size_t(tile.begin)];
      if (index != known_index)
        for (int r = 0; r < tile.count; r++) known[r] = row_of(rows[r]);
      known_index = index;
      const int64_t begin = split * shape.split, len = std::min(shape.split, shape.width - begin), at = split;
      if (++split == shape.splits) split = 0, index += index + 1 < int64_t(adapters.tiles.size());
      const int64_t next_slot = adapters.tiles[size_t(index)].slot, next_begin = split * shape.split;
      with_count(tile.count, [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (int64_t m = 0; m < op.num_lora; m++) {
          if (op.lora[m].scales[tile.slot] == 0.0f) continue;
          for (int64_t rank = 0; rank < op.lora[m].ranks[tile.slot] / kLanes; rank++) {
            f32x16 total[R];
            make(panel(m, tile.slot, rank, begin), panel(m, next_slot, rank, next_begin), known, begin, len, total);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) store(op.low.data + rows[r] * op.low.ld + shape.at(m, rank, at), total[r]);
          }
        }
      });
    }
  });
  adapting.done.fetch_add(made, std::memory_order_release);
}

template <class T>
static void shrink_floats(const OpDesc& op, const Adapting& adapting) {
  const auto row_of = [&](int64_t row) { return (const float*)op.x.data + row * op.x.ld; };
  shrink<T>(op, adapting, row_of, [&](const T* panel, const T* ahead, const float* const* rows, int64_t begin, int64_t len,
                                      auto& total) {
    constexpr int R = count_of<decltype(total)>;
    const float* x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) x[r] = rows[r] + begin;
    panel_rows<T, R, true>(panel, len, x, ahead, total);
  });
}

// count: rows of the step. kLayout: of its codes.
template <Layout kLayout>
static void shrink_codes(const OpDesc& op, int64_t count, const Adapting& adapting) {
  const auto row_of = [&](int64_t row) { return act_row_of(op.x8, row, count); };
  const int64_t group = op.x8.group;
  shrink<uint8_t>(op, adapting, row_of, [&](const uint8_t* panel, const uint8_t* ahead, const ActRow* rows, int64_t begin,
                                            int64_t len, auto& total) {
    constexpr int R = count_of<decltype(total)>;
    panel_groups<kLayout == Layout::kUnsigned, kLayout == Layout::kTiled, R>(panel, op.x8, begin / group,
                                                                            (begin + len) / group, rows, ahead, total);
  });
}

// count: rows of the step.
static inline void shrink(const OpDesc& op, int64_t count, const Adapting& adapting) {
  if (op.lora_dtype == kF32) return shrink_floats<float>(op, adapting);
  if (op.lora_dtype == kBf16) return shrink_floats<uint16_t>(op, adapting);
  switch (layout_of(op.x8, count)) {
    case Layout::kSigned: return shrink_codes<Layout::kSigned>(op, count, adapting);
    case Layout::kUnsigned: return shrink_codes<Layout::kUnsigned>(op, count, adapting);
    case Layout::kTiled:
      if constexpr (kTilesCompiled) return shrink_codes<Layout::kTiled>(op, count, adapting);
  }
}

// What a thread's share of a shrink reads, fetched while the linear before is made: a few lines at its every tile, so that
// they come in between those of the weights (measured, one sequence: waiting for them took 6 % of a step). Many rows have
// the time to wait, and more to fetch than is worth it (measured, 32 rows of 8 adapters: no faster with it).
constexpr int64_t kMostAheadRows = 8;
class LoraAhead {
 public:
  // op: the next linear; rows: of the step; tiles: of the linear at hand, between which the lines are shared out. What
  // tells which lines there are is fetched at once, and read at the first tile.
  void begin(const OpDesc& op, int64_t rows, const AdapterRows& adapters, const Share& share, int64_t tiles) {
    spans_.clear();
    at_ = 0, tiles_ = rows > kMostAheadRows || !op.num_lora ? 0 : tiles;
    if (!tiles_) return;
    op_ = &op, adapters_ = &adapters, share_ = &share;
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
  }
  void fetch() {
    if (tiles_) list(), tiles_ = 0;
    for (int64_t left = each_; left > 0 && at_ < spans_.size();) {
      Span& span = spans_[at_];
      const int64_t bytes = std::min(left, span.bytes);
      prefetch(span.next, bytes);
      left -= bytes, span.next += bytes, span.bytes -= bytes;
      at_ += span.bytes == 0;
    }
  }

 private:
  struct Span {
    const uint8_t* next;
    int64_t bytes;
  };
  // The columns of a thread's pieces lie side by side: a span for each tile of rows, module and panel.
  void list() {
    const LoraShape shape(*op_);
    const int64_t column_bytes = kLanes * (op_->lora_dtype == kF32 ? 4 : op_->lora_dtype == kBf16 ? 2 : 1);
    const int64_t pieces = shape.pieces(*adapters_), end = share_->begin(pieces, share_->thread + 1);
    int64_t bytes = 0;
    for (int64_t item = share_->begin(pieces, share_->thread), next; item < end; item = next) {
      const int64_t index = item / shape.splits, first = index * shape.splits;
      next = std::min(end, first + shape.splits);
      const int64_t slot = adapters_->tiles[size_t(index)].slot, begin = (item - first) * shape.split;
      const int64_t columns = std::min((next - first) * shape.split, shape.columns) - begin;
      for (int64_t m = 0; m < op_->num_lora; m++) {
        const LoraModule& module = op_->lora[m];
        if (module.scales[slot] == 0.0f) continue;
        for (int64_t rank = 0; rank < module.ranks[slot] / kLanes; rank++) {
          const int64_t at = (slot * shape.ranks + rank) * shape.columns + begin;
          spans_.push_back({module.a + at * column_bytes, columns * column_bytes});
          bytes += columns * column_bytes;
        }
      }
    }
    each_ = (bytes / tiles_ + 63) / 64 * 64;
  }

  const OpDesc* op_ = nullptr;
  const AdapterRows* adapters_ = nullptr;
  const Share* share_ = nullptr;
  std::vector<Span> spans_;
  size_t at_ = 0;
  int64_t tiles_ = 0, each_ = 0;
};

}  // namespace llmctl
