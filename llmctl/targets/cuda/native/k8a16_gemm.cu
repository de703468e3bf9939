// y = tail(x @ (code * scale + minimum).T) for 17 and more rows of x and 8-bit codes in groups of 16 or 32 columns, on
// tensor cores. See gemm_tile.cuh and k8a16_stream.cu.
//
// k8a16_gemm_<T>_t<tokens a block>; launches from targets/cuda/gemm.py: plan_tile. Sums of x cost half as many mma as
// the products. Not measured on a GPU yet.
#include "gemm_tile.cuh"

LLMCTL_MINIMUM_GEMM(k8a16_gemm, f16, 8, 32)
LLMCTL_MINIMUM_GEMM(k8a16_gemm, f16, 8, 64)
LLMCTL_MINIMUM_GEMM(k8a16_gemm, bf16, 8, 32)
LLMCTL_MINIMUM_GEMM(k8a16_gemm, bf16, 8, 64)
