// A linear op over all its tiles: micro-kernel, adapters (lora.h), bias, gated epilogue, then fp32 or int8 output.
#pragma once
#include <algorithm>
#include <vector>

#include "gemm_tiles.h"
#include "lora.h"
#include "pool.h"
#include "program.h"
#include "rowops.h"

namespace llmctl {

constexpr int64_t kRowsAThread = 64;  // rows a thread from which rows are shared instead of the weight
constexpr int64_t kMinPatch = 8, kMaxPatch = 32;  // blocks of 8 rows that meet a tile of weights, see patch_blocks()
constexpr int64_t kPatchBytes = 1 << 20;  // of their operands and outputs, half a core's L2
constexpr int64_t kPieces = 8;            // pieces of work a thread: whoever is done takes over others'
constexpr int64_t kMaxActGroup = 128;     // columns an activation scale

// Outputs of a block of rows: n columns, row stride ld. lora: what adapters add to them, or null; row: the first, of the
// step.
struct Outputs {
  float* data;
  int64_t ld, n;
  LoraSums* lora;
  int64_t row;
  Outputs from(int64_t of_step) const { return {data + (of_step - row) * ld, ld, n, lora, of_step}; }
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

static constexpr int weight_bits(const OpDesc& op) {
  if (op.code_bits) return int(op.code_bits);
  switch (op.weight_dtype) {
    case kW4: case kW4Min: case kBook4: return 4;
    case kW8: case kW8Min: case kE4m3: return 8;
    case kBf16: case kF16: return 16;
    default: return 32;
  }
}

static constexpr int int_bits(int type) { return type == kW4 || type == kW4Min ? 4 : 8; }
static constexpr bool has_minimums(int type) { return type == kW4Min || type == kW8Min; }
static constexpr bool is_int(int type) { return type == kW4 || type == kW8 || has_minimums(type); }

static inline bool in_tiles(const OpDesc& op, int64_t rows) {
  return is_int(op.weight_dtype) && layout_of(op.x8, rows) == Layout::kTiled;
}

static inline Weights weights_of(const OpDesc& op) {
  const NestedScales nested{op.w_scale_codes, op.w_scale_supers, op.nested, op.nested_bits};
  const MappedScales mapped{op.w_scale_codes, op.w_scale_supers32, op.w_scale_starts, op.w_scale_map, op.nested};
  return {op.w,        op.w_scales, op.w_zeros, op.w_minimums, op.w_scales32, op.w_book,
          op.n_padded, op.k,        op.group,   op.zero_step,  nested,        mapped,
          (op.k + op.group - 1) / op.group * kTile, op.code_bits, op.k * kTile * weight_bits(op) / 8};
}

// How a linear's tiles are handed out: an activation group of int8 outputs is made by one thread.
struct Units {
  int64_t tiles, tiles_per, count;
  explicit Units(const OpDesc& op)
      : tiles(op.n_padded / kTile),
        tiles_per(op.y8.codes ? op.y8.group / (op.act ? kLanes : kTile) : 1),
        count(tiles / tiles_per) {}
};

// A thread's scratch: a ReadyTile or what multiply_tiles() unpacks, and the fp32 outputs of a patch on their way to int8.
class LinearScratch {
 public:
  ReadyTile ready(int64_t k, int64_t act_group) {
    int8_t* const codes = tile(ReadyTile::bytes(k, act_group));
    return {codes, (int32_t*)(codes + k * kTile)};
  }
  int8_t* tile(int64_t bytes) { return (int8_t*)room(lines_, bytes); }
  // w as it is read for one tile: with its scales multiplied out and, where lines are read, its codes in lines.
  template <int kType, bool kLines>
  Weights of_tile(const Weights& w, int64_t tile) {
    Weights one = w;
    if constexpr (is_int(kType) && kLines)
      if (w.code_bits) join<kType>(w, tile, one);
    if constexpr (kType == kE4m3) spread(w, tile, one);
    else if (w.nested.shared) multiply_out<kType>(w, tile, one);
    return one;
  }
  float* columns() { return columns_.data(); }
  LoraSums lora;
  int64_t weight_bytes = 0;  // read by this thread, each once an op however many patches meet it

