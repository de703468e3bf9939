// An attention op: which query tiles of which sequences meet which K/V heads, shared among the threads.
#pragma once
#include <algorithm>
#include <vector>

#include "attention_tiles.h"
#include "pool.h"
#include "program.h"

namespace llmctl {

// Consecutive tokens of one sequence whose queries share K/V loads.
struct RowTile {
  int32_t seq, row, count;
};

// Cuts every sequence's tokens into tiles of up to `rows_per` tokens, behind the first segment of keys of up to `wide_rows`
// (measured, prompts of 128 tokens: attention in wide tiles takes 1.2 times as long).
static inline void cut_row_tiles(const StepDesc& step, int rows_per, int wide_rows, std::vector<RowTile>& tiles) {
  tiles.clear();
  for (int64_t s = 0; s < step.seqs; s++)
    for (int32_t row = step.query_start[s]; row < step.query_start[s + 1]; row += tiles.back().count) {
      const int32_t left = step.query_start[s + 1] - row, most = step.positions[row] < kSegment ? rows_per : wide_rows;
      tiles.push_back({int32_t(s), row, left < most ? left : most});
    }
}

// How the heads of a group are packed into query tiles.
struct HeadPacking {
  int64_t group;      // query heads a K/V head
  int64_t heads_per;  // of them in one query tile
  int64_t splits;     // tiles a group
  explicit HeadPacking(int64_t heads, int64_t kv_heads)
      : group(heads / kv_heads),
        heads_per(group < kQueries ? group : kQueries),
        splits((group + heads_per - 1) / heads_per) {}
  // Tokens of a query tile of so many halves.
  int rows(int halves) const { return int(halves * kQueries / heads_per); }
};

// Query i of qs: x * scale in the type that meets K.
static inline void load_query(const KvLayer& kv, const float* x, float scale, int i, Queries& qs) {
  float* q = qs.q[i];
  int64_t d = 0;
  for (; d + 16 <= kv.dim; d += 16) store(q + d, load<f32x16>(x + d) * scale);
  for (; d < kv.padded; d++) q[d] = d < kv.dim ? x[d] * scale : 0.0f;
  qs.scale[i] = 1.0f;
  if (kv.type == kKvS8) {
    // Of a query of zeros the scale must not be 0: masked scores are -inf * scale.
    const float largest = std::max(max_abs(q, kv.padded), 1e-30f);
    i32x16 sum{};
    for (d = 0; d < kv.padded; d += 16) sum += store_query(load<f32x16>(q + d), 127.0f / largest, qs.quads[i] + d / 4);
    qs.offset[i] = -kKeyOffset * reduce_add(sum);
    qs.scale[i] = largest / 127.0f;
  } else if (kv.type == kKvBf16 && kDotPairs) {
    for (d = 0; d < kv.padded; d += 16) store(qs.q16[i] + d, f32_to_bf16(load<f32x16>(q + d)));
  }
}

// Queries of a tile: kQueries in each half, in order.
static inline void load_queries(const OpDesc& op, const StepDesc& step, const KvLayer& kv, const HeadPacking& packing,
                                const RowTile& tile, int64_t kv_head, int64_t split, Queries (&halves)[kHalves]) {
  for (Queries& qs : halves) qs.count = 0, qs.softcap = op.softcap;
  const int64_t first = kv_head * packing.group + split * packing.heads_per;
  const int64_t last = std::min(first + packing.heads_per, (kv_head + 1) * packing.group);
  int query = 0;
  for (int32_t r = 0; r < tile.count; r++) {
    const int64_t position = step.positions[tile.row + r];
    for (int64_t head = first; head < last; head++, query++) {
      Queries& qs = halves[query / kQueries];
      qs.count = query % kQueries;
      load_query(kv, op.x.data + (tile.row + r) * op.x.ld + head * kv.dim, op.scale * kLog2E, qs.count, qs);
      qs.position[qs.count] = position;
      qs.lo[qs.count] = op.window > 0 && position >= op.window ? position - op.window + 1 : 0;
      qs.count++;
    }
  }
}

// Normalises the queries' outputs into y, or as int8 into y8 (and into y, if that is set): a row's columns of one tile
// are whole activation groups.
static inline void store_outputs(const OpDesc& op, const StepDesc& step, const KvLayer& kv, const HeadPacking& packing,
                                 const RowTile& tile, int64_t kv_head, int64_t split, const Partial* totals) {
  const int64_t first = kv_head * packing.group + split * packing.heads_per;
  const int64_t last = std::min(first + packing.heads_per, (kv_head + 1) * packing.group);
  const int64_t column = first * kv.dim, width = (last - first) * kv.dim;
  alignas(64) float line[kQueries * kMaxHead];
  int query = 0;
  for (int32_t r = 0; r < tile.count; r++) {
    const int64_t row = tile.row + r;
    float* y = op.y8.codes ? line : op.y.data + row * op.y.ld + column;
    for (int64_t head = first; head < last; head++, query++, y += kv.dim) {
      const Partial& total = totals[query / kQueries];
      const int i = query % kQueries;
      const float inverse = 1.0f / total.sum[i];
      int64_t d = 0;
      for (; d + 16 <= kv.dim; d += 16) store(y + d, load<f32x16>(total.out[i] + d) * inverse);
      for (; d < kv.dim; d++) y[d] = total.out[i][d] * inverse;
    }
    if (!op.y8.codes) continue;
    const ActRow to = act_row_of(op.y8, row, step.tokens);
    for (int64_t g = 0; g < width; g += op.y8.group) quantize_group(line + g, op.y8.group, column + g, to);
  }
}

class Attention {
 public:
  // Few items (long decodes at a small batch) are cut by segment too, so that every thread has work.
  Attention(int threads, int64_t max_model_len)
      : few_(2 * threads), segments_(max_model_len / kSegment + 1), partials_(size_t(few_ * segments_)) {}

