// y = tail(x @ dequantize(w).T) for 17 and more rows of x and 8-bit codes, on tensor cores. See gemm_tile.cuh.
//
// w8a16_gemm_<T>_t<tokens a block>; launches from targets/cuda/gemm.py: plan_tile. Dynamic shared memory of a half:
// 3 stages of 13056 bytes for 32 tokens, 3 of 17152 for 64.
//
// Arithmetic as w4a16_gemm.cu, with 1 byte a weight and 64 (f16) or 160 (bf16) instructions of dequantisation a chunk.
// On an H200, Llama-3-8B gate/up: 27.3 us of bytes; 19 / 39 / 77 us of arithmetic at M = 32 / 64 / 128.
#include "gemm_tile.cuh"

LLMCTL_TILE_GEMM(w8a16_gemm, f16, 8, 32)
LLMCTL_TILE_GEMM(w8a16_gemm, f16, 8, 64)
LLMCTL_TILE_GEMM(w8a16_gemm, bf16, 8, 32)
LLMCTL_TILE_GEMM(w8a16_gemm, bf16, 8, 64)
