// An attention op: which query tiles of which sequences meet which K/V heads, shared among the threads.
#pragma once
#include <algorithm>
#include <vector>

#include "attention.h"
#include "pool.h"
#include "program.h"

namespace llmctl {

// Consecutive tokens of one sequence whose queries share K/V loads.
struct RowTile {
  int32_t seq, row, count;
};

// Cuts every sequence's tokens into tiles of up to `rows_per` tokens.
static inline void cut_row_tiles(const StepDesc& step, int rows_per, std::vector<RowTile>& tiles) {
  tiles.clear();
  for (int64_t s = 0; s < step.seqs; s++)
    for (int32_t row = step.query_start[s]; row < step.query_start[s + 1]; row += rows_per) {
      const int32_t left = step.query_start[s + 1] - row;
      tiles.push_back({int32_t(s), row, left < rows_per ? left : rows_per});
    }
}

// How the heads of a group are packed into query tiles.
struct HeadPacking {
  int64_t group;      // query heads a K/V head
  int64_t heads_per;  // of them in one query tile
  int64_t splits;     // tiles a group
  int rows_per;       // tokens a tile
  explicit HeadPacking(int64_t heads, int64_t kv_heads)
      : group(heads / kv_heads),
        heads_per(group < kQueries ? group : kQueries),
        splits((group + heads_per - 1) / heads_per),
        rows_per(int(kQueries / heads_per)) {}
};

// x as int16 codes with scale max|x| / 32767, returned; n a multiple of 16.
static inline float query_codes(const float* x, int64_t n, int16_t* codes) {
  const float largest = max_abs(x, n), inverse = inverse_scale(largest, 32767.0f);
  for (int64_t d = 0; d < n; d += 16) store(codes + d, f32_to_i16(load<f32x16>(x + d) * inverse));
  return largest / 32767.0f;
}

static inline void load_queries(const OpDesc& op, const StepDesc& step, const KvLayer& kv, const HeadPacking& packing,
                                const RowTile& tile, int64_t kv_head, int64_t split, Queries& qs) {
  qs.count = 0;
  qs.softcap = op.softcap;
  const int64_t first = kv_head * packing.group + split * packing.heads_per;
  const int64_t last = std::min(first + packing.heads_per, (kv_head + 1) * packing.group);
  for (int32_t r = 0; r < tile.count; r++) {
    const int64_t position = step.positions[tile.row + r];
    for (int64_t head = first; head < last; head++, qs.count++) {
      const float* q = op.x.data + (tile.row + r) * op.x.ld + head * kv.dim;
      float* out = qs.q[qs.count];
      for (int64_t d = 0; d < kv.dim; d++) out[d] = q[d] * op.scale;
      for (int64_t d = kv.dim; d < kv.padded; d++) out[d] = 0;
      if (kv.type == kKvBf16 && kDotPairs)
        for (int64_t d = 0; d < kv.padded; d += 16) store(qs.q16[qs.count] + d, f32_to_bf16(load<f32x16>(out + d)));
      if (kv.type == kKvInt8) qs.code_scale[qs.count] = query_codes(out, kv.padded, qs.codes[qs.count]);
      qs.position[qs.count] = position;
      qs.lo[qs.count] = op.window > 0 && position >= op.window ? position - op.window + 1 : 0;
    }
  }
}

// Normalises the queries' outputs into y, or as int8 into y8: a row's columns of one tile are whole activation groups.
static inline void store_outputs(const OpDesc& op, const StepDesc& step, const KvLayer& kv, const HeadPacking& packing,
                                 const RowTile& tile, int64_t kv_head, int64_t split, const Partial& total) {
  const int64_t first = kv_head * packing.group + split * packing.heads_per;
  const int64_t last = std::min(first + packing.heads_per, (kv_head + 1) * packing.group);
  const int64_t column = first * kv.dim, width = (last - first) * kv.dim;
  alignas(64) float line[kQueries * kMaxHead];
  int i = 0;
  for (int32_t r = 0; r < tile.count; r++) {
    const int64_t row = tile.row + r;
    float* y = op.y8.codes ? line : op.y.data + row * op.y.ld + column;
    for (int64_t head = first; head < last; head++, i++, y += kv.dim) {
      const float inverse = 1.0f / total.sum[i];
      for (int64_t d = 0; d < kv.dim; d++) y[d] = total.out[i][d] * inverse;
    }
    if (!op.y8.codes) continue;
    const ActRow to = act_row_of(op.y8, row, step.tokens);
    for (int64_t g = 0; g < width; g += op.y8.group) quantize_group(line + g, op.y8.group, op.y8.group, column + g, to);
  }
}

// Segments of keys that a tile's queries see: first .. last-1.
static inline void tile_segments(const OpDesc& op, const StepDesc& step, const RowTile& tile, int64_t& first,
                                 int64_t& last) {
  const int64_t low = step.positions[tile.row], high = step.positions[tile.row + tile.count - 1];
  first = op.window > 0 && low >= op.window ? (low - op.window + 1) / kSegment : 0;
  last = high / kSegment + 1;
}

class Attention {
 public:
  // Few items (long decodes at a small batch) are cut by segment too, so that every thread has work.
  Attention(int threads, int64_t max_model_len)
      : few_(2 * threads), segments_(max_model_len / kSegment + 1), partials_(size_t(few_ * segments_)) {}

