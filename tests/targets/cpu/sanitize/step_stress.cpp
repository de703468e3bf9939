// ThreadSanitizer on whole steps: a tiny decoder layer (random weights, every op that threads share work in) run for
// prefill, decode and mixed batches at several thread counts. The outputs must not depend on the thread count.
#include "program.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>

using namespace llmctl;

namespace {

constexpr int64_t kWidth = 64, kHeads = 4, kKvHeads = 2, kDim = 16, kVocab = 96, kTokens = 260, kGroup = 32;
constexpr int64_t kAdapters = 3, kOdd = 131;  // columns, in two sums
constexpr int64_t kBlock = 16, kBlocks = 56, kLength = 640;

struct Memory {
  std::vector<std::unique_ptr<float[]>> blocks;
  std::mt19937 random{1};

  float* floats(int64_t count, float scale) {
    blocks.emplace_back(new float[size_t(count) + 16]());
    float* start = (float*)((uintptr_t(blocks.back().get()) + 63) & ~uintptr_t(63));
    std::normal_distribution<float> normal(0, 1);
    for (int64_t i = 0; scale > 0 && i < count; i++) start[i] = normal(random) * scale;
    return start;
  }
  Matrix rows(int64_t width) { return {floats(kTokens * width, 0), width}; }
  uint8_t* bytes(int64_t count, int bits) {
    auto* start = (uint8_t*)floats(count / 4 + 1, 0);
    for (int64_t i = 0; i < count; i++) start[i] = uint8_t(random() & ((1u << bits) - 1));
    return start;
  }
};

struct Layer {
  Memory memory;
  std::vector<OpDesc> ops, adapted;
  std::vector<KvDesc> kv;
  std::vector<LoraModule> modules;

  Layer(const Layer&) = delete;

  OpDesc& add(Kind kind, Matrix x, Matrix y, int64_t width) {
    OpDesc op{};
    op.kind = kind;
    op.x = x;
    op.y = y;
    op.width = width;
    op.eps = 1e-5f;
    op.scale = 1.0f;
    ops.push_back(op);
    return ops.back();
  }

  IntActs operand(int64_t width) {
    return {(int8_t*)memory.bytes(kTokens * width, 1), memory.floats(kTokens * width / kGroup, 0),
            (int32_t*)memory.floats(kTokens * width / kGroup, 0), width, kGroup, 0, 0};
  }

  // A 4- or 8-bit linear of an int8 operand.
  OpDesc& linear(IntActs x8, int64_t n, DType type) {
    OpDesc& op = add(kLinear, {}, {}, x8.k);
    op.x8 = x8;
    op.weight_dtype = type;
    op.n = op.n_padded = n;
    op.k = x8.k;
    op.group = kGroup;
    op.zero_step = kTile;
    op.w = memory.bytes(n * x8.k, 8);
    op.w_zeros = memory.bytes(n * x8.k / kGroup, type == kW4 ? 4 : 8);
    auto* scales = (uint16_t*)memory.bytes(2 * n * x8.k / kGroup, 8);
    for (int64_t i = 0; i < n * x8.k / kGroup; i++) scales[i] = type == kW4 ? 0x2000 : 0x1000;  // 2^-7, 2^-11
    op.w_scales = scales;
    return op;
  }

