// The plain-data interface between targets/cpu/runtime.py (which binds a Graph to it once) and the native walker (program.cpp).
// Mirrored by targets/cpu/abi.py; abi.h lets the loader compare the two.
#pragma once
#include <cstdint>

#include "acts.h"
#include "sampling.h"

namespace llmctl {

enum Kind : int32_t {
  kEmbed = 0,
  kPosEmbed = 1,
  kRmsNorm = 2,     // with x2: y2 = x + x2 first, then the norm of that
  kLayerNorm = 3,   // likewise
  kHeadRmsNorm = 4,
  kLinear = 5,
  kAct = 6,
  kMul = 7,
  kAdd = 8,
  kRope = 9,        // rotates q (y) and k (y2), copies of x and x2; with flag kWritesKv also writes k and v (x3)
  kKvWrite = 10,    // x = k, x2 = v
  kAttention = 11,
  kGatherRows = 12,
  kQuantize = 13,   // x -> int8 codes
  kToBf16 = 14,     // x -> bf16
  kCap = 15,        // y = scale * x, then softcap * tanh(y / softcap) unless that is 0
  kRoute = 16,      // logits x -> choice.experts, and their shares y
  kSortRows = 17,   // choice.experts -> order, place, starts
  kGatherExperts = 18,  // x -> the operand of grouped linears, rows in expert order: int8 codes, bf16 or fp32
  kGroupedLinear = 19,
  kWeightedSum = 20,    // rows x by shares x2 -> y
};
constexpr int kMaxKinds = 21;

// kW4Min, kW8Min: integers with a minimum a group. kE4m3: float8_e4m3 codes. kBook4: 4-bit codes of w_book.
enum DType : int32_t { kF32 = 0, kBf16 = 1, kF16 = 2, kW4 = 3, kW8 = 4, kW4Min = 5, kW8Min = 6, kE4m3 = 7, kBook4 = 8 };

// fp32 matrix [rows][ld]; a buffer may be a column range of a wider one.
struct Matrix {
  float* data;
  int64_t ld;
};

// The experts of each token (experts.h).
struct Choice {
  int32_t* experts;  // [tokens][top_k], in the order in which they were chosen
  int32_t* order;    // [tokens * top_k]: which of those a row in expert order is
  int32_t* place;    // [tokens * top_k]: where in expert order each of them is
  int32_t* starts;   // [2 * count + 2]: each expert's first row, their end; how many experts have rows, and which
  int64_t count, top_k, groups, top_groups;
  int32_t sigmoid, renormalise;  // sigmoid: of scores, of shares
};

// What adapters add to in one linear: `panels` halves of its tiles, of 16 outputs each, from half number `first` on,
// every `stride`. Of slot s: a is [rank / 16][columns][16] and b [panels][rank][16], one slot behind the other; bf16: two
// columns of an output lie together, [columns / 2][16][2] and [rank / 2][16][2], with a column of zeros behind an odd
// number; kW8: four lie together, [k / 4][16][4] and [rank / 4][16][4], codes + 128 of int8 in the order of the columns of
// the linear's weight, with a_scales [rank] and, bf16, b_scales [panels][16]. scales[s] 0: it adds nothing here; ranks[s]:
// those that it has, rounded up to 16.
struct LoraModule {
  int64_t first, stride, panels;
  const uint8_t* a;
  const uint8_t* b;
  const float* scales;
  const int32_t* ranks;
  const float* a_scales;
  const uint16_t* b_scales;
};

struct OpDesc {
  int32_t kind;
  int32_t act;           // Act, of kAct and of a gated linear (gate rows are outputs 0..15 of every tile)
  int32_t weight_dtype;  // DType of a linear's or an embedding's weight
  int32_t neox;
  int32_t writes_kv;
  int32_t on_rows;       // runs on the gathered rows instead of on all tokens
  int64_t layer;         // KV layer
  Matrix x, x2, x3, y, y2;
  IntActs x8;            // int8 operand of a linear
  IntActs y8;            // when codes is set, norms, linears and attention write this in place of y
  int64_t width;         // columns of x
  int64_t n;             // valid outputs of a linear (of the epilogue)
  int64_t n_padded, k, group;
  int64_t zero_step;     // see Weights
  int64_t nested;        // groups that share a super, see NestedScales and MappedScales; 0: scales are not nested
  int64_t nested_bits;   // of integers, see NestedScales
  int64_t code_bits;     // see Weights
  int64_t scale_rows;    // of kE4m3: outputs of a half of a tile that share w_scales32, all (kLanes) or 1
  const uint8_t* w;      // linear: packed; embeddings: packed, or [V][width]; norms: fp32
  const uint16_t* w_scales;
  const uint8_t* w_zeros;
  const uint16_t* w_minimums;
  const uint8_t* w_scale_codes;
  const uint16_t* w_scale_supers;
  const float* w_scale_supers32;  // kBook4, with the two below
  const int32_t* w_scale_starts;
  const float* w_scale_map;  // [256], see MappedScales
  const float* w_scales32;  // kE4m3, kBook4
  const float* w_book;      // kBook4: [16]
  const float* bias;     // linear: fp32 in tile order, padded; layer norm: b
  const int32_t* permutation;  // kQuantize: column order of an act-order weight, or null
  uint16_t* x16;         // bf16 operand, row stride k
  int64_t heads, kv_heads, head_dim, rotary_dim, window;
  const float* cos;      // [positions][rotary_dim / 2]
  const float* sin;
  const LoraModule* lora;  // [num_lora] of a linear, which then has the floats of its operand as x, too, but for kW8
  int64_t num_lora, lora_rank;  // rank of a slot, a multiple of 16
  Matrix low;              // partial sums, see lora_shrink.h
  int32_t lora_dtype;      // of their matrices: kW8 where the operand is int8, else kF32 or kBf16
  float eps, offset, scale, softcap;
  Choice choice;
  int32_t sorted;        // x of kGatherExperts is in expert order
};

struct KvDesc {
  uint8_t* base;
  int64_t kv_heads, head_dim, padded_dim;
  int32_t type;   // KvType
  int32_t group;  // which of a step's block tables and slots are the layer's
};

struct StepDesc {
  int64_t tokens, seqs, rows;
  const int32_t* token_ids;      // [tokens]
  const int32_t* positions;      // [tokens]
  const int64_t* slots;          // [groups][tokens]; -1 = padding
  const int32_t* query_start;    // [seqs + 1]
  const int32_t* const* block_tables;  // [groups] of [seqs][max_blocks]
  int64_t max_blocks;
  const int32_t* logits_rows;    // [rows], ascending
  const int32_t* targets;        // [rows], -1: the row is sampled, else the log-probability of this id is wanted
  const int32_t* target_tops;    // [rows], how many of the most likely tokens are wanted beside a target
  LogprobsOut out;               // of the rows with a target
  const int32_t* adapters;       // [tokens], each one's slot, -1: none; null: no token has one
};

}  // namespace llmctl

