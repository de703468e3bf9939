// y = tail(x @ (float8(code) * scale).T) for 17 and more rows of x and float8 (e4m3) codes, on tensor cores. See
// gemm_tile.cuh.
//
// fp8a16_gemm_<T>_t<tokens a block>; launches from targets/cuda/gemm.py: plan_tile. Dynamic shared memory as w8a16_gemm.cu;
// of a chunk of 32 x 32 weights 64 (f16) or 80 (bf16) instructions of dequantisation. Not measured on a GPU yet.
#include "gemm_tile.cuh"

LLMCTL_FLOAT8_GEMM(fp8a16_gemm, f16, 32)
LLMCTL_FLOAT8_GEMM(fp8a16_gemm, f16, 64)
LLMCTL_FLOAT8_GEMM(fp8a16_gemm, bf16, 32)
LLMCTL_FLOAT8_GEMM(fp8a16_gemm, bf16, 64)
