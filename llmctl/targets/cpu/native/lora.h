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
#include <vector>

#include "lora_shrink.h"

namespace llmctl {

// What a thread adds to the tiles of a linear, some rows at a time.
class LoraSums {
 public:
  // Makes the thread's share of the shrink.
  // next: the linear behind this one, of which the thread makes about so many tiles.
  void begin(const OpDesc& op, int64_t rows, const Adapting& adapting, const OpDesc& next, int64_t tiles) {
    op_ = &op, adapting_ = &adapting, first_ = end_ = 0;
    rank_bytes_ = kLanes * (of_codes(op) ? 1 : op.lora_dtype == kBf16 ? 2 : 4), panel_bytes_ = op.lora_rank * rank_bytes_;
    if (parts_.size() < size_t(2 * op.num_lora)) parts_.resize(size_t(2 * op.num_lora));
    ahead_.begin(next, rows, adapting.adapters, adapting.share, tiles);
    shrink(op, rows, adapting);
  }
  // Rows [row, row_end) are next.
  void turn_to(int64_t row, int64_t row_end) {
    if (row == first_ && row_end == end_) return;
    first_ = row, end_ = row_end, ready_ = false;
    list();
  }
  // A tile is next: finds which modules have outputs in it, and fetches what they need.
  void turn_to_tile(int64_t tile) {
    ahead_.fetch();
    num_parts_ = 0;
    for (int64_t m = 0; m < op_->num_lora; m++) {
      const LoraModule& module = op_->lora[m];
      const int shift = int(module.stride) - 1;  // the stride is 1 or 2
      const int64_t at = 2 * tile - module.first, panels = module.panels;
      if (at < -1 || at >> shift >= panels) continue;
      if (!shift) {
        const int begin = at < 0, end = at + 1 < panels ? 2 : 1;
        parts_[size_t(num_parts_++)] = {m, at + begin, begin, end - begin};
      } else {
        const int half = int(at & 1);
        const int64_t panel = (at + half) >> 1;
        if (panel < panels) parts_[size_t(num_parts_++)] = {m, panel, half, 1};
      }
    }
    fetch_panels();
  }

  // totals [rows][2]: outputs 0..15 and 16..31 of the tile, of rows [row, row + rows), at most kWindow of them.
  __attribute__((noinline)) void add(int64_t row, int64_t rows, f32x16 (*totals)[2]) {
    if (lows_.empty()) return;
    if (!ready_) scale_sums();
    if (of_codes(*op_)) add_parts<uint8_t>(row, rows, totals);
    else if (op_->lora_dtype == kBf16) add_parts<uint16_t>(row, rows, totals);
    else add_parts<float>(row, rows, totals);
  }

 private:
  // Outputs of a module in a tile: from panel number `panel` on, one or both of its halves.
  struct Part {
    int64_t module, panel;
    int half, halves;
  };
  // Rows of one adapter, ascending, and what a module of it adds to them. b, b_scales: the adapter's.
  // scales, offsets: of h as codes; an offset is -128 times their sum, for the 128 that codes of a panel have too much.
  struct Low {
    const uint8_t* b;
    const uint16_t* b_scales;
    const float* a_scales;
    int32_t ranks, count, slot;
    int32_t rows[kLoraRows];
    float scales[kLoraRows];
    int32_t offsets[kLoraRows];
  };

  // What the parts read, to the second-level cache: the tile's own weights and operands fill the first (measured on one
  // core, 32 rows of 8 adapters, a layer of a 135M model: 151 us more than without adapters, to the first 158).
  inline __attribute__((always_inline)) void fetch_panels() const {
    for (int p = 0; p < num_parts_; p++) {
      const Part& part = parts_[size_t(p)];
      const int32_t* const of_module = begins(part.module);
      const uint8_t* last = nullptr;
      for (int32_t i = of_module[0]; i < of_module[windows_]; i++) {
        const Low& low = lows_[size_t(i)];
        if (low.b == last) continue;
        last = low.b;
        for (int half = 0; half < part.halves; half++)
          prefetch<2>(low.b + (part.panel + half) * panel_bytes_, low.ranks * rank_bytes_);
        if (low.b_scales) __builtin_prefetch(low.b_scales + part.panel * kLanes);
      }
    }
  }