  void run(const OpDesc& op, const StepDesc& step, const KvLayer& kv, const std::vector<RowTile>& tiles, Pool& pool,
           const Share& share, const Share& share2) {
    const HeadPacking packing(op.heads, op.kv_heads);
    const int64_t per_tile = op.kv_heads * packing.splits, items = int64_t(tiles.size()) * per_tile;
    int64_t longest = 1;
    if (items <= few_)
      for (const RowTile& tile : tiles) {
        int64_t first, last;
        tile_segments(op, step, tile, first, last);
        longest = std::max(longest, last - first);
      }
    if (longest == 1) return whole(op, step, kv, packing, tiles, per_tile, items, share);
    share.run(items * longest, 1, [&](int64_t begin, int64_t) {
      const int64_t item = begin / longest, part = begin % longest;
      const RowTile& tile = tiles[size_t(item / per_tile)];
      int64_t first, last;
      tile_segments(op, step, tile, first, last);
      if (first + part >= last) return;
      const int64_t kv_head = item % per_tile / packing.splits, split = item % packing.splits;
      Queries qs;
      load_queries(op, step, kv, packing, tile, kv_head, split, qs);
      attend_one(kv, step.block_tables + tile.seq * step.max_blocks, kv_head, qs, first + part,
                 partials_[size_t(item * segments_ + part)]);
    });
    pool.barrier();
    share2.run(items, 1, [&](int64_t item, int64_t) {
      const RowTile& tile = tiles[size_t(item / per_tile)];
      int64_t first, last;
      tile_segments(op, step, tile, first, last);
      const int64_t kv_head = item % per_tile / packing.splits, split = item % packing.splits;
      Partial* parts = &partials_[size_t(item * segments_)];
      const int count = int(tile.count * packing.heads_per);
      for (int64_t part = 1; part < last - first; part++) merge(parts[0], parts[part], count, kv.padded);
      store_outputs(op, step, kv, packing, tile, kv_head, split, parts[0]);
    });
  }

 private:
  // The first K tiles that an item will read.
  static void prefetch_keys(const OpDesc& op, const StepDesc& step, const KvLayer& kv, const RowTile& tile,
                            int64_t kv_head) {
    const int32_t* blocks = step.block_tables + tile.seq * step.max_blocks;
    int64_t first, last;
    tile_segments(op, step, tile, first, last);
    const int64_t begin = first * kSegment;
    for (int64_t key = begin; key < begin + 4 * kKeys && key <= step.positions[tile.row]; key += kKeys)
      prefetch(kv.tile(blocks[key / kv.block_size], kv_head, key % kv.block_size), kv.half_bytes());
  }

  static void whole(const OpDesc& op, const StepDesc& step, const KvLayer& kv, const HeadPacking& packing,
                    const std::vector<RowTile>& tiles, int64_t per_tile, int64_t items, const Share& share) {
    share.run(items, 1, [&](int64_t item, int64_t) {
      const RowTile& tile = tiles[size_t(item / per_tile)];
      int64_t first, last;
      tile_segments(op, step, tile, first, last);
      const int64_t kv_head = item % per_tile / packing.splits, split = item % packing.splits;
      const int64_t ahead = item + 1;
      if (ahead < items) prefetch_keys(op, step, kv, tiles[size_t(ahead / per_tile)], ahead % per_tile / packing.splits);
      Queries qs;
      Partial total, part;
      load_queries(op, step, kv, packing, tile, kv_head, split, qs);
      const int32_t* blocks = step.block_tables + tile.seq * step.max_blocks;
      attend_one(kv, blocks, kv_head, qs, first, total);
      for (int64_t s = first + 1; s < last; s++) {
        attend_one(kv, blocks, kv_head, qs, s, part);
        merge(total, part, qs.count, kv.padded);
      }
      store_outputs(op, step, kv, packing, tile, kv_head, split, total);
    });
  }

  const int64_t few_, segments_;
  std::vector<Partial> partials_;  // [item][segment]
};

}  // namespace llmctl