 private:
  struct alignas(64) Line {  // the micro-kernel loads whole cache lines
    uint8_t bytes[64];
  };
  static uint8_t* room(std::vector<Line>& lines, int64_t bytes) {
    const size_t count = size_t(bytes + 63) / 64;
    if (lines.size() < count) lines.resize(count);
    return lines.data()->bytes;
  }
  template <int kType>
  void join(const Weights& w, int64_t tile, Weights& one) {
    constexpr int kBits = int_bits(kType);
    uint8_t* const to = room(codes_, w.k * kTile * kBits / 8);
    const uint8_t bias = field_bias(kBits, has_minimums(kType), w.code_bits);
    join_codes(int(w.code_bits), w.codes_of(tile), w.k / kUnitColumns, bias, to);
    one.data = to, one.code_bits = one.code_step = 0;
  }
  // A scale of half a tile to each of its outputs.
  void spread(const Weights& w, int64_t tile, Weights& one) {
    const int64_t groups = w.tile_step / kTile;
    float* const to = (float*)room(scales_, groups * 128);
    const float* const from = w.scales32 + tile * groups * 2;
    for (int64_t i = 0; i < groups * 2; i++) store(to + i * kLanes, splat(from[i]));
    one.scales32 = to, one.tile_step = 0;
  }
  template <int kType>
  void multiply_out(const Weights& w, int64_t tile, Weights& one) {
    const int64_t groups = w.tile_step / kTile;
    uint8_t* const to = room(scales_, groups * 128);
    one.tile_step = 0;
    if constexpr (is_int(kType)) {
      constexpr bool kMin = has_minimums(kType);
      uint8_t* const codes = w.nested.bits ? room(scale_codes_, groups * NestedScales::line<kMin>) : nullptr;
      w.nested.multiply_out<kMin>(w.nested.joined<kMin>(tile, groups, codes), tile, groups, (uint16_t*)to);
      one.scales = (const uint16_t*)to;
      if (kMin) one.minimums = one.scales + groups * kTile;
    } else {
      w.mapped.multiply_out(tile, groups, (float*)to);
      one.scales32 = (const float*)to;
    }
  }
  std::vector<Line> lines_, codes_, scale_codes_, scales_;
  std::vector<float> columns_ = std::vector<float>(size_t(8 * kMaxPatch * kMaxActGroup));
};

// A store to a line that is no longer in cache would wait for memory (512 rows: 120 ms without, 107 with).
static inline void fetch_outputs(const OpDesc& op, const Outputs& y, int64_t at, int64_t rows) {
  for (int64_t r = 0; r < rows; r++)
    prefetch_to_write(y.data + r * y.ld + at * (op.act ? kLanes : kTile), op.act ? 64 : 128);
}

template <int kType, int kFields, bool kMany, int R>
static inline void block_tile(const OpDesc& op, const Weights& w, const ReadyTile& ready, int64_t tile, int64_t row,
                              const Ahead& ahead, const Outputs& y, int64_t at) {
  fetch_outputs(op, y, at, R);
  f32x16 total[R][2];
  if constexpr (is_int(kType))
    int_tile<int_bits(kType), kFields, kMany, has_minimums(kType), R>(w, ready, op.x8, tile, row, ahead, total);
  else if constexpr (kType == kE4m3) book_tile<8, R>(w, op.x.data, op.x.ld, tile, row, total);
  else if constexpr (kType == kBook4) book_tile<4, R>(w, op.x.data, op.x.ld, tile, row, total);
  else if constexpr (kType == kBf16) bf16_tile<R>(w, op.x16, w.k, tile, row, total);
  else f32_tile<R>(w, op.x.data, op.x.ld, tile, row, total);
  if (y.lora) {
    f32x16 sums[R][2];  // a copy: total would have to lie in memory from the start
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r][0] = total[r][0], sums[r][1] = total[r][1];
    y.lora->add(row, R, sums);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) total[r][0] = sums[r][0], total[r][1] = sums[r][1];
  }
  finish_tile<R>(op, tile, y, at, total);
}

// A rectangle of a linear's work: rows [row, row_end) of the step's `rows`, at most 8 * kMaxPatch; units [unit, unit_end).
// own_end: tile behind the last that the thread is to have when all are equally fast; it reads `after` next.
struct Patch {
  int64_t rows, row, row_end, unit, unit_end, own_end;
  const uint8_t* after;
};

// One tile for the rows of a patch; y: outputs of the patch's first row, at: the tile's place in them.
template <int kType, int kFields, Layout kLayout>
static void tile_rows(const OpDesc& op, const Weights& w, const Patch& patch, int64_t tile, const Outputs& y, int64_t at,
                      LinearScratch& scratch) {
  constexpr bool kMany = kLayout == Layout::kUnsigned;
  ReadyTile ready{};
  const int64_t tile_bytes = w.k * kTile * weight_bits(op) / 8;
  Ahead ahead{tile + 1 == patch.own_end ? patch.after : op.w + (tile + 1) * tile_bytes, 0};
  if constexpr (kMany) {
    ahead.bytes = tile_bytes / ((patch.row_end - patch.row + 7) / 8);
    ready = scratch.ready(w.k, op.x8.group);
    make_ready<int_bits(kType), has_minimums(kType)>(w, tile, op.x8.group, ready);
  }
  for (int64_t row = patch.row; row < patch.row_end; ahead.next += ahead.bytes) {
    const Outputs here = y.from(row);
    const int count = block_rows(row, patch.rows);
    switch (count) {
      case 8: block_tile<kType, kFields, kMany, 8>(op, w, ready, tile, row, ahead, here, at); break;
      case 4: block_tile<kType, kFields, kMany, 4>(op, w, ready, tile, row, ahead, here, at); break;
      case 2: block_tile<kType, kFields, kMany, 2>(op, w, ready, tile, row, ahead, here, at); break;
      default: block_tile<kType, kFields, kMany, 1>(op, w, ready, tile, row, ahead, here, at);
    }
    row += count;
  }
}