  // Where a module's rows of each window begin in lows_, and their end.
  const int32_t* begins(int64_t module) const { return begins_.data() + module * (windows_ + 1); }
  template <class T>
  T* low_of(std::vector<T>& of, size_t i) const {
    return of.data() + i * size_t(kLoraRows * op_->lora_rank);
  }

  // Which rows of the patch have which adapter, a module at a time.
  void list() {
    const AdapterRows& adapters = adapting_->adapters;
    const int64_t rank = op_->lora_rank, first = first_ / kWindow;
    windows_ = (end_ - 1) / kWindow - first + 1;
    begins_.clear(), lows_.clear();
    for (int64_t m = 0; m < op_->num_lora; m++) {
      const LoraModule& module = op_->lora[m];
      for (int64_t window = first; window < first + windows_; window++) {
        begins_.push_back(int32_t(lows_.size()));
        for (size_t i = adapters.windows[size_t(window)]; i < adapters.windows[size_t(window) + 1]; i++) {
          const AdapterTile& tile = adapters.tiles[i];
          if (module.scales[tile.slot] == 0.0f) continue;
          Low low{};
          for (int32_t r = 0; r < tile.count; r++) {
            const int32_t row = adapters.rows[size_t(tile.begin + r)];
            if (row >= first_ && row < end_) low.rows[low.count++] = row;
          }
          if (!low.count) continue;
          low.slot = tile.slot, low.ranks = module.ranks[tile.slot];
          low.b = module.b + tile.slot * module.panels * panel_bytes_;
          if (of_codes(*op_)) low.b_scales = module.b_scales + tile.slot * module.panels * kLanes;
          if (of_codes(*op_)) low.a_scales = module.a_scales + tile.slot * rank;
          lows_.push_back(low);
        }
      }
      begins_.push_back(int32_t(lows_.size()));
    }
  }

  template <class T>
  void add_parts(int64_t row, int64_t rows, f32x16 (*totals)[2]) {
    const int64_t window = row / kWindow - first_ / kWindow, end = (row + rows - 1) / kWindow - first_ / kWindow + 1;
    for (int p = 0; p < num_parts_; p++) {
      const Part& part = parts_[size_t(p)];
      const int32_t* const of_module = begins(part.module);
      for (int32_t i = of_module[window]; i < of_module[end]; i++) {
        const Low& low = lows_[size_t(i)];
        int from = 0, to = low.count;
        while (from < to && low.rows[from] < row) from++;
        while (to > from && low.rows[to - 1] >= row + rows) to--;
        if (from == to) continue;
        with_count(to - from, [&](auto known) {
          constexpr int R = decltype(known)::value;
          const Adding adding{low, size_t(i), from, row, totals};
          if constexpr (!std::is_same_v<T, uint8_t>) add_floats<T, R>(adding, part);
          else if (part.halves == 2) add_codes<R, 2>(adding, part);
          else add_codes<R, 1>(adding, part);
        });
      }
    }
  }

  // Rows of lows_[index] from number `from` on; row: the first of totals.
  struct Adding {
    const Low& low;
    size_t index;
    int from;
    int64_t row;
    f32x16 (*totals)[2];
    f32x16* total(int r) const { return totals[low.rows[from + r] - row]; }
  };