extern "C" {
struct llmctl_program;
// What the binder must agree on, see abi.h: a digest of it, and its entries: the name of entry i, null behind the last.
uint64_t llmctl_abi_digest();
const char* llmctl_abi_entry(int64_t i, int64_t* value);
// Which variant's code runs, and why not the one that the library was compiled as, empty where it is.
const char* llmctl_variant();
const char* llmctl_refusal();
llmctl_program* llmctl_create(const llmctl::OpDesc* ops, int64_t num_ops, const llmctl::KvDesc* kv, int64_t num_kv,
                              int64_t block_size, int64_t max_tokens, int64_t max_rows, int64_t max_model_len,
                              int64_t vocab, int threads);
// A second list of ops, for steps with adapters; those without one run the first. Returns 0, or 1 when memory is spent.
int llmctl_adapt(llmctl_program* program, const llmctl::OpDesc* ops, int64_t num_ops);
// Null when memory or threads are spent; llmctl_create_error says it.
const char* llmctl_create_error();
void llmctl_destroy(llmctl_program* program);
// Runs one step; sampling has one row per logits row without a target, in order. Returns 0.
int llmctl_step(llmctl_program* program, const llmctl::StepDesc* step, const llmctl::SamplingDesc* sampling);
// Bytes of weights, without their scales, that linears have read since the last call.
int64_t llmctl_weight_bytes(llmctl_program* program);
// Microseconds spent per op kind on thread 0 since the last call, for profiles; out has kMaxKinds entries.
void llmctl_profile(llmctl_program* program, double* out);
}
