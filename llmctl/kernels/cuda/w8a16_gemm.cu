// y = tail(x @ dequantize(w).T) for 17 and more rows of x and 8-bit codes, on tensor cores. See gemm_tile.cuh.
#include "gemm_tile.cuh"

LLMCTL_TILE_GEMM(w8a16_gemm, f16, 8, 32)
LLMCTL_TILE_GEMM(w8a16_gemm, f16, 8, 64)
LLMCTL_TILE_GEMM(w8a16_gemm, bf16, 8, 32)
LLMCTL_TILE_GEMM(w8a16_gemm, bf16, 8, 64)