  Layer() {
    ops.reserve(32);  // references into it are kept
    const Matrix x = memory.rows(kWidth), normed = memory.rows(kWidth), q = memory.rows(kHeads * kDim);
    const Matrix k = memory.rows(kKvHeads * kDim), v = memory.rows(kKvHeads * kDim);
    const Matrix projected = memory.rows(kWidth), activated = memory.rows(kWidth), again = memory.rows(kWidth);
    const Matrix sum = memory.rows(kWidth), gathered = memory.rows(kWidth);
    OpDesc& embed = add(kEmbed, {}, x, kWidth);
    embed.w = (const uint8_t*)memory.floats(kVocab * kWidth, 1);
    embed.weight_dtype = kF32;
    add(kRmsNorm, x, normed, kWidth).w = (const uint8_t*)memory.floats(kWidth, 1);
    for (const auto& part : {std::pair<Matrix, int64_t>{q, kHeads * kDim}, {k, kKvHeads * kDim}, {v, kKvHeads * kDim}}) {
      OpDesc& op = add(kLinear, normed, part.first, kWidth);
      op.weight_dtype = kF32;
      op.n = op.n_padded = part.second;
      op.k = op.group = kWidth;
      op.w = (const uint8_t*)memory.floats(part.second * kWidth, 0.2f);
    }
    const size_t behind_qkv = ops.size();  // three linears
    OpDesc& rope = add(kRope, q, q, kHeads * kDim);
    rope.x2 = rope.y2 = k;
    rope.x3 = v;
    rope.heads = kHeads;
    rope.kv_heads = kKvHeads;
    rope.head_dim = rope.rotary_dim = kDim;
    rope.neox = rope.writes_kv = 1;
    rope.cos = memory.floats(kLength * kDim / 2, 1);
    rope.sin = memory.floats(kLength * kDim / 2, 1);
    OpDesc& attention = add(kAttention, q, {}, kHeads * kDim);
    attention.heads = kHeads;
    attention.kv_heads = kKvHeads;
    attention.head_dim = kDim;
    attention.scale = 0.25f;
    // int8 from attention, from a gated linear, and from an op of its own.
    const IntActs gated = operand(64), own = operand(kWidth);
    attention.y8 = operand(kHeads * kDim);
    OpDesc& first = linear(attention.y8, 128, kW4);
    first.act = int32_t(Act::kSilu);
    first.n = 64;
    first.y8 = gated;
    linear(gated, kWidth, kW8).y = projected;
    add(kAct, projected, activated, kWidth).act = int32_t(Act::kGeluTanh);
    add(kQuantize, activated, {}, kWidth).y8 = own;
    const Matrix odd = memory.rows(kOdd);
    OpDesc& embed_odd = add(kEmbed, {}, odd, kOdd);
    embed_odd.w = (const uint8_t*)memory.floats(kVocab * kOdd, 1);
    embed_odd.weight_dtype = kF32;
    const size_t behind_odd = ops.size();
    linear(own, kWidth, kW4).y = again;
    add(kAdd, x, sum, kWidth).x2 = again;
    add(kGatherRows, sum, gathered, kWidth).on_rows = 1;
    OpDesc& head = add(kLinear, gathered, memory.rows(kVocab), kWidth);
    head.on_rows = 1;
    head.weight_dtype = kF32;
    head.n = head.n_padded = kVocab;
    head.k = head.group = kWidth;
    head.w = (const uint8_t*)memory.floats(kVocab * kWidth, 0.2f);
    const int64_t cache = 2 * kBlocks * kBlock * kKvHeads * kDim;
    kv.push_back({(uint8_t*)memory.floats(cache, 0), kKvHeads, kDim, kDim, 0, 1});  // of the second KV group
    adapt(behind_qkv - 3, behind_qkv + 2);
    act_on(adapted[behind_odd], odd, kOdd, kBf16, {{0, 1, kWidth / kLanes, 0, 0, 0, 0, 0, 0}});
  }

  // The same ops with kAdapters adapters of q, k and v, of which the last one leaves k alone, and of gate and up.
  void adapt(size_t qkv, size_t gated) {
    adapted = ops;
    modules.reserve(6);  // pointers into it are kept
    for (size_t i = qkv; i < qkv + 3; i++) {
      const int64_t panels = adapted[i].n / kLanes;
      act_on(adapted[i], adapted[i].x, kWidth, kF32, {{0, 1, panels, 0, 0, 0, 0, 0, 0}});
    }
    const int64_t panels = adapted[gated].n / kLanes;
    act_on(adapted[gated], {}, 0, kW8, {{0, 2, panels, 0, 0, 0, 0, 0, 0}, {1, 2, panels, 0, 0, 0, 0, 0, 0}});
  }

  // Panels of adapters. Codes are random bytes. In bf16 of values one after the other in place: no value is written before it is read.
  const uint8_t* matrices(int64_t count, DType type) {
    if (type == kW8) return memory.bytes(count, 8);
    auto* start = (uint8_t*)memory.floats(count, 0.2f);
    for (int64_t i = 0; type == kBf16 && i < count; i++) std::memmove(start + 2 * i, start + 4 * i + 2, 2);
    return start;
  }

