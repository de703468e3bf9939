// Sampling of one row of logits, as llmctl/engine/step.py's SamplingBatch defines it: log-probabilities of the raw
// distribution, then bias and mask, penalties, and greedy argmax or temperature, top-k, top-p, min-p and one draw.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "simd.h"

namespace llmctl {

// Log-probabilities of R rows. Mirrored by targets/cpu/abi.py.
struct LogprobsOut {
  int64_t width;        // most that a row wants of the most likely tokens
  float* logprobs;      // [R]
  int32_t* ranks;       // [R]
  int32_t* top_ids;     // [R][width]
  float* top_logprobs;  // [R][width]
};

// Parameters and results of R rows; pointers may be null where nobody asked. Mirrored by targets/cpu/abi.py.
struct SamplingDesc {
  int64_t rows;
  const float* temperature;
  const uint64_t* seeds;
  const int64_t* positions;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const float* repetition_penalty;
  const float* presence_penalty;
  const float* frequency_penalty;
  const int32_t* prompt_ids;       // rows concatenated
  const int64_t* prompt_offsets;   // [R+1]
  const int32_t* output_ids;
  const int64_t* output_offsets;
  const int32_t* bias_ids;
  const float* bias_values;
  const int64_t* bias_offsets;     // [R+1]
  const uint32_t* allowed_mask;    // [R][ceil(V/32)]
  const int32_t* num_logprobs;     // [R]; -1 none
  int32_t* token_ids;              // out [R]
  LogprobsOut out;
};

// Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (position, 0); 53 random bits. As targets/reference/philox.py.
static inline double philox_uniform(uint64_t seed, int64_t position) {
  uint32_t c0 = uint32_t(position), c1 = uint32_t(uint64_t(position) >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return double((uint64_t(c1) << 32 | c0) >> 11) * 0x1p-53;
}

static inline float row_max(const float* x, int64_t n) {
  f32x16 top = splat(-INFINITY);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) top = vmax(top, load<f32x16>(x + i));
  float best = reduce_max(top);
  for (; i < n; i++) best = x[i] > best ? x[i] : best;
  return best;
}

// Lowest index of the largest value.
static inline int64_t argmax(const float* x, int64_t n) {
  const float best = row_max(x, n);
  for (int64_t i = 0; i < n; i++)
    if (x[i] == best) return i;
  return 0;
}

static inline double log_sum_exp(const float* x, int64_t n) {
  const float top = row_max(x, n);
  double sum = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sum += double(reduce_add(vexp(load<f32x16>(x + i) - top)));
  for (; i < n; i++) sum += std::exp(double(x[i]) - top);
  return double(top) + std::log(sum);
}

// Per-thread scratch, sized once for the vocabulary.
struct SamplingScratch {
  std::vector<int32_t> order;
  std::vector<float> values;
  std::vector<int32_t> count;    // occurrences in the output
  std::vector<uint8_t> seen;     // in the prompt or the output
  std::vector<float> raw;
  explicit SamplingScratch(int64_t vocab) : order(vocab), values(vocab), count(vocab), seen(vocab), raw(vocab) {}
};

static inline void apply_penalties(const SamplingDesc& s, int64_t row, float* x, SamplingScratch& scratch) {
  const int32_t* output = s.output_ids + s.output_offsets[row];
  const int32_t* output_end = s.output_ids + s.output_offsets[row + 1];
  const float presence = s.presence_penalty ? s.presence_penalty[row] : 0.0f;
  const float frequency = s.frequency_penalty ? s.frequency_penalty[row] : 0.0f;
  const float repetition = s.repetition_penalty ? s.repetition_penalty[row] : 1.0f;
  auto repeat = [&](int32_t id) {
    if (scratch.seen[id]) return;
    scratch.seen[id] = 1;
    x[id] = x[id] > 0 ? x[id] / repetition : x[id] * repetition;
  };
  const int32_t* prompt = s.prompt_ids + s.prompt_offsets[row];
  const int32_t* prompt_end = s.prompt_ids + s.prompt_offsets[row + 1];
  for (const int32_t* id = prompt; id < prompt_end; id++) repeat(*id);
  for (const int32_t* id = output; id < output_end; id++) repeat(*id), scratch.count[*id]++;
  for (const int32_t* id = output; id < output_end; id++) {
    if (!scratch.count[*id]) continue;
    x[*id] -= frequency * float(scratch.count[*id]) + presence;
    scratch.count[*id] = 0;
  }
  for (const int32_t* id = prompt; id < prompt_end; id++) scratch.seen[*id] = 0;
  for (const int32_t* id = output; id < output_end; id++) scratch.seen[*id] = 0;
}

// The smallest logit that top-k, top-p and min-p keep. Filters are thresholds, so ties are never broken by sort order:
// top-k keeps all tokens at least as likely as the k-th; top-p those before which less than p of the mass top-k left
// lies; min-p those of at least min_p times the largest probability.
static inline float least_kept(const SamplingDesc& s, int64_t row, const float* x, int64_t vocab,
                               SamplingScratch& scratch) {
  const float top = row_max(x, vocab);
  const int32_t k = s.top_k ? s.top_k[row] : 0;
  const float p = s.top_p ? s.top_p[row] : 1.0f, min_p = s.min_p ? s.min_p[row] : 0.0f;
  const double inverse = 1.0 / double(s.temperature[row]);
  float least = -INFINITY;
  if (min_p > 0) least = top + s.temperature[row] * std::log(min_p);
  const bool cuts = k > 0 && k < vocab;
  if (!cuts && p >= 1.0f) return least;
  float* value = scratch.values.data();
  int64_t count = vocab;
  std::copy(x, x + vocab, value);
  if (cuts) {
    std::nth_element(value, value + k - 1, value + vocab, std::greater<float>());
    const float kth = value[k - 1];
    least = std::max(least, kth);
    count = std::partition(value, value + vocab, [&](float v) { return v >= kth; }) - value;
  }
  if (p >= 1.0f) return least;
  double total = 0;
  for (int64_t i = 0; i < count; i++) total += std::exp((double(value[i]) - top) * inverse);
  double mass = 0;
  int64_t kept = 0, sorted = 0;
  while (kept < count && mass < double(p) * total) {
    if (kept == sorted) {  // sort only as far as the mass requires
      const int64_t next = std::min(count, std::max<int64_t>(64, 4 * sorted));
      std::partial_sort(value + sorted, value + next, value + count, std::greater<float>());
      sorted = next;
    }
    mass += std::exp((double(value[kept++]) - top) * inverse);
  }
  return kept ? std::max(least, value[kept - 1]) : least;
}

// The first token, in id order, at which the running sum of the kept mass exceeds u * total.
static inline int32_t draw(const SamplingDesc& s, int64_t row, const float* x, int64_t vocab,
                           SamplingScratch& scratch) {
  const float top = row_max(x, vocab), least = least_kept(s, row, x, vocab, scratch);
  if (top == -INFINITY) return 0;
  const float inverse = 1.0f / s.temperature[row];
  float* mass = scratch.values.data();
  double total = 0;
  for (int64_t id = 0; id < vocab; id += 16) {
    const int64_t n = std::min<int64_t>(16, vocab - id);
    f32x16 v = splat(-INFINITY);
    std::memcpy(&v, x + id, size_t(n) * 4);
    f32x16 w = vexp((v - top) * inverse);
    w = v < least ? f32x16{} : w;
    std::memcpy(mass + id, &w, size_t(n) * 4);
    for (int64_t i = 0; i < n; i++) total += double(w[i]);
  }
  const double target = philox_uniform(s.seeds[row], s.positions[row]) * total;
  double running = 0;
  int32_t last = 0;
  for (int64_t id = 0; id < vocab; id++) {
    if (mass[id] <= 0) continue;
    last = int32_t(id);
    running += double(mass[id]);
    if (running > target) break;
  }
  return last;
}

// What is said of a token of row `row`: its log-probability, its rank (1 = most likely), the `wanted` most likely
// tokens (of equals the lowest id first).
static inline void report_logprobs(const LogprobsOut& out, int64_t row, const float* raw, int64_t vocab, int32_t token,
                                   int64_t wanted, SamplingScratch& scratch) {
  const double norm = log_sum_exp(raw, vocab);
  out.logprobs[row] = float(double(raw[token]) - norm);
  int32_t rank = 1;
  for (int64_t id = 0; id < vocab; id++) rank += raw[id] > raw[token];
  out.ranks[row] = rank;
  wanted = std::min(wanted, vocab);
  if (wanted <= 0) return;
  int32_t* order = scratch.order.data();
  for (int64_t id = 0; id < vocab; id++) order[id] = int32_t(id);
  std::partial_sort(order, order + wanted, order + vocab,
                    [&](int32_t a, int32_t b) { return raw[a] != raw[b] ? raw[a] > raw[b] : a < b; });
  for (int64_t i = 0; i < wanted; i++) {
    out.top_ids[row * out.width + i] = order[i];
    out.top_logprobs[row * out.width + i] = float(double(raw[order[i]]) - norm);
  }
}

// Most words of a mask allow nothing, or all.
static inline void apply_mask(const uint32_t* mask, float* x, int64_t vocab) {
  for (int64_t id = 0; id < vocab; id += 32) {
    const uint32_t bits = mask[id / 32];
    if (bits == ~uint32_t(0)) continue;
    const int64_t n = std::min<int64_t>(32, vocab - id);
    for (int64_t i = 0; i < n; i++) x[id + i] = bits >> i & 1 ? x[id + i] : -INFINITY;
  }
}

// Samples row `row` from logits x [vocab], which it may overwrite.
static inline void sample_row(const SamplingDesc& s, int64_t row, float* x, int64_t vocab, SamplingScratch& scratch) {
  const bool wants_logprobs = s.num_logprobs && s.num_logprobs[row] >= 0;
  if (wants_logprobs) std::copy(x, x + vocab, scratch.raw.begin());
  if (s.bias_offsets)
    for (int64_t i = s.bias_offsets[row]; i < s.bias_offsets[row + 1]; i++) x[s.bias_ids[i]] += s.bias_values[i];
  if (s.allowed_mask) apply_mask(s.allowed_mask + row * ((vocab + 31) / 32), x, vocab);
  if (s.output_offsets) apply_penalties(s, row, x, scratch);
  const bool greedy = s.temperature[row] == 0;
  const int32_t token = greedy ? int32_t(argmax(x, vocab)) : draw(s, row, x, vocab, scratch);
  s.token_ids[row] = token;
  if (wants_logprobs) report_logprobs(s.out, row, scratch.raw.data(), vocab, token, s.num_logprobs[row], scratch);
}

}  // namespace llmctl
