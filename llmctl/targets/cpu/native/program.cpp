// Walks a bound Graph: every thread runs through the op list, sharing each op's work, with a barrier after each.
#include "program.h"

#include <chrono>
#include <cstdio>
#include <exception>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "abi.h"
#include "attention_op.h"
#include "experts.h"

using namespace llmctl;

// A list of ops that steps run.
struct Walk {
  std::vector<OpDesc> ops;
  size_t tail;  // first op that runs on gathered rows
  std::vector<size_t> next_linear;  // [op] the first linear behind it, from the start again behind the last

  Walk(const OpDesc* begin, int64_t num_ops) : ops(begin, begin + num_ops), tail(ops.size()), next_linear(ops.size(), 0) {
    for (size_t i = ops.size(); i-- > 0;)
      if (ops[i].on_rows) tail = i;
    for (size_t i = 2 * ops.size(), next = 0; i-- > 0;) {
      next_linear[i % ops.size()] = next;
      if (ops[i % ops.size()].kind == kLinear) next = i % ops.size();
    }
  }
};

struct llmctl_program {
  Walk plain;
  std::unique_ptr<Walk> adapted;  // of steps with adapters
  std::vector<KvLayer> kv;
  int64_t max_rows, vocab;
  int rows_per = kQueries, wide_rows = kHalves * kQueries;  // tokens of a query tile
  Pool pool;
  Attention attention;
  std::vector<RowTile> tiles;
  std::unique_ptr<WorkCounter[]> counters;  // [op][2 phases][thread], then sampling
  std::unique_ptr<WorkCounter[]> shrunk;    // [op] pieces of a shrink that are done
  std::vector<SamplingScratch> scratch;     // a thread
  std::vector<LinearScratch> linear_scratch;  // a thread
  std::vector<int32_t> sample_index;        // logits row -> sampling row, -1 for a target
  AdapterRows adapters;
  double profile[kMaxKinds] = {};

  llmctl_program(const OpDesc* begin, int64_t num_ops, const KvDesc* kv_descs, int64_t num_kv, int64_t block_size,
                 int64_t max_tokens, int64_t rows, int64_t max_model_len, int64_t vocab_size, int threads)
      : plain(begin, num_ops),
        max_rows(rows),
        vocab(vocab_size),
        pool(threads),
        attention(pool.threads(), max_model_len),
        counters(new_counters(plain)),
        shrunk(new WorkCounter[plain.ops.size()]),
        scratch(size_t(pool.threads()), SamplingScratch(vocab_size)),
        linear_scratch(size_t(pool.threads())) {
    for (int64_t i = 0; i < num_kv; i++)
      kv.push_back({kv_descs[i].base, kv_descs[i].kv_heads, kv_descs[i].head_dim, kv_descs[i].padded_dim,
                    KvType(kv_descs[i].type), block_size, kv_descs[i].group});
    // Query tiles of two halves meet an int8 cache only.
    const bool tiled = have_tiles() && std::all_of(kv.begin(), kv.end(), [](const KvLayer& k) { return k.type == kKvS8; });
    for (const OpDesc& op : plain.ops) {
      if (op.kind != kAttention) continue;
      const HeadPacking packing(op.heads, op.kv_heads);
      rows_per = std::min(rows_per, packing.rows(1));
      wide_rows = std::min(wide_rows, packing.rows(tiled ? kHalves : 1));
    }
    tiles.reserve(size_t(max_tokens));
    sample_index.reserve(size_t(max_tokens));
  }

  std::unique_ptr<WorkCounter[]> new_counters(const Walk& walk) const {
    return std::unique_ptr<WorkCounter[]>(new WorkCounter[(2 * walk.ops.size() + 1) * size_t(pool.threads())]);
  }

  // The attention ops must be those of the first list.
  void adapt(const OpDesc* begin, int64_t num_ops) {
    adapted = std::make_unique<Walk>(begin, num_ops);
    if (adapted->ops.size() <= plain.ops.size()) return;
    counters = new_counters(*adapted);
    shrunk.reset(new WorkCounter[adapted->ops.size()]);
  }

  Share share(size_t phase, int thread) {
    return {&counters[phase * size_t(pool.threads())], thread, pool.threads()};
  }
};