  template <int R, int kHalves>
  inline __attribute__((always_inline)) void add_codes(const Adding& adding, const Part& part) {
    const Low& low = adding.low;
    const int64_t rank = op_->lora_rank;
    const int8_t* const h = low_of(codes_, adding.index) + adding.from * rank;
    const uint8_t* line = low.b + part.panel * panel_bytes_;
    i32x16 sum[R][kHalves];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; half++) sum[r][half] = low.offsets[adding.from + r] - i32x16{};
    for (int64_t k = 0; k < low.ranks; k += kLanes) {
#pragma GCC unroll 4
      for (int64_t four = k; four < k + kLanes; four += 4, line += 64) {
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; half++) {
          const u8x64 codes = load<u8x64>(line + half * panel_bytes_);
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) sum[r][half] = dot4<false>(sum[r][half], codes, splat4<i8x64>(h + r * rank + four));
        }
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; half++) {
      const f32x16 scale = bf16_to_f32(load<u16x16>(low.b_scales + (part.panel + half) * kLanes));
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        f32x16& total = adding.total(r)[part.half + half];
        total = fused(to_f32(sum[r][half]), scale * low.scales[adding.from + r], total);
      }
    }
  }

  template <class T, int R>
  void add_floats(const Adding& adding, const Part& part) {
    const float* h[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) h[r] = low_of(sums_, adding.index) + (adding.from + r) * op_->lora_rank;
    for (int half = 0; half < part.halves; half++) {
      f32x16 sum[R];
      panel_rows<T, R, false>((const T*)(adding.low.b + (part.panel + half) * panel_bytes_), adding.low.ranks, h, nullptr,
                              sum);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) adding.total(r)[part.half + half] += sum[r];
    }
  }

  // scale * h of the patch's rows, all splits together: as floats or as codes.
  void scale_sums() {
    const LoraShape shape(*op_);
    const bool codes = of_codes(*op_);
    const int64_t rank = op_->lora_rank;
    wait_until(adapting_->done, shape.pieces(adapting_->adapters));
    const size_t count = lows_.size() * size_t(kLoraRows * rank);
    if (sums_.size() < count) sums_.resize(count);
    if (codes && codes_.size() < count) codes_.resize(count);
    for (int64_t m = 0; m < op_->num_lora; m++) {
      for (size_t i = size_t(begins(m)[0]); i < size_t(begins(m)[windows_]); i++) {
        Low& low = lows_[i];
        const float scale = op_->lora[m].scales[low.slot];
        for (int r = 0; r < low.count; r++) {
          float* const h = low_of(sums_, i) + r * rank;
          for (int64_t k = 0; k < low.ranks; k += kLanes) {
            const float* parts = op_->low.data + low.rows[r] * op_->low.ld + shape.at(m, k / kLanes, 0);
            f32x16 sum = load<f32x16>(parts);
            for (int64_t split = 1; split < shape.splits; split++) sum += load<f32x16>(parts + split * kLanes);
            if (codes) sum *= load<f32x16>(low.a_scales + k);
            store(h + k, sum * scale);
          }
          if (codes) low.scales[r] = to_codes(h, low.ranks, low_of(codes_, i) + r * rank, low.offsets[r]);
        }
      }
    }
    ready_ = true;
  }

  // h as codes; returns their scale.
  static float to_codes(const float* h, int64_t rank, int8_t* codes, int32_t& offset) {
    const float largest = max_abs(h, rank), inverse = inverse_scale(largest, 127.0f);
    i32x16 total{};
    for (int64_t k = 0; k < rank; k += kLanes) {
      const i32x16 code = round_to_i32(load<f32x16>(h + k) * inverse);
      total += code;
      store(codes + k, i32_to_i8(code));
    }
    offset = -128 * reduce_add(total);
    return largest / 127.0f;
  }

  const OpDesc* op_ = nullptr;
  const Adapting* adapting_ = nullptr;
  int64_t first_ = 0, end_ = 0, windows_ = 0, rank_bytes_ = 0, panel_bytes_ = 0;
  bool ready_ = false;
  int num_parts_ = 0;
  std::vector<Part> parts_;
  std::vector<Low> lows_;
  std::vector<int32_t> begins_;
  LoraAhead ahead_;
  std::vector<float> sums_;
  std::vector<int8_t> codes_;
};

}  // namespace llmctl
