// Ops that treat each row by itself: norms, rotary embedding, activations. All arithmetic in fp32.
#pragma once
#include "simd.h"

namespace llmctl {

static inline float row_sum(const float* x, int64_t n) {
  f32x16 total{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) total += load<f32x16>(x + i);
  float sum = reduce_add(total);
  for (; i < n; i++) sum += x[i];
  return sum;
}

// Sum of (x - mean)^2.
static inline float row_sum_squares(const float* x, int64_t n, float mean) {
  f32x16 total{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 d = load<f32x16>(x + i) - mean;
    total += d * d;
  }
  float sum = reduce_add(total);
  for (; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
  return sum;
}

// y = x / rms(x) * (w + offset); offset 1 is Gemma's form.
static inline void rms_norm_row(const float* x, const float* w, float* y, int64_t n, float eps, float offset) {
  const float inverse = 1.0f / std::sqrt(row_sum_squares(x, n, 0.0f) / float(n) + eps);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, load<f32x16>(x + i) * inverse * (load<f32x16>(w + i) + offset));
  for (; i < n; i++) y[i] = x[i] * inverse * (w[i] + offset);
}

static inline void layer_norm_row(const float* x, const float* w, const float* b, float* y, int64_t n, float eps) {
  const float mean = row_sum(x, n) / float(n);
  const float inverse = 1.0f / std::sqrt(row_sum_squares(x, n, mean) / float(n) + eps);
  for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * inverse * w[i] + (b ? b[i] : 0.0f);
}

static inline void add_row(const float* a, const float* b, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, load<f32x16>(a + i) + load<f32x16>(b + i));
  for (; i < n; i++) y[i] = a[i] + b[i];
}

// Rotates one head in place. neox pairs (i, i + dim/2), gptj pairs (2i, 2i + 1); cos and sin hold dim/2 values.
static inline void rope_head(float* x, const float* cos, const float* sin, int64_t dim, bool neox) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; neox && i + 16 <= half; i += 16) {
    const f32x16 a = load<f32x16>(x + i), b = load<f32x16>(x + half + i);
    const f32x16 c = load<f32x16>(cos + i), s = load<f32x16>(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    float& a = x[neox ? i : 2 * i];
    float& b = x[neox ? i + half : 2 * i + 1];
    const float first = a * cos[i] - b * sin[i], second = b * cos[i] + a * sin[i];
    a = first;
    b = second;
  }
}

enum class Act : int { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4 };

// tanh through exp, accurate to 1e-6 absolute; odd by construction.
static inline f32x16 vtanh(f32x16 x) {
  const f32x16 magnitude = vmin(vmax(x, -x), splat(20.0f));
  const f32x16 e = vexp(-2.0f * magnitude), t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

static inline f32x16 activate(f32x16 x, Act act) {
  switch (act) {
    case Act::kSilu:
      return divide(x, 1.0f + vexp(-x));
    case Act::kGelu: {
      f32x16 y;
      for (int i = 0; i < 16; i++) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
      return y;
    }
    case Act::kGeluTanh:
      return 0.5f * x * (1.0f + vtanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case Act::kRelu:
      return vmax(x, f32x16{});
    default:
      return x;
  }
}

static inline void act_row(const float* x, float* y, int64_t n, Act act) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, activate(load<f32x16>(x + i), act));
  if (i < n) {
    f32x16 tail{};
    for (int64_t j = i; j < n; j++) tail[j - i] = x[j];
    tail = activate(tail, act);
    for (int64_t j = i; j < n; j++) y[j] = tail[j - i];
  }
}

// y = scale * x, then cap * tanh(y / cap) unless that is 0; y may be x.
static inline void cap_row(const float* x, float* y, int64_t n, float scale, float cap) {
  const auto capped = [&](f32x16 v) { return cap > 0 ? vtanh(v * (scale / cap)) * cap : v * scale; };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, capped(load<f32x16>(x + i)));
  if (i < n) {
    f32x16 tail{};
    for (int64_t j = i; j < n; j++) tail[j - i] = x[j];
    tail = capped(tail);
    for (int64_t j = i; j < n; j++) y[j] = tail[j - i];
  }
}

static inline void mul_row(const float* a, const float* b, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, load<f32x16>(a + i) * load<f32x16>(b + i));
  for (; i < n; i++) y[i] = a[i] * b[i];
}

}  // namespace llmctl