// Few rows, of codes in lines or by their bits.
template <int kType>
static inline void few_rows(const OpDesc& op, const Weights& w, const Patch& patch, int64_t tile, const Outputs& y,
                            int64_t at, LinearScratch& scratch) {
  if constexpr (is_int(kType)) {
    constexpr int kShort = int_bits(kType) == 4 ? 2 : 5, kLong = kShort + 1;
    if (w.code_bits == kShort) return tile_rows<kType, kShort, Layout::kSigned>(op, w, patch, tile, y, at, scratch);
    if (w.code_bits == kLong) return tile_rows<kType, kLong, Layout::kSigned>(op, w, patch, tile, y, at, scratch);
  }
  tile_rows<kType, 0, Layout::kSigned>(op, w, patch, tile, y, at, scratch);
}

#if defined(LLMCTL_AMX)
// The same in tile registers.
template <int kType>
static void tile_rows_tiled(const OpDesc& op, const Weights& w, const Patch& patch, int64_t tile, const Outputs& y,
                            int64_t at, LinearScratch& scratch) {
  constexpr int kBits = int_bits(kType);
  constexpr bool kMin = has_minimums(kType);
  const int64_t tile_bytes = w.k * kTile * weight_bits(op) / 8;
  const Ahead ahead{tile + 1 == patch.own_end ? patch.after : op.w + (tile + 1) * tile_bytes, tile_bytes};
  int8_t* const room = scratch.tile(unpacked_bytes(op.x8, patch.row_end - patch.row));
  multiply_tiles<kBits, kMin>(
      w, op.x8, tile, patch.row, patch.row_end, ahead, room,
      [&](int64_t row, int64_t rows, PairTotals& totals) {
        fetch_outputs(op, y.from(row), at, rows);
        if (y.lora) y.lora->add(row, rows, totals.at[0]);
        int64_t r = 0;
        for (; r + 8 <= rows; r += 8) finish_tile<8>(op, tile, y.from(row + r), at, totals.at[r / 8]);
        for (; r < rows; r++) {
          f32x16 total[1][2] = {{totals.row(r)[0], totals.row(r)[1]}};
          finish_tile<1>(op, tile, y.from(row + r), at, total);
        }
      });
}
#endif

template <int kType, Layout kLayout>
static void linear_patch(const OpDesc& op, const Units& units, const Patch& patch, LinearScratch& scratch) {
  const Weights all = weights_of(op);
  const int64_t group = op.y8.group;
  LoraSums* const lora = op.num_lora ? &scratch.lora : nullptr;
  if (lora) lora->turn_to(patch.row, patch.row_end);
  const Outputs y = op.y8.codes ? Outputs{scratch.columns(), group, group, lora, patch.row}
                                : Outputs{op.y.data + patch.row * op.y.ld, op.y.ld, op.n, lora, patch.row};
  for (int64_t unit = patch.unit; unit < patch.unit_end; unit++) {
    for (int64_t i = 0; i < units.tiles_per; i++) {
      const int64_t tile = unit * units.tiles_per + i, at = op.y8.codes ? i : tile;
      if (lora) lora->turn_to_tile(tile);
      constexpr bool kLines = kLayout != Layout::kSigned;
      const bool shared = kType == kE4m3 && op.scale_rows > 1;
      const bool made = (is_int(kType) || kType == kBook4) && (op.nested || (kLines && op.code_bits));
      const Weights w = made || shared ? scratch.of_tile<kType, kLines>(all, tile) : all;
#if defined(LLMCTL_AMX)
      if constexpr (kLayout == Layout::kTiled) {
        tile_rows_tiled<kType>(op, w, patch, tile, y, at, scratch);
        continue;
      }
#endif
      if constexpr (kLines) tile_rows<kType, 0, kLayout>(op, w, patch, tile, y, at, scratch);
      else few_rows<kType>(op, w, patch, tile, y, at, scratch);
    }
    if (!op.y8.codes) continue;
    quantize_columns(y.data, y.ld, unit * group, op.y8, {patch.row, patch.row_end, patch.rows});
  }
}

