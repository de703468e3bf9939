// y = tail(token_scales * (x @ dequantize(w).T)) for int8 x and symmetric 8-bit codes, on tensor cores.
#include "gemm_tile.cuh"

LLMCTL_INT8_GEMM(w8a8_gemm, f16, 8)
LLMCTL_INT8_GEMM(w8a8_gemm, f16, 16)
LLMCTL_INT8_GEMM(w8a8_gemm, f16, 32)
LLMCTL_INT8_GEMM(w8a8_gemm, f16, 64)
LLMCTL_INT8_GEMM(w8a8_gemm, bf16, 8)
LLMCTL_INT8_GEMM(w8a8_gemm, bf16, 16)
LLMCTL_INT8_GEMM(w8a8_gemm, bf16, 32)
LLMCTL_INT8_GEMM(w8a8_gemm, bf16, 64)