  void run(const OpDesc& op, const StepDesc& step, const KvLayer& kv, const std::vector<RowTile>& tiles, Pool& pool,
           const Share& share, const Share& share2) {
    const Items items{op, step, kv, tiles, HeadPacking(op.heads, op.kv_heads)};
    int64_t longest = 1, halves = 1;
    for (const RowTile& tile : tiles)
      if (tile.count > items.packing.rows(1)) halves = kHalves;
    if (items.count() * halves <= few_)
      for (const RowTile& tile : tiles) longest = std::max(longest, Segments(op, step, tile).count());
#if defined(LLMCTL_AMX)
    if (longest == 1 && halves > 1) configure_for_heads(kv);
#endif
    if (longest == 1)
      return share.run(items.count(), 1, [&](int64_t i, int64_t) { whole(items, i); });
    share.run(items.count() * longest, 1, [&](int64_t at, int64_t) {
      // The heads of a block lie behind each other: they are read behind each other too.
      const int64_t part = at / items.count();
      const Item item(items, at % items.count());
      if (part >= item.segments.count()) return;
      Queries qs[kHalves];
      item.load(qs);
      const Item next(items, (at + 1) % items.count());
      const Keys ahead = next.keys(std::min((at + 1) / items.count(), next.segments.count() - 1));
      for (int h = 0; h < halves && qs[h].count; h++)
        attend(kv, item.keys(part), qs[h], ahead, partials_[size_t((item.index * segments_ + part) * halves + h)]);
    });
    pool.barrier();
    share2.run(items.count(), 1, [&](int64_t i, int64_t) {
      const Item item(items, i);
      Partial* parts = &partials_[size_t(i * segments_ * halves)];
      for (int64_t part = 1; part < item.segments.count(); part++)
        for (int h = 0; h < halves; h++) merge(parts[h], parts[part * halves + h], item.queries(h), kv.padded);
      item.store(parts);
    });
  }

 private:
  // Segments of keys that a tile's queries see: first .. last-1; keys up to `end`.
  struct Segments {
    int64_t first, last, end;
    Segments(const OpDesc& op, const StepDesc& step, const RowTile& tile) {
      const int64_t low = step.positions[tile.row];
      end = step.positions[tile.row + tile.count - 1] + 1;
      first = op.window > 0 && low >= op.window ? (low - op.window + 1) / kSegment : 0;
      last = (end - 1) / kSegment + 1;
    }
    int64_t count() const { return last - first; }
  };
  // All query tiles x K/V heads of an op.
  struct Items {
    const OpDesc& op;
    const StepDesc& step;
    const KvLayer& kv;
    const std::vector<RowTile>& tiles;
    const HeadPacking packing;
    int64_t per_tile() const { return op.kv_heads * packing.splits; }
    int64_t count() const { return int64_t(tiles.size()) * per_tile(); }
  };
  // One of them.
  struct Item {
    const Items& of;
    const int64_t index;
    const RowTile& tile;
    const int64_t kv_head, split;
    const Segments segments;
    Item(const Items& items, int64_t i)
        : of(items),
          index(std::min(i, items.count() - 1)),
          tile(items.tiles[size_t(index / items.per_tile())]),
          kv_head(index % items.per_tile() / items.packing.splits),
          split(index % items.packing.splits),
          segments(items.op, items.step, tile) {}
    // In a half of them.
    int queries(int half) const {
      const int64_t left = of.packing.group - split * of.packing.heads_per;
      const int all = tile.count * int(std::min(of.packing.heads_per, left));
      return std::clamp(all - half * kQueries, 0, kQueries);
    }
    void load(Queries (&qs)[kHalves]) const { load_queries(of.op, of.step, of.kv, of.packing, tile, kv_head, split, qs); }
    void store(const Partial* totals) const {
      store_outputs(of.op, of.step, of.kv, of.packing, tile, kv_head, split, totals);
    }
    Keys keys(int64_t part) const {
      const int64_t begin = (segments.first + part) * kSegment;
      return {of.step.block_tables[of.kv.group] + tile.seq * of.step.max_blocks, kv_head, begin,
              std::min(begin + kSegment, segments.end)};
    }
  };

  static void whole(const Items& items, int64_t i) {
    const Item item(items, i);
    Queries qs[kHalves];
    Partial total[kHalves], part[kHalves];
    item.load(qs);
    const int64_t count = item.segments.count();
    const auto each = [&](auto&& attend_to) {
      for (int64_t s = 0; s < count; s++) {
        attend_to(s, s ? part : total);
        for (int h = 0; s && h < kHalves; h++) merge(total[h], part[h], qs[h].count, items.kv.padded);
      }
    };
#if defined(LLMCTL_AMX)
    if (qs[kHalves - 1].count) {
      const QueryTiles queries(qs, items.kv.padded);
      each([&](int64_t s, Partial(&to)[kHalves]) { attend_tiled(items.kv, item.keys(s), qs, queries, to); });
      return item.store(total);
    }
#endif
    each([&](int64_t s, Partial(&to)[kHalves]) {
      attend(items.kv, item.keys(s), qs[0], s + 1 < count ? item.keys(s + 1) : Item(items, i + 1).keys(0), to[0]);
    });
    item.store(total);
  }

  const int64_t few_, segments_;
  std::vector<Partial> partials_;  // [item][segment][half]
};

}  // namespace llmctl
