// Mixtures of experts: a token's experts are chosen, the rows of all tokens sorted by expert, the linears' kernels run on
// each expert's rows, and what they made is added up by token.
//
// A token has top_k rows. In expert order, expert e's lie from starts[e] to starts[e + 1], as a matrix of their own: its
// blocks of 8 rows (acts.h) are counted from its first row. Only weights of experts that have rows are read. A row's
// result depends on its token alone, as with a linear, and a token's rows are added in the order they were chosen in.
#pragma once
#include <limits>

#include "linear_op.h"

namespace llmctl {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Floats of scratch that route_row() takes: an expert's score, what it is chosen by, and a group's sum.
static inline int64_t route_scratch(int64_t count) { return 3 * ((count + kLanes - 1) / kLanes * kLanes); }

// Logits to scores; both padded to whole vectors.
static inline void expert_scores(float* x, int64_t count, bool sigmoid) {
  const float largest = *std::max_element(x, x + count);
  for (int64_t i = 0; i < count; i += kLanes) {
    const f32x16 v = load<f32x16>(x + i);
    store(x + i, sigmoid ? divide(splat(1.0f), 1.0f + vexp(-v)) : vexp(v - largest));
  }
  if (sigmoid) return;
  const float sum = row_sum(x, count);
  for (int64_t i = 0; i < count; i++) x[i] /= sum;
}

// Rules out the groups of experts but for the `top` whose two best add up to the most; of equal ones the first stay.
// sums: scratch, a float a group.
static inline void keep_groups(float* wanted, int64_t size, int64_t groups, int64_t top, float* sums) {
  const auto sum_of_two = [&](int64_t group) {
    float best = kNever, second = kNever;
    for (const float *v = wanted + group * size, *end = v + size; v < end; v++) {
      if (*v > best) second = best, best = *v;
      else if (*v > second) second = *v;
    }
    return best + second;
  };
  for (int64_t group = 0; group < groups; group++) sums[group] = sum_of_two(group);
  for (int64_t group = 0; group < groups; group++) {
    int64_t better = 0;
    for (int64_t other = 0; other < groups; other++)
      better += sums[other] > sums[group] || (sums[other] == sums[group] && other < group);
    if (better >= top) std::fill(wanted + group * size, wanted + (group + 1) * size, kNever);
  }
}

// A token's experts, best first (of equal ones the first), and their shares.
static inline void route_row(const OpDesc& op, int64_t row, float* scores) {
  const Choice& c = op.choice;
  float *const wanted = scores + route_scratch(c.count) / 3, *const sums = wanted + route_scratch(c.count) / 3;
  std::memcpy(scores, op.x.data + row * op.x.ld, size_t(c.count) * 4);
  std::fill(scores + c.count, wanted, 0.0f);
  expert_scores(scores, c.count, c.sigmoid != 0);
  for (int64_t i = 0; i < c.count; i++) wanted[i] = scores[i] + (op.bias ? op.bias[i] : 0.0f);
  if (c.groups > c.top_groups) keep_groups(wanted, c.count / c.groups, c.groups, c.top_groups, sums);
  float* const shares = op.y.data + row * op.y.ld;
  float sum = 1e-20f;
  for (int64_t j = 0; j < c.top_k; j++) {
    int64_t best = 0;  // stays one of the experts if no logit is a number
    for (int64_t i = 1; i < c.count; i++)
      if (wanted[i] > wanted[best]) best = i;
    c.experts[row * c.top_k + j] = int32_t(best);
    sum += shares[j] = scores[best];
    wanted[best] = kNever;
  }
  for (int64_t j = 0; j < c.top_k; j++) shares[j] = (c.renormalise ? shares[j] / sum : shares[j]) * op.scale;
}

// Behind starts: how many experts have rows, then which.
static inline int64_t active_experts(const Choice& c) { return c.starts[c.count + 1]; }
static inline const int32_t* active_list(const Choice& c) { return c.starts + c.count + 2; }

// Rows of `tokens` tokens into expert order.
static inline void sort_rows(const Choice& c, int64_t tokens) {
  int32_t *const starts = c.starts, *const next = starts + c.count + 2;  // the list is made when `next` is done with
  std::fill(starts, starts + c.count + 1, 0);
  for (int64_t i = 0; i < tokens * c.top_k; i++) starts[c.experts[i] + 1]++;
  for (int64_t e = 0; e < c.count; e++) starts[e + 1] += starts[e];
  std::copy(starts, starts + c.count, next);
  for (int64_t i = 0; i < tokens * c.top_k; i++) {
    const int32_t place = next[c.experts[i]]++;
    c.order[place] = int32_t(i);
    c.place[i] = place;
  }
  int32_t active = 0;
  for (int64_t e = 0; e < c.count; e++)
    if (starts[e + 1] > starts[e]) next[active++] = int32_t(e);
  starts[c.count + 1] = active;
}

// What of an operand belongs to an expert's rows.
static inline IntActs acts_from(const IntActs& x, int64_t row) {
  if (!x.codes) return x;
  IntActs from = x;
  from.codes += row * x.k, from.scales += row * x.groups(), from.negated_sums += row * x.groups();
  return from;
}

// Row `place` of a grouped linear's operand. x: rows in expert order, op.sorted, or one a token. line: scratch.
static inline void gather_row(const OpDesc& op, int64_t place, float* line) {
  const Choice& c = op.choice;
  const float* x = op.sorted ? op.x.data + place * op.width : op.x.data + c.order[place] / c.top_k * op.x.ld;
  if (op.y.data) return (void)std::memcpy(op.y.data + place * op.width, x, size_t(op.width) * 4);
  if (op.x16) {
    uint16_t* y = op.x16 + place * op.k;
    for (int64_t i = 0; i < op.k; i++) y[i] = i < op.width ? f32_to_bf16(x[i]) : 0;
    return;
  }
  const int64_t first = c.starts[c.experts[c.order[place]]], rows = c.starts[c.experts[c.order[place]] + 1] - first;
  const ActRow to = act_row_of(acts_from(op.y8, first), place - first, rows);
  std::memcpy(line, x, size_t(op.width) * 4);
  std::fill(line + op.width, line + op.y8.k, 0.0f);
  for (int64_t g = 0; g < op.y8.k; g += op.y8.group) quantize_group(line + g, op.y8.group, g, to);
}

// A grouped linear as the linear of one expert over its rows, which start at `first`.
static inline OpDesc expert_linear(const OpDesc& op, int64_t expert, int64_t first) {
  OpDesc one = op;
  const int64_t groups = (op.k + op.group - 1) / op.group * op.n_padded;
  one.w += expert * op.n_padded * op.k * weight_bits(op) / 8;
  if (op.w_scales) one.w_scales += expert * groups;
  if (op.w_zeros) one.w_zeros += expert * groups / kTile * op.zero_step;
  if (op.w_minimums) one.w_minimums += expert * groups;
  if (op.nested) {
    const int64_t planes = has_minimums(op.weight_dtype) ? 2 : 1;
    one.w_scale_codes += expert * groups * planes * (op.nested_bits ? op.nested_bits : 8) / 8;
    if (op.w_scale_supers) one.w_scale_supers += expert * groups / op.nested * planes;
    if (op.w_scale_starts) one.w_scale_starts += expert * op.n_padded;
  }
  if (op.w_scales32) one.w_scales32 += expert * groups / op.scale_rows;
  if (op.x.data) one.x.data += first * op.x.ld;
  if (op.x16) one.x16 += first * op.k;
  if (op.y.data) one.y.data += first * op.y.ld;
  one.x8 = acts_from(op.x8, first);
  one.y8 = acts_from(op.y8, first);
  return one;
}

// Work is handed out in pieces of an expert's weights, each for all of its rows. after: weights that this thread reads next.
static inline void grouped_linear_op(const OpDesc& op, const Share& share, const uint8_t* after, LinearScratch& scratch) {
  const Choice& c = op.choice;
  const Units units(op);
  const int64_t active = active_experts(c), most = share.threads * kPieces;
  if (!active) return;
  const int64_t pieces = std::min(units.count, (most + active - 1) / active);
  const int64_t unit_bytes = units.tiles_per * op.k * kTile * weight_bits(op) / 8;
  const auto unit_of = [&](int64_t piece) { return units.count * piece / pieces; };
  const auto weights_at = [&](int64_t item) {
    if (item >= active * pieces) return after;
    return op.w + (active_list(c)[item / pieces] * units.count + unit_of(item % pieces)) * unit_bytes;
  };
  share.run(active * pieces, 1, [&](int64_t item, int64_t) {
    const int64_t expert = active_list(c)[item / pieces], piece = item % pieces;
    const int64_t first = c.starts[expert], rows = c.starts[expert + 1] - first;
    const OpDesc one = expert_linear(op, expert, first);
    const Cut cut(one, rows, 1);
    const int64_t unit = unit_of(piece), unit_end = unit_of(piece + 1), own_end = unit_end * units.tiles_per;
    scratch.weight_bytes += (unit_end - unit) * unit_bytes;
    for (int64_t patch = 0; patch < cut.patches; patch++)
      linear_patch(one, units, {rows, cut.row(patch), cut.row(patch + 1), unit, unit_end, own_end, weights_at(item + 1)},
                   scratch);
  });
}

// A token's rows, each times its share. Without places they lie side by side.
static inline void weighted_sum_row(const OpDesc& op, int64_t row, float* y) {
  const Choice& c = op.choice;
  const float* shares = op.x2.data + row * op.x2.ld;
  for (int64_t j = 0; j < c.top_k; j++) {
    const float share = c.sigmoid ? 1.0f / (1.0f + std::exp(-shares[j])) : shares[j];
    const float* x = c.place ? op.x.data + c.place[row * c.top_k + j] * op.width : op.x.data + row * op.x.ld + j * op.width;
    for (int64_t i = 0; i < op.width; i++) y[i] = j ? y[i] + x[i] * share : x[i] * share;
  }
}

}  // namespace llmctl