namespace {

// A row of a packed table. It lies in pieces of 4 columns, a line apart: K / 4 cache lines, for one row a token.
void packed_row(const OpDesc& op, int64_t id, float* y) {
  const Weights w = weights_of(op);
  switch (op.weight_dtype) {
    case kW4: unpack_row<4, false>(w, id, op.width, y); break;
    case kW8: unpack_row<8, false>(w, id, op.width, y); break;
    case kW4Min: unpack_row<4, true>(w, id, op.width, y); break;
    default: unpack_row<8, true>(w, id, op.width, y);
  }
  for (int64_t i = 0; i < op.width; i++) y[i] *= op.scale;
}

void embed_row(const OpDesc& op, int64_t id, float* y) {
  if (is_int(op.weight_dtype)) return packed_row(op, id, y);
  const uint8_t* row = op.w + id * op.width * (op.weight_dtype == kF32 ? 4 : 2);
  for (int64_t i = 0; i < op.width; i++) {
    const float value = op.weight_dtype == kF32    ? ((const float*)row)[i]
                        : op.weight_dtype == kBf16 ? bf16_to_f32(((const uint16_t*)row)[i])
                                                   : f16_to_f32(((const uint16_t*)row)[i]);
    y[i] = value * op.scale;
  }
}

// One row of a norm into y.
void norm_row(const OpDesc& op, int64_t row, float* y) {
  const float* x = op.x.data + row * op.x.ld;
  if (op.x2.data) {
    float* sum = op.y2.data + row * op.y2.ld;
    add_row(x, op.x2.data + row * op.x2.ld, sum, op.width);
    x = sum;
  }
  if (op.kind == kRmsNorm) rms_norm_row(x, (const float*)op.w, y, op.width, op.eps, op.offset);
  else layer_norm_row(x, (const float*)op.w, op.bias, y, op.width, op.eps);
}

// The columns of a linear's operand, in the order of its weight, into y.
void operand_row(const OpDesc& op, int64_t row, float* y) {
  const float* x = op.x.data + row * op.x.ld;
  if (!op.permutation) std::memcpy(y, x, size_t(op.width) * 4);
  else for (int64_t i = 0; i < op.width; i++) y[i] = x[op.permutation[i]];
}

// Rows of an op that writes int8: as fp32 to `lines` [rows][k], then quantised together.
void int8_rows(const OpDesc& op, const RowRange& range, float* lines) {
  const int64_t k = op.y8.k;
  for (int64_t row = range.first; row < range.last; row++) {
    float* line = lines + (row - range.first) * k;
    if (op.kind == kQuantize) operand_row(op, row, line);
    else norm_row(op, row, line);
    std::fill(line + op.width, line + k, 0.0f);
  }
  for (int64_t g = 0; g < k; g += op.y8.group) quantize_columns(lines + g, k, g, op.y8, range);
}

void head_norm_row(const OpDesc& op, int64_t row) {
  for (int64_t h = 0; h < op.heads; h++)
    rms_norm_row(op.x.data + row * op.x.ld + h * op.head_dim, (const float*)op.w,
                 op.y.data + row * op.y.ld + h * op.head_dim, op.head_dim, op.eps, op.offset);
}

void rotate(const OpDesc& op, const Matrix& x, const Matrix& y, int64_t heads, int64_t row, int64_t position) {
  const float *cos = op.cos + position * (op.rotary_dim / 2), *sin = op.sin + position * (op.rotary_dim / 2);
  float* out = y.data + row * y.ld;
  if (y.data != x.data) std::memcpy(out, x.data + row * x.ld, size_t(heads * op.head_dim) * 4);
  for (int64_t h = 0; h < heads; h++) rope_head(out + h * op.head_dim, cos, sin, op.rotary_dim, op.neox != 0);
}

void write_kv(const KvLayer& kv, const StepDesc& step, const Matrix& k, const Matrix& v, int64_t row) {
  const int64_t slot = step.slots[kv.group * step.tokens + row];
  if (slot < 0) return;
  for (int64_t h = 0; h < kv.kv_heads; h++)
    kv_store(kv, slot, h, k.data + row * k.ld + h * kv.dim, v.data + row * v.ld + h * kv.dim);
}

void to_bf16_row(const OpDesc& op, int64_t row) {
  const float* x = op.x.data + row * op.x.ld;
  uint16_t* y = op.x16 + row * op.k;
  for (int64_t i = 0; i < op.k; i++) y[i] = i < op.width ? f32_to_bf16(x[i]) : 0;
}

void row_op(const llmctl_program& p, const OpDesc& op, const StepDesc& step, int64_t row, int64_t first_logits_row,
            float* line) {
  const float* x = op.x.data ? op.x.data + row * op.x.ld : nullptr;
  float* y = op.y.data ? op.y.data + row * op.y.ld : nullptr;
  switch (op.kind) {
    case kEmbed: return embed_row(op, step.token_ids[row], y);
    case kPosEmbed:
      embed_row(op, step.positions[row] + int64_t(op.offset), line);
      return add_row(x, line, y, op.width);
    case kRmsNorm:
    case kLayerNorm: return norm_row(op, row, y);
    case kHeadRmsNorm: return head_norm_row(op, row);
    case kAct: return act_row(x, y, op.width, Act(op.act));
    case kCap: return cap_row(x, y, op.width, op.scale, op.softcap);
    case kMul: return mul_row(x, op.x2.data + row * op.x2.ld, y, op.width);
    case kAdd: return add_row(x, op.x2.data + row * op.x2.ld, y, op.width);
    case kRope:
      rotate(op, op.x, op.y, op.heads, row, step.positions[row]);
      rotate(op, op.x2, op.y2, op.kv_heads, row, step.positions[row]);
      if (op.writes_kv) write_kv(p.kv[size_t(op.layer)], step, op.y2, op.x3, row);
      return;
    case kKvWrite: return write_kv(p.kv[size_t(op.layer)], step, op.x, op.x2, row);
    case kGatherRows:
      std::memcpy(y, op.x.data + step.logits_rows[first_logits_row + row] * op.x.ld, size_t(op.width) * 4);
      return;
    case kToBf16: return to_bf16_row(op, row);
    case kRoute: return route_row(op, row, line);
    case kWeightedSum: return weighted_sum_row(op, row, y);
    default: return;
  }
}

void run_op(llmctl_program& p, const Walk& walk, size_t index, const StepDesc& step, int64_t rows,
            int64_t first_logits_row, int thread, std::vector<float>& line) {
  const OpDesc& op = walk.ops[index];
  const Share share = p.share(2 * index, thread);
  if (op.kind == kLinear) {
    const Adapting adapting{p.adapters, p.share(2 * index + 1, thread), p.shrunk[index].next};
    linear_op(op, rows, share, adapting, walk.ops[walk.next_linear[index]], p.linear_scratch[size_t(thread)]);
  } else if (op.kind == kAttention) {
    p.attention.run(op, step, p.kv[size_t(op.layer)], p.tiles, p.pool, share, p.share(2 * index + 1, thread));
  } else if (op.kind == kGroupedLinear) {
    const Ahead after = first_weights(walk.ops[walk.next_linear[index]], thread, p.pool.threads());
    grouped_linear_op(op, share, after.next, p.linear_scratch[size_t(thread)]);
  } else if (op.kind == kSortRows) {
    if (thread == 0) sort_rows(op.choice, rows);
  } else if (op.kind == kGatherExperts) {
    if (line.size() < size_t(op.y8.k)) line.resize(size_t(op.y8.k));
    const int64_t unit = rows > 8 * p.pool.threads() ? 8 : 1;
    share.run(rows * op.choice.top_k, unit, [&](int64_t begin, int64_t end) {
      for (int64_t place = begin; place < end; place++) gather_row(op, place, line.data());
    });
  } else {
    // A block of int8 rows shares cache lines: two threads writing them take 1.5 times as long as one (8 rows, measured).
    const int64_t unit = op.y8.codes || rows > 8 * p.pool.threads() ? 8 : 1;
    const size_t scratch = size_t(op.y8.codes ? 8 * op.y8.k : op.kind == kRoute ? route_scratch(op.width) : op.width);
    if (line.size() < scratch) line.resize(scratch);
    share.run((rows + unit - 1) / unit, 1, [&](int64_t begin, int64_t end) {
      const RowRange range{begin * unit, std::min(end * unit, rows), rows};
      if (op.y8.codes) return int8_rows(op, range, line.data());
      for (int64_t row = range.first; row < range.last; row++) row_op(p, op, step, row, first_logits_row, line.data());
    });
  }
}

void finish_row(llmctl_program& p, const StepDesc& step, const SamplingDesc& sampling, int64_t row, float* logits,
                SamplingScratch& scratch) {
  const int32_t target = step.targets ? step.targets[row] : -1;
  if (target < 0) return sample_row(sampling, p.sample_index[size_t(row)], logits, p.vocab, scratch);
  report_logprobs(step.out, row, logits, p.vocab, target, step.target_tops[row], scratch);
}

// Up to this many rows a step is bound by the reading of weights; a thread that waits then fetches what it will read next,
// up to kFetchBytes (a quarter of a core's second-level cache).
constexpr int64_t kFetchRows = 8, kFetchBytes = 512 << 10;

struct Step {
  llmctl_program& p;
  const Walk& walk;
  const StepDesc& step;
  const SamplingDesc& sampling;

