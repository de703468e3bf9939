// The paged KV cache: layout of its tiles and the writing of tokens.
//
// Per layer: [block][kv_head][16-token subtile] of one K tile and one V tile, head size padded to D % 16 == 0
//   fp32  K [D][16 tokens]             V [16 tokens][D]
//   bf16  K [D/2][16 tokens][2]        V [8 token pairs][D][2]      (operands of vdpbf16ps)
//   int8  K [D/4][16 tokens][4]        V [4 token quads][D][4]      (operands of vpdpbusd)
//         K's codes are stored + 128; behind each tile 16 fp32 scales, one a token (and head): K or V = code * scale
#pragma once
#include "simd.h"

namespace llmctl {

enum KvType : int32_t { kKvF32 = 0, kKvBf16 = 1, kKvS8 = 2 };

constexpr int64_t kKeys = 16;      // keys a tile
constexpr int64_t kMaxHead = 256;  // columns a head

struct KvLayer {
  uint8_t* base;
  int64_t kv_heads, dim, padded;  // padded: dim rounded up to 16
  KvType type;
  int64_t block_size;  // a multiple of kKeys
  int32_t group = 0;   // of layers that share slots and block tables
  constexpr int64_t tile_codes() const { return kKeys * padded * (type == kKvF32 ? 4 : type == kKvBf16 ? 2 : 1); }
  constexpr int64_t half_bytes() const { return tile_codes() + (type == kKvS8 ? kKeys * 4 : 0); }  // one K or V tile
  uint8_t* tile(int64_t block, int64_t head, int64_t offset) const {
    return base + (((block * kv_heads + head) * (block_size / kKeys) + offset / kKeys) * 2) * half_bytes();
  }
};

// x as int8 codes with scale max|x| / 127, returned.
static inline float kv_codes(const float* x, int64_t dim, int8_t* codes) {
  float largest = max_abs(x, dim);
  const float inverse = inverse_scale(largest, 127.0f);
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16) store(codes + d, i32_to_i8(round_to_i32(load<f32x16>(x + d) * inverse)));
  for (; d < dim; d++) codes[d] = int8_t(std::nearbyint(x[d] * inverse));
  return largest / 127.0f;
}

// Writes 16-bit elements by 2 or 8-bit elements by 4 (kGroup); lane: the token's place in the tile.
template <int kGroup, class T>
static inline void store_groups(const T* k, const T* v, int64_t dim, int64_t padded, int64_t lane, T* kt, T* vt) {
  kt += lane * kGroup;
  vt += lane / kGroup * padded * kGroup + lane % kGroup;
  int64_t d = 0;
  for (; d + kGroup <= dim; d += kGroup) std::memcpy(kt + d * kKeys, k + d, kGroup * sizeof(T));
  for (; d < dim; d++) kt[d / kGroup * kGroup * kKeys + d % kGroup] = k[d];
  for (d = 0; d < dim; d++) vt[d * kGroup] = v[d];
}

// Writes one token's K and V of one head at `slot` (block * block_size + offset).
static inline void kv_store(const KvLayer& kv, int64_t slot, int64_t head, const float* k, const float* v) {
  const int64_t block = slot / kv.block_size, offset = slot % kv.block_size, lane = offset % kKeys;
  uint8_t *kt = kv.tile(block, head, offset), *vt = kt + kv.half_bytes();
  if (kv.type == kKvBf16) {
    alignas(64) uint16_t ks[kMaxHead], vs[kMaxHead];
    int64_t d = 0;
    for (; d + 16 <= kv.dim; d += 16) {
      store(ks + d, f32_to_bf16(load<f32x16>(k + d)));
      store(vs + d, f32_to_bf16(load<f32x16>(v + d)));
    }
    for (; d < kv.dim; d++) ks[d] = f32_to_bf16(k[d]), vs[d] = f32_to_bf16(v[d]);
    store_groups<2>(ks, vs, kv.dim, kv.padded, lane, (uint16_t*)kt, (uint16_t*)vt);
  } else if (kv.type == kKvS8) {
    int8_t ks[kMaxHead], vs[kMaxHead];
    ((float*)(kt + kv.tile_codes()))[lane] = kv_codes(k, kv.dim, ks);
    ((float*)(vt + kv.tile_codes()))[lane] = kv_codes(v, kv.dim, vs);
    for (int64_t d = 0; d < kv.dim; d++) ks[d] = int8_t(ks[d] ^ -128);
    store_groups<4>(ks, vs, kv.dim, kv.padded, lane, (int8_t*)kt, (int8_t*)vt);
  } else {
    for (int64_t d = 0; d < kv.dim; d++) {
      ((float*)kt)[d * kKeys + lane] = k[d];
      ((float*)vt)[lane * kv.padded + d] = v[d];
    }
  }
}

}  // namespace llmctl