  void act_on(OpDesc& op, Matrix x, int64_t width, DType type, const std::vector<LoraModule>& of) {
    constexpr int64_t kRank = 32;
    op.lora = modules.data() + modules.size();
    op.x = x;
    op.width = width;
    op.num_lora = int64_t(of.size());
    op.lora_rank = kRank;
    op.lora_dtype = type;
    const LoraShape shape(op);
    op.low = memory.rows(op.num_lora * kRank * shape.splits);
    for (LoraModule module : of) {
      float* scales = memory.floats(kAdapters, 0);
      for (int64_t slot = 0; slot < kAdapters; slot++) scales[slot] = slot + 1 == kAdapters && modules.size() == 1 ? 0 : 0.5f;
      module.scales = scales;
      auto* ranks = (int32_t*)memory.floats(kAdapters, 0);
      for (int64_t slot = 0; slot < kAdapters; slot++) ranks[slot] = slot ? kRank : kRank / 2;
      module.ranks = ranks;
      float* a_scales = memory.floats(kAdapters * kRank, 0);
      std::fill(a_scales, a_scales + kAdapters * kRank, 1e-3f);
      module.a_scales = a_scales;
      auto* b_scales = (uint16_t*)memory.floats(kAdapters * module.panels * kLanes, 0);
      std::fill(b_scales, b_scales + kAdapters * module.panels * kLanes, uint16_t(0x3b00));  // 2^-9
      module.b_scales = b_scales;
      module.a = matrices(kAdapters * kRank * shape.columns, type);
      module.b = matrices(kAdapters * kRank * module.panels * kLanes, type);
      modules.push_back(module);
    }
  }
};

// One sequence's share of a step.
struct Piece {
  int32_t start, count, first_block, adapter = -1;
};

std::vector<int32_t> step(llmctl_program* program, const std::vector<Piece>& pieces) {
  std::vector<int32_t> ids, positions, start{0}, tables, rows, targets, tops, adapters;
  std::vector<int64_t> slots;
  const int64_t blocks = kLength / kBlock;
  for (const Piece& piece : pieces) {
    for (int32_t p = piece.start; p < piece.start + piece.count; p++) {
      ids.push_back((p * 7 + piece.first_block) % kVocab);
      positions.push_back(p);
      adapters.push_back(piece.adapter);
      slots.push_back((piece.first_block + p / kBlock) * kBlock + p % kBlock);
    }
    start.push_back(int32_t(ids.size()));
    for (int32_t b = 0; b < blocks; b++) tables.push_back(piece.first_block + b);
    if (piece.count > 1) {  // its first token is scored
      rows.push_back(start[start.size() - 2]);
      targets.push_back(piece.start % kVocab);
      tops.push_back(piece.count % 4);
    }
    rows.push_back(start.back() - 1);
    targets.push_back(-1);
    tops.push_back(0);
  }
  // Nobody has the first KV group: its slots are padding, and its tables name no block.
  slots.insert(slots.begin(), slots.size(), -1);
  const int64_t count = int64_t(pieces.size());
  const size_t scored = rows.size();
  std::vector<float> temperature(size_t(count), 0.7f), logprobs(scored, 0), top_logprobs(3 * scored, 0);
  std::vector<int32_t> ranks(scored, 0), top_ids(3 * scored, 0);
  std::vector<uint64_t> seeds(size_t(count), 5);
  std::vector<int64_t> at(positions.begin(), positions.begin() + count);
  std::vector<int32_t> tokens(size_t(count), -1);
  StepDesc desc{};
  desc.tokens = int64_t(ids.size());
  desc.seqs = count;
  desc.rows = int64_t(scored);
  desc.token_ids = ids.data();
  desc.positions = positions.data();
  desc.slots = slots.data();
  desc.query_start = start.data();
  const std::vector<int32_t> none(tables.size(), 1 << 30);
  const int32_t* const tables_of_groups[] = {none.data(), tables.data()};
  desc.block_tables = tables_of_groups;
  desc.max_blocks = blocks;
  desc.logits_rows = rows.data();
  desc.targets = targets.data();
  desc.target_tops = tops.data();
  for (const Piece& piece : pieces)
    if (piece.adapter >= 0) desc.adapters = adapters.data();
  desc.out = {3, logprobs.data(), ranks.data(), top_ids.data(), top_logprobs.data()};
  SamplingDesc sampling{};
  sampling.rows = count;
  sampling.temperature = temperature.data();
  sampling.seeds = seeds.data();
  sampling.positions = at.data();
  sampling.token_ids = tokens.data();
  llmctl_step(program, &desc, &sampling);
  tokens.insert(tokens.end(), ranks.begin(), ranks.end());
  tokens.insert(tokens.end(), top_ids.begin(), top_ids.end());
  return tokens;
}

std::vector<int32_t> walk(int threads) {
  Layer layer;
  llmctl_program* program = llmctl_create(layer.ops.data(), int64_t(layer.ops.size()), layer.kv.data(), 1, kBlock,
                                          kTokens, 3, kLength, kVocab, threads);
  if (llmctl_adapt(program, layer.adapted.data(), int64_t(layer.adapted.size()))) std::abort();
  std::vector<int32_t> found;
  auto run = [&](const std::vector<Piece>& pieces) {
    const std::vector<int32_t> tokens = step(program, pieces);
    found.insert(found.end(), tokens.begin(), tokens.end());
  };
  for (int32_t at = 0; at < 560; at += 70) run({{at, 70, 0}});  // chunked prefill over several segments
  for (int32_t at = 560; at < 575; at++) run({{at, 1, 0}});     // decode alone: keys are cut among the threads
  run({{575, 1, 0}, {0, 30, 40}});
  // More sequences than rows of logits at once, each in blocks of its own.
  for (int32_t at = 30; at < 40; at++) run({{546 + at, 1, 0}, {at, 1, 40}, {at, 1, 43}, {at, 1, 46}, {at, 2, 49}});
  // Adapters of many rows and of one, several of one, and none; again over the same blocks.
  run({{0, 40, 0, 0}, {0, 11, 40, 1}, {0, 2, 43}});
  for (int32_t at = 40; at < 50; at++)
    run({{at, 1, 0, 0}, {at - 29, 1, 40, 1}, {at - 38, 1, 43}, {at - 40, 1, 46, 0}, {at - 40, 1, 49, 2}});
  // So many rows that threads share the rows, up to four of them: a thread goes on with another's patch of rows.
  run({{0, 90, 0, 0}, {0, 80, 8, 1}, {0, 70, 16, 2}, {0, 20, 24}});
  llmctl_destroy(program);
  return found;
}

}  // namespace

int main() {
  const std::vector<int32_t> alone = walk(1);
  bool good = true;
  for (int threads = 2; threads <= 4; threads++) good &= walk(threads) == alone;
  if (!good) std::fprintf(stderr, "step_stress: tokens depend on the number of threads\n");
  return good ? 0 : 1;
}
