// Rotary position embedding of q, and of k on its way into the paged KV cache together with v; one warp a head.
//
//   pair (a, b) of a head -> (a cos - b sin, b cos + a sin), cos and sin of the token's position and the pair's index j
//   neox pairs (j, j + rotary_dim / 2); gptj pairs (2j, 2j + 1); elements from rotary_dim on stay as they are
//
// Shapes: q, k, v rows of T, heads (kv_heads) x head_dim each, q_stride, k_stride, v_stride elements apart, so that
// they may lie inside a merged qkv row; q_out rows q_out_stride apart, may alias q. positions i64 [tokens]; cosines,
// sines f32 [positions, rotary_dim / 2]; slots i64 [tokens], -1 for padding (nothing is stored then). keys, values: KV
// [slots, kv_heads, head_dim], slot = block * block_size + offset. KV is T itself; or s8 with key_scales, value_scales
// f32 [slots, kv_heads], code * scale; or e4m3, value * key_scale (value_scale), one of each for the whole cache.
//
// heads == 0 writes only the cache, kv_heads == 0 rotates only q; rotary_dim == 0 stores k without rotating it.
// head_dim % 4 == 0 and <= 256; rotary_dim even and <= head_dim; pointers of rows multiples of 8 bytes, strides % 4 ==
// 0. Grid: ceil(tokens * (heads + 2 * kv_heads) / 4) blocks of 128 threads. Bound: one read and one write per element.
//
// Numbers, sm_90: 40 to 46 registers, 40 to 48 warps an SM with 256 bytes of a head each on their way, behind the
// position and beside the table's row (both in L2). Llama-3-8B, 4096 tokens: 48 heads of 128, half of 101 MB read: 23.4
// us at 4.3 TB/s if a warp's life is 0.6 us, 33 at 0.9 (70%): at risk; two heads a warp would be the remedy. A decode step
// is a launch, 2 to 3 us.
#include "device.cuh"

namespace llmctl {
namespace rope {

constexpr int kThreads = 128;
constexpr int kVector = 4;
constexpr int kChunk = kWarp * kVector;
constexpr int kChunks = 2;

struct Rotation {
    const float *cosines, *sines;
    long long row;  // of the tables, where this token's position begins
    int rotary_dim, gptj;
};

// Elements p .. p + 3 of a head, in fp32.
template <typename T>
LLMCTL_DEVICE void load4(const T* head, int p, float (&v)[kVector]) {
    const Vec8 packed = load8(head + p);
#pragma unroll
    for (int j = 0; j < kVector; ++j) v[j] = to_float(T{static_cast<u16>(packed.w[j / 2] >> (16 * (j % 2)))});
}

// rotate4 for neox pairs and half a rotation that is a multiple of 4: the elements lie in one half, their partners side
// by side in the other. 4 loads where 13 narrow ones would take the load units as long as the memory takes.
template <typename T>
LLMCTL_DEVICE void rotate_halves(const T* head, int p, int half, const Rotation& r, float (&v)[kVector]) {
    const bool first = p < half;
    const long long at = r.row + (first ? p : p - half);
    const Vec16 cosines = load16_const(r.cosines + at), sines = load16_const(r.sines + at);
    float other[kVector];
    load4(head, p, v);
    load4(head, first ? p + half : p - half, other);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
        const float turn = other[j] * bits_to_float(sines.w[j]);
        v[j] = v[j] * bits_to_float(cosines.w[j]) + (first ? -turn : turn);
    }
}

// The four elements from p on, rotated; elements beyond rotary_dim pass through.
template <typename T>
LLMCTL_DEVICE void rotate4(const T* head, int p, const Rotation& r, float (&v)[kVector]) {
    const int half = r.rotary_dim / 2;
    if (r.gptj == 0 && half % kVector == 0 && p < r.rotary_dim) {
        rotate_halves(head, p, half, r, v);
        return;
    }
    float own[kVector];
    load4(head, p, own);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
        const int at = p + j;
        v[j] = own[j];
        if (at < r.rotary_dim) {
            const bool first = r.gptj ? at % 2 == 0 : at < half;
            const int pair = r.gptj ? at / 2 : (first ? at : at - half);
            const float other = r.gptj ? own[j ^ 1] : to_float(head[first ? at + half : at - half]);
            const float turn = other * r.sines[r.row + pair];
            v[j] = own[j] * r.cosines[r.row + pair] + (first ? -turn : turn);
        }
    }
}

template <typename T>
LLMCTL_DEVICE void store4(T* to, const float (&v)[kVector]) {
    store8(to, Vec8{{pack16<T>(v[0], v[1]), pack16<T>(v[2], v[3])}});
}
LLMCTL_DEVICE void store4(s8* to, const float (&v)[kVector]) {
    *reinterpret_cast<u32*>(to) = pack_s8(v[0], v[1], v[2], v[3]);
}
LLMCTL_DEVICE void store4(e4m3* to, const float (&v)[kVector]) {
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) word |= static_cast<u32>(from_float<e4m3>(v[j]).bits) << (8 * j);
    *reinterpret_cast<u32*>(to) = word;
}