  void operator()(int thread) {
    static thread_local std::vector<float> line;
    run_range(0, walk.tail, step.tokens, 0, thread, line);
    const Matrix& logits = walk.ops.back().y;
    for (int64_t first = 0; first < step.rows; first += p.max_rows) {
      const int64_t rows = std::min(p.max_rows, step.rows - first);
      if (first) {
        if (thread == 0) reset_counters(walk.tail);
        p.pool.barrier();
      }
      run_range(walk.tail, walk.ops.size(), rows, first, thread, line);
      p.share(2 * walk.ops.size(), thread).run(rows, 1, [&](int64_t row, int64_t) {
        finish_row(p, step, sampling, first + row, logits.data + row * logits.ld, p.scratch[size_t(thread)]);
      });
      p.pool.barrier();
    }
#if defined(LLMCTL_AMX)
    if (have_tiles()) release_tiles();  // or the system would save them whenever this thread makes room for another
#endif
  }

  void run_range(size_t begin, size_t end, int64_t rows, int64_t first, int thread, std::vector<float>& line) {
    auto then = std::chrono::steady_clock::now();
    size_t fetching = walk.ops.size();
    Ahead weights{};
    for (size_t i = begin; i < end; i++) {
      run_op(p, walk, i, step, rows, first, thread, line);
      if (fetching != walk.next_linear[i] && rows <= kFetchRows) {
        fetching = walk.next_linear[i];
        weights = first_weights(walk.ops[fetching], thread, p.pool.threads());
        weights.bytes = std::min(weights.bytes, kFetchBytes);
      }
      p.pool.barrier([&] { return weights.fetch_some(); });
      if (thread == 0) {
        const auto now = std::chrono::steady_clock::now();
        p.profile[walk.ops[i].kind] += std::chrono::duration<double, std::micro>(now - then).count();
        then = now;
      }
    }
  }

