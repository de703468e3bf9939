// y = tail(x @ dequantize(w).T) for 17 and more rows of x and 4-bit codes, on tensor cores. See gemm_tile.cuh.
#include "gemm_tile.cuh"

LLMCTL_TILE_GEMM(w4a16_gemm, f16, 4, 32)
LLMCTL_TILE_GEMM(w4a16_gemm, f16, 4, 64)
LLMCTL_TILE_GEMM(w4a16_gemm, bf16, 4, 32)
LLMCTL_TILE_GEMM(w4a16_gemm, bf16, 4, 64)
