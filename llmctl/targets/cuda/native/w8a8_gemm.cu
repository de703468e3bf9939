// y = tail(token_scale * (x @ dequantize(w).T)) for int8 x and symmetric 8-bit codes, on int8 tensor cores. See
// gemm_tile.cuh.
//
// x s8 [m, k] with token_scales f32 [m]; codes around 128, scaled per channel or per group; sums of a group are exact
// integers. k % 16 == 0. w8a8_gemm_<T of y>_t<tokens a block>; launches: targets/cuda/gemm.py: plan_tile(int8=True).
// Dynamic shared memory of a half: 4 stages of 9472 (8 tokens) to 11008 (32), 3 of 13056 (64).
//
// Bytes: 1 a weight. Of a chunk of 32 x 32 weights, 64 tokens: 16 mma m16n8k32, 8 8-byte and 2 16-byte shared loads, 8
// xors. On an H200, Llama-3-8B gate/up: 27.3 us of bytes; arithmetic at 60% of 1560 TOP/s: 8 / 16 / 32 us at M = 32 /
// 64 / 128, so bandwidth binds up to M = 110.
#include "gemm_tile.cuh"

LLMCTL_INT8_GEMM(w8a8_gemm, f16, 8)
LLMCTL_INT8_GEMM(w8a8_gemm, f16, 16)
LLMCTL_INT8_GEMM(w8a8_gemm, f16, 32)
LLMCTL_INT8_GEMM(w8a8_gemm, f16, 64)
LLMCTL_INT8_GEMM(w8a8_gemm, bf16, 8)
LLMCTL_INT8_GEMM(w8a8_gemm, bf16, 16)
LLMCTL_INT8_GEMM(w8a8_gemm, bf16, 32)
LLMCTL_INT8_GEMM(w8a8_gemm, bf16, 64)