// What a cached element is multiplied by before it is stored. For int8 the warp agrees on 127 / max|v| of the head.
template <typename T>
LLMCTL_DEVICE float storage_factor(T*, const float (&)[kChunks][kVector], float*, float) {
    return 1.0f;
}
LLMCTL_DEVICE float storage_factor(e4m3*, const float (&)[kChunks][kVector], float*, float scale) {
    return 1.0f / scale;
}
LLMCTL_DEVICE float storage_factor(s8*, const float (&v)[kChunks][kVector], float* scale, float) {
    float most = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) most = fmaxf(most, fabsf(v[c][j]));
    }
    most = warp_max(most);
    if (lane_index() == 0) *scale = most / 127.0f;
    return most > 0.0f ? 127.0f / most : 0.0f;
}

// One head through the warp: read and rotate all of it, then write it (`to` may be the place it was read from).
template <typename T, typename To>
LLMCTL_DEVICE void move_head(const T* from, To* to, int head_dim, const Rotation& r, float* scale,
                             float fixed_scale) {
    float v[kChunks][kVector] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        const int p = c * kChunk + lane_index() * kVector;
        if (p < head_dim) rotate4(from, p, r, v[c]);
    }
    warp_sync();
    const float factor = storage_factor(to, v, scale, fixed_scale);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        const int p = c * kChunk + lane_index() * kVector;
#pragma unroll
        for (int j = 0; j < kVector; ++j) v[c][j] *= factor;
        if (p < head_dim) store4(to + p, v[c]);
    }
}

// A launch, in the order of the entry's parameters.
template <typename T, typename KV>
struct Call {
    const T *q, *k, *v;
    T* q_out;
    const long long* positions;
    const float *cosines, *sines;
    const long long* slots;
    KV *keys, *values;
    float *key_scales, *value_scales;
    int tokens, heads, kv_heads, head_dim, rotary_dim, gptj;
    int q_stride, k_stride, v_stride, q_out_stride;
    float key_scale, value_scale;
};

template <typename T, typename KV>
LLMCTL_DEVICE void run(const Call<T, KV>& c) {
    const int item = block_index() * (kThreads / kWarp) + warp_index();
    const int per_token = c.heads + 2 * c.kv_heads;
    if (item >= c.tokens * per_token) return;
    const long long token = item / per_token;
    const int part = item % per_token;
    Rotation rotation{c.cosines, c.sines, 0, c.rotary_dim, c.gptj};
    if (c.rotary_dim) rotation.row = c.positions[token] * (c.rotary_dim / 2);
    if (part < c.heads) {
        move_head(c.q + token * c.q_stride + part * c.head_dim, c.q_out + token * c.q_out_stride + part * c.head_dim,
                  c.head_dim, rotation, nullptr, 1.0f);
        return;
    }
    const long long slot = c.slots[token];
    if (slot < 0) return;
    const bool is_key = part < c.heads + c.kv_heads;
    const int head = part - c.heads - (is_key ? 0 : c.kv_heads);
    const long long at = slot * c.kv_heads + head;
    if (!is_key) rotation.rotary_dim = 0;
    const T* from = is_key ? c.k + token * c.k_stride : c.v + token * c.v_stride;
    float* scales = is_key ? c.key_scales : c.value_scales;
    move_head(from + head * c.head_dim, (is_key ? c.keys : c.values) + at * c.head_dim, c.head_dim, rotation,
              scales ? scales + at : nullptr, is_key ? c.key_scale : c.value_scale);
}

}  // namespace rope
}  // namespace llmctl

#define LLMCTL_ROPE_KV(T, KV)                                                                                    \
    LLMCTL_KERNEL(llmctl::rope::kThreads, 8)                                                                     \
    rope_kv_##T##_##KV(const llmctl::T* q, const llmctl::T* k, const llmctl::T* v, llmctl::T* q_out,             \
                       const long long* positions, const float* cosines, const float* sines,                     \
                       const long long* slots, llmctl::KV* keys, llmctl::KV* values, float* key_scales,          \
                       float* value_scales, int tokens, int heads, int kv_heads, int head_dim, int rotary_dim,   \
                       int gptj, int q_stride, int k_stride, int v_stride, int q_out_stride, float key_scale,    \
                       float value_scale) {                                                                      \
        llmctl::rope::run(llmctl::rope::Call<llmctl::T, llmctl::KV>{                                             \
            q, k, v, q_out, positions, cosines, sines, slots, keys, values, key_scales, value_scales, tokens,    \
            heads, kv_heads, head_dim, rotary_dim, gptj, q_stride, k_stride, v_stride, q_out_stride, key_scale,  \
            value_scale});                                                                                       \
    }

LLMCTL_ROPE_KV(f16, f16)
LLMCTL_ROPE_KV(f16, s8)
LLMCTL_ROPE_KV(f16, e4m3)
LLMCTL_ROPE_KV(bf16, bf16)
LLMCTL_ROPE_KV(bf16, s8)
LLMCTL_ROPE_KV(bf16, e4m3)