  void reset_counters(size_t from) {
    const size_t threads = size_t(p.pool.threads());
    for (size_t i = 2 * from * threads; i < (2 * walk.ops.size() + 1) * threads; i++)
      p.counters[i].next.store(0, std::memory_order_relaxed);
    for (size_t i = from; i < walk.ops.size(); i++) p.shrunk[i].next.store(0, std::memory_order_relaxed);
  }
};

}  // namespace

static char create_error[256] = "";

extern "C" {

uint64_t llmctl_abi_digest() { return kAbiDigest; }

const char* llmctl_abi_entry(int64_t i, int64_t* value) {
  if (i < 0 || i >= int64_t(std::size(kAbi))) return nullptr;
  *value = kAbi[i].value;
  return kAbi[i].name;
}

const char* llmctl_variant() {
  if (have_tiles()) return "amx";
#if defined(LLMCTL_AVX512_BF16)
  return "avx512bf16";
#elif defined(LLMCTL_AVX512)
  return "avx512vnni";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}

const char* llmctl_refusal() { return tile_permission.refusal; }

llmctl_program* llmctl_create(const OpDesc* ops, int64_t num_ops, const KvDesc* kv, int64_t num_kv, int64_t block_size,
                              int64_t max_tokens, int64_t max_rows, int64_t max_model_len, int64_t vocab, int threads) {
  try {
    return new llmctl_program(ops, num_ops, kv, num_kv, block_size, max_tokens, max_rows, max_model_len, vocab, threads);
  } catch (const std::exception& error) {  // no C++ exception crosses into Python: it would abort the process
    std::snprintf(create_error, sizeof create_error, "%s", error.what());
    return nullptr;
  }
}

int llmctl_adapt(llmctl_program* program, const OpDesc* ops, int64_t num_ops) {
  try {
    program->adapt(ops, num_ops);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

const char* llmctl_create_error() { return create_error; }

void llmctl_destroy(llmctl_program* program) { delete program; }

int llmctl_step(llmctl_program* program, const StepDesc* step, const SamplingDesc* sampling) {
  cut_row_tiles(*step, program->rows_per, program->wide_rows, program->tiles);
  program->sample_index.clear();
  int32_t samples = 0;
  for (int64_t row = 0; row < step->rows; row++)
    program->sample_index.push_back(step->targets && step->targets[row] >= 0 ? -1 : samples++);
  const Walk& walk = step->adapters && program->adapted ? *program->adapted : program->plain;
  if (step->adapters) program->adapters.group(step->adapters, step->tokens);
  Step run{*program, walk, *step, *sampling};
  run.reset_counters(0);
  program->pool.run(run);
  return 0;
}

int64_t llmctl_weight_bytes(llmctl_program* program) {
  int64_t total = 0;
  for (LinearScratch& scratch : program->linear_scratch) total += std::exchange(scratch.weight_bytes, 0);
  return total;
}

void llmctl_profile(llmctl_program* program, double* out) {
  for (int i = 0; i < kMaxKinds; i++) {
    out[i] = program->profile[i];
    program->profile[i] = 0;
  }
}
}