template <int kType>
static inline void int_patch(const OpDesc& op, const Units& units, const Patch& patch, LinearScratch& scratch) {
  switch (layout_of(op.x8, patch.rows)) {
    case Layout::kSigned: return linear_patch<kType, Layout::kSigned>(op, units, patch, scratch);
    case Layout::kUnsigned: return linear_patch<kType, Layout::kUnsigned>(op, units, patch, scratch);
    case Layout::kTiled:
      if constexpr (kTilesCompiled) return linear_patch<kType, Layout::kTiled>(op, units, patch, scratch);
  }
}

static inline void linear_patch(const OpDesc& op, const Units& units, const Patch& patch, LinearScratch& scratch) {
  switch (op.weight_dtype) {
    case kW4: return int_patch<kW4>(op, units, patch, scratch);
    case kW8: return int_patch<kW8>(op, units, patch, scratch);
    case kW4Min: return int_patch<kW4Min>(op, units, patch, scratch);
    case kW8Min: return int_patch<kW8Min>(op, units, patch, scratch);
    case kE4m3: return linear_patch<kE4m3, Layout::kSigned>(op, units, patch, scratch);
    case kBook4: return linear_patch<kBook4, Layout::kSigned>(op, units, patch, scratch);
    case kBf16: return linear_patch<kBf16, Layout::kSigned>(op, units, patch, scratch);
    default: return linear_patch<kF32, Layout::kSigned>(op, units, patch, scratch);
  }
}

// Blocks of a patch: the more, the cheaper a ReadyTile for each, as long as they stay in cache from tile to tile
// (measured, 256 rows on one core: 103 ms for 109 with patches of 64; but outputs of 3 MB, 75 ms for 54).
static inline int64_t patch_blocks(const OpDesc& op) {
  const int64_t bytes = op.k * std::max(8, weight_bits(op)) / 8 + op.n * (op.y8.codes ? 1 : 4);
  return std::clamp(kPatchBytes / bytes / 8, kMinPatch, kMaxPatch);
}

// The weight bytes that a thread reads first when the threads share the weight: all of its own share.
static inline Ahead first_weights(const OpDesc& op, int thread, int threads) {
  const Units units(op);
  const int64_t unit_bytes = units.tiles_per * op.k * kTile * weight_bits(op) / 8;
  const int64_t begin = units.count * thread / threads, end = units.count * (thread + 1) / threads;
  return {op.w + begin * unit_bytes, (end - begin) * unit_bytes};
}

// How a linear's blocks of rows are cut into patches of about equal size: as many for each of `ranges` threads.
struct Cut {
  int64_t rows, block, blocks, patches;
  Cut(const OpDesc& op, int64_t rows, int64_t ranges)
      : rows(rows), block(in_tiles(op, rows) ? kTileRows : 8), blocks((rows + block - 1) / block) {
    const int64_t most = (blocks + ranges - 1) / ranges, largest = patch_blocks(op) * 8 / block;
    patches = (most + largest - 1) / largest * ranges;
  }
  int64_t row(int64_t patch) const { return std::min(blocks * patch / patches * block, rows); }
};

// Few rows: threads share the weight. Many: they share the rows, as they do in every other op, so that activations stay
// in the cache of the core that made them (measured, 512 rows on 2 cores: linears 136 ms for 148); a patch is handed out
// in pieces, for the last of which the threads would wait. next: the linear behind this one.
static inline void linear_op(const OpDesc& op, int64_t rows, const Share& share, const Adapting& adapting,
                             const OpDesc& next, LinearScratch& scratch) {
  const Units units(op);
  const uint8_t* const after = first_weights(next, share.thread, share.threads).next;
  if (op.num_lora) scratch.lora.begin(op, rows, adapting, next, units.tiles / share.threads);
  const bool by_rows = rows >= kRowsAThread * share.threads;
  const Cut cut(op, rows, by_rows ? share.threads : 1);
#if defined(LLMCTL_AMX)
  if (in_tiles(op, rows)) configure_for(op.x8.group);
#endif
  const int64_t pieces = std::min(units.count, by_rows ? kPieces : share.threads * kPieces);
  const auto unit_of = [&](int64_t piece) { return units.count * piece / pieces; };
  const int64_t own_end = (by_rows ? units.count : unit_of(share.begin(pieces, share.thread + 1))) * units.tiles_per;
  share.run(by_rows ? cut.patches * pieces : pieces, 1, [&](int64_t item, int64_t) {
    const int64_t piece = item % pieces, unit = unit_of(piece), unit_end = unit_of(piece + 1);
    const int64_t first = by_rows ? item / pieces : 0, last = by_rows ? first + 1 : cut.patches;
    if (!first) scratch.weight_bytes += (unit_end - unit) * units.tiles_per * op.k * kTile * weight_bits(op) / 8;
    for (int64_t patch = first; patch < last; patch++)
      linear_patch(op, units, {rows, cut.row(patch), cut.row(patch + 1), unit, unit_end, own_end, after}, scratch);
  });
}

}  // namespace llmctl
