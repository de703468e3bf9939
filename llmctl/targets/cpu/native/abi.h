// What targets/cpu/abi.py must agree on with this code, as named numbers made of the enums, structs and constants
// themselves. abi.py makes the same list of its own declarations; its open_library() compares the two.
#pragma once
#include <cstddef>
#include <type_traits>

#include "attention_op.h"
#include "experts.h"
#include "lora.h"
#include "program.h"

namespace llmctl {

struct AbiEntry {
  const char* name;
  int64_t value;
};

// Bytes of K or V of kKeys tokens of a head of kLanes columns.
constexpr int64_t kv_tile_bytes(KvType type) {
  return KvLayer{nullptr, 1, kLanes, kLanes, type, kKeys}.half_bytes();
}

constexpr int64_t weight_bits_of(DType dtype) {
  OpDesc op{};
  op.weight_dtype = dtype;
  return weight_bits(op);
}

// 64-bit FNV-1a.
struct Fnv {
  uint64_t digest = 0xcbf29ce484222325u;
  constexpr void byte(uint8_t value) { digest = (digest ^ value) * 0x100000001b3u; }
  constexpr void number(int64_t value) {  // eight bytes, the lowest first
    for (int shift = 0; shift < 64; shift += 8) byte(uint8_t(uint64_t(value) >> shift));
  }
};

// What a value of a type is, as abi.py's TypeClass numbers it.
template <class T>
constexpr int64_t type_class() {
  if constexpr (std::is_enum_v<T>) return type_class<std::underlying_type_t<T>>();
  if (std::is_void_v<T>) return 0;
  if (std::is_integral_v<T>) return std::is_signed_v<T> ? 1 : 2;
  if (std::is_floating_point_v<T>) return 3;
  return std::is_pointer_v<T> ? 4 : 5;
}

// Bytes of what a pointer points to, 0 where that is nobody's business but the library's.
template <class T>
constexpr int64_t pointee_bytes = 0;
template <> constexpr int64_t pointee_bytes<const OpDesc*> = sizeof(OpDesc);
template <> constexpr int64_t pointee_bytes<const KvDesc*> = sizeof(KvDesc);
template <> constexpr int64_t pointee_bytes<const StepDesc*> = sizeof(StepDesc);
template <> constexpr int64_t pointee_bytes<const SamplingDesc*> = sizeof(SamplingDesc);
template <> constexpr int64_t pointee_bytes<double*> = sizeof(double);
template <> constexpr int64_t pointee_bytes<const char*> = sizeof(char);

template <class T>
constexpr void add_type(Fnv& fnv) {
  fnv.number(type_class<T>());
  if constexpr (std::is_void_v<T>) fnv.number(0);
  else fnv.number(sizeof(T));
  fnv.number(pointee_bytes<T>);
}

// Of a call's result and arguments, in order.
template <class Result, class... Arguments>
constexpr int64_t signature(Result (*)(Arguments...)) {
  Fnv fnv;
  add_type<Result>(fnv);
  (add_type<Arguments>(fnv), ...);
  return int64_t(fnv.digest);
}

#define LLMCTL_FIELD(Struct, field) \
  {#Struct "." #field ".offset", offsetof(Struct, field)}, {#Struct "." #field ".size", sizeof(Struct::field)}, \
  {#Struct "." #field ".type", type_class<decltype(Struct::field)>()},
#define LLMCTL_SIZE(Struct) {#Struct ".size", sizeof(Struct)},
#define LLMCTL_CALL(function) {#function ".signature", signature(&function)},

constexpr AbiEntry kAbi[] = {
  {"kind.embed", kEmbed}, {"kind.pos_embed", kPosEmbed}, {"kind.rms_norm", kRmsNorm},
  {"kind.layer_norm", kLayerNorm}, {"kind.head_rms_norm", kHeadRmsNorm}, {"kind.linear", kLinear},
  {"kind.act", kAct}, {"kind.mul", kMul}, {"kind.add", kAdd}, {"kind.rope", kRope}, {"kind.kv_write", kKvWrite},
  {"kind.attention", kAttention}, {"kind.gather_rows", kGatherRows}, {"kind.quantize", kQuantize},
  {"kind.to_bf16", kToBf16}, {"kind.cap", kCap}, {"kind.route", kRoute}, {"kind.sort_rows", kSortRows},
  {"kind.gather_experts", kGatherExperts}, {"kind.grouped_linear", kGroupedLinear}, {"kind.weighted_sum", kWeightedSum},
  {"act.none", int64_t(Act::kNone)}, {"act.silu", int64_t(Act::kSilu)}, {"act.gelu", int64_t(Act::kGelu)},
  {"act.gelu_tanh", int64_t(Act::kGeluTanh)}, {"act.relu", int64_t(Act::kRelu)},
  {"dtype.f32", kF32}, {"dtype.bf16", kBf16}, {"dtype.f16", kF16}, {"dtype.w4", kW4}, {"dtype.w8", kW8},
  {"dtype.w4_min", kW4Min}, {"dtype.w8_min", kW8Min}, {"dtype.e4m3", kE4m3},
  {"dtype.book4", kBook4},
  {"kv_type.f32", kKvF32}, {"kv_type.bf16", kKvBf16}, {"kv_type.s8", kKvS8},
  LLMCTL_FIELD(Matrix, data) LLMCTL_FIELD(Matrix, ld) LLMCTL_SIZE(Matrix)
  LLMCTL_FIELD(IntActs, codes) LLMCTL_FIELD(IntActs, scales) LLMCTL_FIELD(IntActs, negated_sums)
  LLMCTL_FIELD(IntActs, k) LLMCTL_FIELD(IntActs, group) LLMCTL_FIELD(IntActs, wide)
  LLMCTL_FIELD(IntActs, grouped) LLMCTL_SIZE(IntActs)
  LLMCTL_FIELD(Choice, experts) LLMCTL_FIELD(Choice, order) LLMCTL_FIELD(Choice, place) LLMCTL_FIELD(Choice, starts)
  LLMCTL_FIELD(Choice, count) LLMCTL_FIELD(Choice, top_k) LLMCTL_FIELD(Choice, groups)
  LLMCTL_FIELD(Choice, top_groups) LLMCTL_FIELD(Choice, sigmoid) LLMCTL_FIELD(Choice, renormalise) LLMCTL_SIZE(Choice)
  LLMCTL_FIELD(LoraModule, first) LLMCTL_FIELD(LoraModule, stride) LLMCTL_FIELD(LoraModule, panels)
  LLMCTL_FIELD(LoraModule, a) LLMCTL_FIELD(LoraModule, b) LLMCTL_FIELD(LoraModule, scales)
  LLMCTL_FIELD(LoraModule, ranks) LLMCTL_FIELD(LoraModule, a_scales) LLMCTL_FIELD(LoraModule, b_scales)
  LLMCTL_SIZE(LoraModule)
  LLMCTL_FIELD(OpDesc, kind) LLMCTL_FIELD(OpDesc, act) LLMCTL_FIELD(OpDesc, weight_dtype) LLMCTL_FIELD(OpDesc, neox)
  LLMCTL_FIELD(OpDesc, writes_kv) LLMCTL_FIELD(OpDesc, on_rows) LLMCTL_FIELD(OpDesc, layer) LLMCTL_FIELD(OpDesc, x)
  LLMCTL_FIELD(OpDesc, x2) LLMCTL_FIELD(OpDesc, x3) LLMCTL_FIELD(OpDesc, y) LLMCTL_FIELD(OpDesc, y2)
  LLMCTL_FIELD(OpDesc, x8) LLMCTL_FIELD(OpDesc, y8) LLMCTL_FIELD(OpDesc, width) LLMCTL_FIELD(OpDesc, n)
  LLMCTL_FIELD(OpDesc, n_padded) LLMCTL_FIELD(OpDesc, k) LLMCTL_FIELD(OpDesc, group)
  LLMCTL_FIELD(OpDesc, zero_step) LLMCTL_FIELD(OpDesc, nested) LLMCTL_FIELD(OpDesc, nested_bits) LLMCTL_FIELD(OpDesc, code_bits)
  LLMCTL_FIELD(OpDesc, scale_rows)
  LLMCTL_FIELD(OpDesc, w)
  LLMCTL_FIELD(OpDesc, w_scales) LLMCTL_FIELD(OpDesc, w_zeros) LLMCTL_FIELD(OpDesc, w_minimums)
  LLMCTL_FIELD(OpDesc, w_scale_codes) LLMCTL_FIELD(OpDesc, w_scale_supers)
  LLMCTL_FIELD(OpDesc, w_scale_supers32) LLMCTL_FIELD(OpDesc, w_scale_starts) LLMCTL_FIELD(OpDesc, w_scale_map)
  LLMCTL_FIELD(OpDesc, w_scales32) LLMCTL_FIELD(OpDesc, w_book) LLMCTL_FIELD(OpDesc, bias)
  LLMCTL_FIELD(OpDesc, permutation) LLMCTL_FIELD(OpDesc, x16) LLMCTL_FIELD(OpDesc, heads)
  LLMCTL_FIELD(OpDesc, kv_heads) LLMCTL_FIELD(OpDesc, head_dim) LLMCTL_FIELD(OpDesc, rotary_dim)
  LLMCTL_FIELD(OpDesc, window) LLMCTL_FIELD(OpDesc, cos) LLMCTL_FIELD(OpDesc, sin) LLMCTL_FIELD(OpDesc, lora)
  LLMCTL_FIELD(OpDesc, num_lora) LLMCTL_FIELD(OpDesc, lora_rank) LLMCTL_FIELD(OpDesc, low)
  LLMCTL_FIELD(OpDesc, lora_dtype) LLMCTL_FIELD(OpDesc, eps)
  LLMCTL_FIELD(OpDesc, offset) LLMCTL_FIELD(OpDesc, scale) LLMCTL_FIELD(OpDesc, softcap)
  LLMCTL_FIELD(OpDesc, choice) LLMCTL_FIELD(OpDesc, sorted) LLMCTL_SIZE(OpDesc)
  LLMCTL_FIELD(KvDesc, base) LLMCTL_FIELD(KvDesc, kv_heads) LLMCTL_FIELD(KvDesc, head_dim)
  LLMCTL_FIELD(KvDesc, padded_dim) LLMCTL_FIELD(KvDesc, type) LLMCTL_FIELD(KvDesc, group) LLMCTL_SIZE(KvDesc)
  LLMCTL_FIELD(LogprobsOut, width) LLMCTL_FIELD(LogprobsOut, logprobs) LLMCTL_FIELD(LogprobsOut, ranks)
  LLMCTL_FIELD(LogprobsOut, top_ids) LLMCTL_FIELD(LogprobsOut, top_logprobs) LLMCTL_SIZE(LogprobsOut)
  LLMCTL_FIELD(StepDesc, tokens) LLMCTL_FIELD(StepDesc, seqs) LLMCTL_FIELD(StepDesc, rows)
  LLMCTL_FIELD(StepDesc, token_ids) LLMCTL_FIELD(StepDesc, positions) LLMCTL_FIELD(StepDesc, slots)
  LLMCTL_FIELD(StepDesc, query_start) LLMCTL_FIELD(StepDesc, block_tables) LLMCTL_FIELD(StepDesc, max_blocks)
  LLMCTL_FIELD(StepDesc, logits_rows) LLMCTL_FIELD(StepDesc, targets) LLMCTL_FIELD(StepDesc, target_tops)
  LLMCTL_FIELD(StepDesc, out) LLMCTL_FIELD(StepDesc, adapters) LLMCTL_SIZE(StepDesc)
  LLMCTL_FIELD(SamplingDesc, rows) LLMCTL_FIELD(SamplingDesc, temperature) LLMCTL_FIELD(SamplingDesc, seeds)
  LLMCTL_FIELD(SamplingDesc, positions) LLMCTL_FIELD(SamplingDesc, top_k) LLMCTL_FIELD(SamplingDesc, top_p)
  LLMCTL_FIELD(SamplingDesc, min_p) LLMCTL_FIELD(SamplingDesc, repetition_penalty)
  LLMCTL_FIELD(SamplingDesc, presence_penalty) LLMCTL_FIELD(SamplingDesc, frequency_penalty)
  LLMCTL_FIELD(SamplingDesc, prompt_ids) LLMCTL_FIELD(SamplingDesc, prompt_offsets)
  LLMCTL_FIELD(SamplingDesc, output_ids) LLMCTL_FIELD(SamplingDesc, output_offsets)
  LLMCTL_FIELD(SamplingDesc, bias_ids) LLMCTL_FIELD(SamplingDesc, bias_values)
  LLMCTL_FIELD(SamplingDesc, bias_offsets) LLMCTL_FIELD(SamplingDesc, allowed_mask)
  LLMCTL_FIELD(SamplingDesc, num_logprobs) LLMCTL_FIELD(SamplingDesc, token_ids) LLMCTL_FIELD(SamplingDesc, out)
  LLMCTL_SIZE(SamplingDesc)
  {"tile", kTile}, {"lanes", kLanes}, {"max_act_group", kMaxActGroup}, {"queries", kQueries},
  {"max_head", kMaxHead}, {"keys", kKeys}, {"max_kinds", kMaxKinds}, {"split", kSplit},
  {"max_splits", kMaxSplits}, {"tile_rows", kTileRows}, {"tile_bytes", kTileBytes},
  {"weight_bits.f32", weight_bits_of(kF32)}, {"weight_bits.bf16", weight_bits_of(kBf16)},
  {"weight_bits.w4", weight_bits_of(kW4)}, {"weight_bits.w8", weight_bits_of(kW8)},
  {"weight_bits.w4_min", weight_bits_of(kW4Min)}, {"weight_bits.w8_min", weight_bits_of(kW8Min)},
  {"weight_bits.e4m3", weight_bits_of(kE4m3)}, {"weight_bits.book4", weight_bits_of(kBook4)},
  {"kv_tile_bytes.f32", kv_tile_bytes(kKvF32)}, {"kv_tile_bytes.bf16", kv_tile_bytes(kKvBf16)},
  {"kv_tile_bytes.s8", kv_tile_bytes(kKvS8)},
  LLMCTL_CALL(llmctl_create) LLMCTL_CALL(llmctl_adapt) LLMCTL_CALL(llmctl_destroy) LLMCTL_CALL(llmctl_step)
  LLMCTL_CALL(llmctl_weight_bytes) LLMCTL_CALL(llmctl_profile)
  LLMCTL_CALL(llmctl_variant) LLMCTL_CALL(llmctl_refusal) LLMCTL_CALL(llmctl_create_error)
};

#undef LLMCTL_FIELD
#undef LLMCTL_SIZE
#undef LLMCTL_CALL

// Of every entry's name, its terminating zero, and its value.
constexpr uint64_t abi_digest() {
  Fnv fnv;
  for (const AbiEntry& entry : kAbi) {
    for (const char* c = entry.name; *c; c++) fnv.byte(uint8_t(*c));
    fnv.byte(0);
    fnv.number(entry.value);
  }
  return fnv.digest;
}
constexpr uint64_t kAbiDigest = abi_digest();

}  // namespace llmctl
